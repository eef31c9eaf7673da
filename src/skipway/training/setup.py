"""Build a fresh run from a recipe: data, network, optimizer, and the files that are written first."""

from __future__ import annotations

import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipway._version import __version__
from skipway.checkpoint.files import write_json
from skipway.checkpoint.store import Checkpoints
from skipway.data.randomness import draw_key
from skipway.errors import SkipwayError
from skipway.inference.network import add_hidden_layer, is_ours
from skipway.kernels.torch_faults import subsample_first
from skipway.monitoring.health import Health
from skipway.optim.groups import param_groups
from skipway.recipe import Recipe, ResolvedRecipe
from skipway.training.distributed import Ranks
from skipway.training.ema import ModelEMA
from skipway.training.reporter import Reporter
from skipway.training.run import Progress, Run
from skipway.training.run_folder import RunFolder
from skipway.training.task import Task

__all__ = [
    "build_run",
    "deterministic_algorithms",
    "give_hidden_layer",
    "load_data",
    "model_config",
    "run_config",
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
    task: Task,
    recipe: Recipe,
    reporter: Reporter,
    ranks: Ranks,
    device: torch.device,
    listed: Mapping[str, Sequence[str]] | None = None,
    *,
    fresh: bool = True,
) -> tuple[Recipe, Any]:
    """Load the data of the recipe, see `Task.load`; rank 0 goes first and fills the cache for the others."""
    if not ranks.first:
        ranks.barrier()
    try:
        return task.load(recipe, reporter, ranks, device, listed, fresh=fresh)
    finally:
        if ranks.first:
            ranks.barrier()


def build_run(
    task: Task,
    recipe: ResolvedRecipe,
    data: Any,
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
    model, head = task.build_network(recipe, data, reporter.message, fresh=fresh)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SkipwayError(f"all parameters of {recipe.model} have requires_grad=False, so there is nothing to train")
    model = model.to(device)
    subsample_first(model)
    if recipe.sharding == "none":  # FSDP2 shards the first axis and requires contiguous weights
        model = model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    if recipe.sharding == "full" and (recipe.freeze != "none" or recipe.clip == "agc"):
        raise SkipwayError("sharding='full' cannot be combined with freeze or clip='agc': both need unsharded weights")
    network = ranks.wrap(model, device, shard=recipe.sharding == "full")
    with warnings.catch_warnings(record=True) as caught:  # of a decay by layers that finds no blocks
        warnings.simplefilter("always")
        optimizer = build_optimizer(
            recipe, model, task.example(data).to(device)
        )  # after wrapping: FSDP2 replaces the parameters
    for each in caught:
        reporter.message("note", str(each.message))
    ema = None if recipe.ema is None else ModelEMA(model, recipe.ema)
    run = Run(
        recipe=recipe,
        task=task,
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
    if recipe.steps is not None and recipe.time is None:
        run.progress = Progress.of_steps(recipe.steps, run.steps_per_epoch, recipe.accumulate)
    else:
        least = 0 if recipe.time is None else math.ceil(STEPS_TO_PLAN / run.steps_per_epoch)
        run.progress = Progress.of_epochs(max(recipe.epochs, least), run.steps_per_epoch, recipe.accumulate)
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


def class_weights(recipe: Recipe, data: Any, device: torch.device) -> Tensor | None:
    """N / (K N_k) for class k, as scikit-learn's "balanced": 1 on average over the training images."""
    if recipe.class_weights == "none":
        return None
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).float()
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).to(device)


def write_run_files(run: Run) -> None:
    """Write `config.json`, `split.json` and `environment.json`."""
    if run.ranks.first:
        run.folder.begin(run_config(run), run.task.split_files(run.data))
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
        **run.task.describe_inputs(run.data),
        "data": run.task.describe_data(run.data),
    }


def model_config(run: Run) -> dict[str, Any]:
    """The description that the network is built from again."""
    options = run.task.network_options(run.recipe, run.data)
    scheme = getattr(getattr(run.model, "config", None), "scheme", None) if is_ours(str(run.recipe.model)) else None
    head = {} if run.progress.head is None else {"head": run.progress.head}
    return {"name": run.recipe.model, **options, **({} if scheme is None else {"scheme": str(scheme)}), **head}
