"""Build a fresh run from a recipe: data, network, optimizer, and the files that are written first."""

from __future__ import annotations

import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway._version import __version__
from skipway.checkpoint.files import write_json
from skipway.checkpoint.store import Checkpoints
from skipway.data import Data, load
from skipway.data.data_config import find_hidden_layer
from skipway.data.randomness import draw_key
from skipway.data.source_reader import SourceSummary
from skipway.errors import DataError, SkipwayError, first_line, printable
from skipway.inference.network import add_hidden_layer, build_classifier, is_ours
from skipway.models import find_config
from skipway.monitor.health import Health
from skipway.optim.groups import param_groups
from skipway.recipe import NO_PATIENCE, Recipe, ResolvedRecipe
from skipway.tracing import preserved_state
from skipway.training.defaults import decide
from skipway.training.distributed import Ranks
from skipway.training.ema import ModelEMA
from skipway.training.initial_weights import load_initial_weights, resolve_paths
from skipway.training.reporter import Reporter
from skipway.training.run import Progress, Run, growing_side
from skipway.training.run_folder import RunFolder

__all__ = [
    "build_run",
    "count_images",
    "deterministic_algorithms",
    "give_hidden_layer",
    "load_data",
    "model_config",
    "resolve_recipe",
    "wrap_network",
    "write_run_files",
]

# variable that cuBLAS reads, without which it is not deterministic
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# more steps than are timed before `Recipe.time` is converted to epochs
STEPS_TO_PLAN = 25


@contextmanager
def deterministic_algorithms(recipe: Recipe) -> Iterator[None]:
    """Context in which torch uses only deterministic algorithms, if the recipe asks for it."""
    before, named = torch.are_deterministic_algorithms_enabled(), CUBLAS in os.environ
    if recipe.deterministic:
        os.environ.setdefault(CUBLAS, ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        if not named:
            os.environ.pop(CUBLAS, None)


def load_data(
    recipe: Recipe,
    reporter: Reporter,
    ranks: Ranks,
    device: torch.device,
    listed: Mapping[str, Sequence[str]] | None = None,
    *,
    fresh: bool = True,
) -> tuple[Recipe, Data]:
    """Load the data of the recipe; rank 0 goes first and fills the cache for the others.

    Args:
        listed: image names per split, for a resumed run; None to split anew.
        fresh: make the choices that the recipe leaves open; False for a recipe that was stored with them.

    Returns:
        the recipe with these choices, and the data.
    """
    chosen = recipe

    def choose(summary: SourceSummary) -> Mapping[str, Any]:
        nonlocal chosen
        if fresh:
            reporter.activity("weights")
            chosen = decide(recipe, summary, device, ranks.world, reporter.message)
        return chosen.data_choices()

    if not ranks.first:
        ranks.barrier()
    try:
        data = load(
            recipe.data,
            **recipe.data_choices(),
            listed=listed,
            decide=choose,
            progress=partial(reporter.activity, "reading"),
            remark=partial(reporter.message, "note"),
        )
        return chosen, data
    finally:
        if ranks.first:
            ranks.barrier()


def resolve_recipe(given: Recipe, data: Data, precision: Any, world: int) -> ResolvedRecipe:
    """Return the recipe with every open choice resolved from the data, except device and workers."""
    recipe = ResolvedRecipe.of(resolve_paths(given))
    most = len(data.train) // (world * recipe.accumulate) * world * recipe.accumulate
    if most == 0:
        raise DataError(
            f"{len(data.train)} training images are fewer than {world} processes x accumulate={recipe.accumulate}; "
            "reduce either"
        )
    if recipe.patience is not None and not len(data.validation):
        raise SkipwayError(NO_PATIENCE)
    recipe = replace(recipe, batch_size=min(recipe.batch_size, most))
    return replace(
        recipe,
        size=data.size,
        channels=1 if data.channels == 1 else 3,
        crop=data.augmentation.crop,
        flip=data.augmentation.flip,
        crop_share=data.preprocessing.crop_share,
        resample=data.preprocessing.resample,
        mean=Recipe.text_of(data.mean),
        std=Recipe.text_of(data.std),
        model=recipe.model or ("resnet20" if data.size <= 64 else "resnet50"),
        lr=recipe.peak_lr,
        weight_decay=recipe.decay,
        precision=precision,
    )


def build_run(
    recipe: ResolvedRecipe,
    data: Data,
    folder: RunFolder,
    reporter: Reporter,
    device: torch.device,
    ranks: Ranks,
    stop: Callable[[], bool],
    *,
    fresh: bool = True,
) -> Run:
    """Build network, optimizer and everything else of a run on the device; the initial weights only where it is fresh,
    since a checkpoint replaces them.
    """
    torch.manual_seed(draw_key(recipe.seed, "weights"))
    description = {"name": recipe.model, **model_options(recipe, data)}
    model = build_classifier(description, remark=partial(reporter.message, "note"))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SkipwayError(f"all parameters of {recipe.model} have requires_grad=False, so there is nothing to train")
    example = data.preprocessing.example.expand(2, -1, -1, -1)
    head = find_hidden_layer(str(recipe.start)) if fresh and recipe.initial_weights is not None else None
    if head is not None:
        add_hidden_layer(model, *head)
    if fresh and recipe.initial_weights is not None:
        loaded = load_initial_weights(model, recipe, data.classes, example, partial(reporter.message, "note"))
        reporter.message("weights", loaded)
    check_grow_from(recipe, data, model)
    model = model.to(device)
    if recipe.sharding == "none":  # FSDP2 shards the first axis and requires contiguous weights
        model = model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    if recipe.sharding == "full" and (recipe.freeze != "none" or recipe.clip == "agc"):
        raise SkipwayError("sharding='full' cannot be combined with freeze or clip='agc': both need unsharded weights")
    network = ranks.wrap(model, device, shard=recipe.sharding == "full")
    with warnings.catch_warnings(record=True) as caught:  # of a decay by layers that finds no blocks
        warnings.simplefilter("always")
        optimizer = build_optimizer(recipe, model, example.to(device))  # after wrapping: FSDP2 replaces the parameters
    for each in caught:
        reporter.message("note", str(each.message))
    ema = None if recipe.ema is None else ModelEMA(model, recipe.ema)
    run = Run(
        recipe=recipe,
        data=data,
        model=model,
        network=torch.compile(network) if recipe.compile else network,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16"),
        ema=ema,
        folder=folder,
        checkpoints=Checkpoints(folder.checkpoints, background=device.type == "cuda"),
        reporter=reporter,
        device=device,
        ranks=ranks,
        stop=stop,
        health=Health(recipe.health if ranks.world == 1 else 0.0, getattr(torch, recipe.precision)),
        class_weights=class_weights(recipe, data, device),
    )
    # with `time` the epochs are planned after some timed steps, so the initial plan must be long enough for these
    epochs = (
        recipe.epochs if recipe.time is None else max(recipe.epochs, math.ceil(STEPS_TO_PLAN / run.steps_per_epoch))
    )
    run.progress = Progress.of_epochs(epochs, run.steps_per_epoch, recipe.accumulate)
    run.progress.head = head
    return run


def build_optimizer(recipe: ResolvedRecipe, model: nn.Module, example: Tensor) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that learn."""
    spec = recipe.optimizer_spec
    groups = param_groups(
        model,
        None if is_ours(str(recipe.model)) else example,
        lr=recipe.peak_lr,
        weight_decay=recipe.decay,
        layer_decay=recipe.layer_decay,
        eps=spec.eps,
        adaptive=spec.adaptive,
    )
    return spec.build(groups)


def wrap_network(run: Run) -> None:
    """Wrap the model again after a change of its modules or of what learns."""
    network = run.ranks.wrap(run.model, run.device, shard=False)
    run.network = torch.compile(network) if run.recipe.compile else network


def give_hidden_layer(run: Run, head: list[Any]) -> None:
    """Give the classifier of a run a fresh hidden layer, with all that follows from new parameters, in place."""
    add_hidden_layer(run.model, *head)
    run.progress.head = head
    run.optimizer = build_optimizer(run.recipe, run.model, run.example)
    if run.ema is not None:
        run.ema = ModelEMA(run.model, run.ema.decay)
    wrap_network(run)
    if run.ranks.first:
        write_json(run.folder.config, run_config(run))


def model_options(recipe: Recipe, data: Data) -> dict[str, Any]:
    """The options of `build_classifier` besides the name: those of `skipway.build` for a network of ours, with the
    image size for families whose weights depend on it.
    """
    if not is_ours(str(recipe.model)):
        shape = {"classes": len(data.classes), "channels": data.channels, "image": data.size}
        return shape if recipe.scheme is None else {**shape, "scheme": recipe.scheme}
    _, config = find_config(str(recipe.model), recipe.depth)
    # transformers call the channels of their stream its dimension
    width = "dim" if hasattr(config, "dim") else "width"
    options = {"depth": recipe.depth, width: recipe.width, "scheme": recipe.scheme}
    given = {name: value for name, value in options.items() if value is not None}
    image = {"image": data.size} if hasattr(config, "image") else {}
    return {**given, **image, "classes": len(data.classes), "channels": data.channels}


def check_grow_from(recipe: Recipe, data: Data, model: nn.Module) -> None:
    """Raise if `grow_from` exceeds the image size, or the network does not take one of the sizes in between."""
    if recipe.grow_from is None:
        return
    if recipe.grow_from > data.size:
        raise SkipwayError(f"grow_from={recipe.grow_from}: the rule is grow_from <= size, which is {data.size}")
    epochs = data.size if recipe.time is not None else ResolvedRecipe.of(recipe).epochs  # as many as there are sizes
    for side in sorted({growing_side(recipe.grow_from, data.size, epoch / epochs) for epoch in range(epochs)}):
        try:
            with preserved_state(model), torch.no_grad():
                model.eval()(torch.zeros(1, data.channels, side, side))
        except Exception as error:  # of any kind, in a network that is not ours
            raise SkipwayError(
                f"grow_from={recipe.grow_from}: {recipe.model} does not take images of {side}x{side}, one of the sizes "
                f"between: {printable(first_line(error))}; leave it out"
            ) from error


def class_weights(recipe: Recipe, data: Data, device: torch.device) -> Tensor | None:
    """N / (K N_k) for class k, as scikit-learn's "balanced": 1 on average over the training images."""
    if recipe.class_weights == "none":
        return None
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).float()
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).to(device)


def write_run_files(run: Run) -> None:
    """Write `config.json`, `split.json` and `environment.json`."""
    if run.ranks.first:
        run.folder.begin(run_config(run), list_split_files(run.data))
        write_json(run.folder.environment, describe_environment(run))


def describe_environment(run: Run) -> dict[str, Any]:
    """The content of `environment.json`: hardware and versions, which may affect a result."""
    gpu = run.device.type == "cuda"
    return {
        "skipway": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(run.device),
        "gpu": torch.cuda.get_device_name(run.device) if gpu else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": run.ranks.world,
    }


def run_config(run: Run) -> dict[str, Any]:
    """The content of `config.json`."""
    return {
        "skipway": __version__,
        "torch": torch.__version__,
        "recipe": run.recipe.to_json(),
        "model": model_config(run),
        "preprocessing": run.data.preprocessing.to_json(),
        "data": {
            "fingerprint": run.data.fingerprint,
            **count_images(run.data),
            "unreadable": [list(entry) for entry in run.data.unreadable],
            "left_out": dict(run.data.splits.left_out.counts),
        },
    }


def model_config(run: Run) -> dict[str, Any]:
    """The description that `build_classifier` builds the network from."""
    options = model_options(run.recipe, run.data)
    scheme = getattr(getattr(run.model, "config", None), "scheme", None) if is_ours(str(run.recipe.model)) else None
    head = {} if run.progress.head is None else {"head": run.progress.head}
    return {"name": run.recipe.model, **options, **({} if scheme is None else {"scheme": str(scheme)}), **head}


def count_images(data: Data) -> dict[str, int]:
    """The number of images of each split."""
    return {split: len(files) for split, files in data.listed.items()}


def list_split_files(data: Data) -> dict[str, Any] | None:
    """The content of `split.json`: the files of all splits, if a split was created here; else None."""
    if not data.splits.split_off:
        return None
    return {"split_off": dict(data.splits.split_off), "fold": data.splits.fold, **data.listed}
