"""From a recipe to a run that can start: images, network, optimiser; and what is written first."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipway._version import __version__
from skipway.checkpoint.files import write_json
from skipway.checkpoint.state import load_model_state, load_optimizer_state
from skipway.checkpoint.store import Checkpoints
from skipway.data import Data, load
from skipway.data.randomness import draw_key
from skipway.data.split import name_list
from skipway.errors import CheckpointError, DataError, SkipwayError
from skipway.models import build, find_config
from skipway.monitor.health import Health
from skipway.optim.groups import layer_indices, param_groups
from skipway.recipe import NO_PATIENCE, Recipe
from skipway.training.averaging import Average
from skipway.training.distributed import Ranks
from skipway.training.reporter import Screen
from skipway.training.run import Position, Run
from skipway.training.run_folder import RunFolder
from skipway.weights import load as load_weights

__all__ = [
    "assemble",
    "begin",
    "continued",
    "load_data",
    "model_of",
    "preprocessing_of",
    "resolved",
    "restore",
]

# fields that may differ when a run continues: all others decide what the weights become (that the files in a data
# folder that has moved are the same is checked apart)
FREE_TO_CHANGE = frozenset(
    {
        "data",
        "epochs",
        "time",
        "patience",
        "device",
        "workers",
        "cache",
        "sharding",
        "save_every",
        "health",
        "diverged",
        "memory",
        "tensorboard",
    }
)

# more than are timed before a plan
STEPS_TO_PLAN = 25


def continued(config: dict[str, Any], source: Path, given: Recipe | None) -> Recipe:
    """The recipe with which a run continues: the stored one, with those changes that do not decide its result.

    A field of `given` that leaves the choice open (None or "auto"), or a batch that is larger than the training split,
    does not count as a change.

    Args:
        config: what `config.json` holds.
        source: that file, for messages.
        given: the recipe that was asked for; None: the stored one.

    Raises:
        SkipwayError: `given` changes something that decides the result.
        CheckpointError: `config` holds no recipe.
    """
    stored = Recipe.from_json(config["recipe"], str(source))
    if given is None:
        return stored
    given = absolute(given)
    if given.batch_size > config.get("data", {}).get("train", given.batch_size):
        given = replace(given, batch_size=stored.batch_size)
    changes = {
        name: (old, new) for name, (old, new) in stored.changes(given).items() if new is not None and new != "auto"
    }
    fixed = {name: change for name, change in changes.items() if name not in FREE_TO_CHANGE}
    if fixed:
        text = ", ".join(f"{name} from {old} to {new}" for name, (old, new) in fixed.items())
        raise SkipwayError(
            f"a run that continues cannot change {text}; leave that out, or start another run with --config and --out"
        )
    return replace(stored, **{name: getattr(given, name) for name in changes})


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with paths that hold from any working folder."""
    paths = {name: getattr(recipe, name) for name in ("data", "weights")}
    return replace(
        recipe, **{name: path.resolve() for name, path in paths.items() if path is not None and path.exists()}
    )


def load_data(recipe: Recipe, screen: Screen, ranks: Ranks, listed: Mapping[str, Sequence[str]] | None = None) -> Data:
    """The images that the recipe asks for; the first process looks first and leaves what it found in the cache.

    Args:
        listed: the names of the images of each split, of a run that continues; None: the splits are made anew.
    """
    if not ranks.first:
        ranks.wait()
    try:
        return load(
            recipe.data,
            **recipe.data_choices(),
            listed=listed,
            progress=screen.reading,
            remark=lambda sentence: screen.say("note", sentence),
        )
    finally:
        if ranks.first:
            ranks.wait()


def resolved(recipe: Recipe, data: Data, precision: Any, world: int) -> Recipe:
    """The recipe with every choice made that it left to the data, except for device and workers."""
    most = len(data.train) // (world * recipe.accumulate) * world * recipe.accumulate
    if most == 0:
        raise DataError(
            f"{len(data.train)} images to train on are fewer than {world} processes x {recipe.accumulate} parts of a "
            "batch; use fewer of either"
        )
    if recipe.patience is not None and not len(data.validation):
        raise SkipwayError(NO_PATIENCE)
    recipe = replace(absolute(recipe), batch_size=min(recipe.batch_size, most))
    return replace(
        recipe,
        size=data.size,
        channels=1 if data.channels == 1 else 3,
        crop=data.augmentation.crop,
        flip=data.augmentation.flip,
        model=recipe.model or ("resnet20" if data.size <= 64 else "resnet50"),
        lr=recipe.peak_lr,
        weight_decay=recipe.decay,
        precision=precision,
    )


def assemble(
    recipe: Recipe,
    data: Data,
    folder: RunFolder,
    screen: Screen,
    device: torch.device,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> Run:
    """Build the network and its optimiser on the device."""
    torch.manual_seed(draw_key(recipe.seed, "weights"))
    model = build(str(recipe.model), **build_options(recipe, data))
    if recipe.weights is not None:
        loaded = match_line(model, recipe)
        screen.say("weights", loaded)
    model = model.to(device)
    if recipe.sharding == "none":  # FSDP2 cuts weights along their first axis in memory, and refuses other layouts
        model = model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    check_growing(recipe, data, model)
    if recipe.sharding == "full" and (recipe.freeze or recipe.clip == "agc"):
        raise SkipwayError("sharding='full' goes with neither freeze nor clip='agc': both need whole weights")
    network = ranks.wrap(model, device, shard=recipe.sharding == "full")
    # behind the wrapping: FSDP2 puts parts of the weights in their place
    groups = param_groups(model, lr=recipe.peak_lr, weight_decay=recipe.decay, layer_decay=recipe.layer_decay)
    average = None if recipe.ema is None else Average(model, recipe.ema)
    run = Run(
        recipe=recipe,
        data=data,
        model=model,
        network=torch.compile(network) if recipe.compile else network,
        optimizer=recipe.optimizer_spec.build(groups),
        scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16"),
        average=average,
        folder=folder,
        checkpoints=Checkpoints(folder.checkpoints, background=device.type == "cuda"),
        screen=screen,
        device=device,
        ranks=ranks,
        stop=stop,
        health=Health(recipe.health if ranks.world == 1 else 0.0, getattr(torch, recipe.precision)),
        class_weights=class_weights(recipe, data, device),
    )
    # with a budget of time the epochs are planned once some steps are timed, so there have to be as many until then
    epochs = recipe.epochs if recipe.time is None else max(recipe.epochs, math.ceil(STEPS_TO_PLAN / run.steps))
    run.position = Position(epochs=epochs, parts=recipe.accumulate)
    return run


def build_options(recipe: Recipe, data: Data) -> dict[str, Any]:
    """What `skipway.build` is told besides the name. Families whose weights depend on the image size have it told."""
    _, config = find_config(str(recipe.model), recipe.depth)
    # transformers call the channels of their stream its dimension
    width = "dim" if hasattr(config, "dim") else "width"
    options = {"depth": recipe.depth, width: recipe.width, "scheme": recipe.scheme}
    given = {name: value for name, value in options.items() if value is not None}
    image = {"image": data.size} if hasattr(config, "image") else {}
    return {**given, **image, "classes": len(data.classes), "channels": data.channels}


def match_line(model: nn.Module, recipe: Recipe) -> str:
    """Load the weights to start from; in words, what of them was used.

    The classifier may be another one, and position tables are resampled; every other tensor has to fit.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_weights(model, str(recipe.weights), names=recipe.weights_names, adapt=("classes", "size"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nWhose names a file has is said by --weights-names timm, torchvision or huggingface; now it is "
            f"{recipe.weights_names}."
        ) from error
    after = model.state_dict()
    same = [name for name, tensor in before.items() if tensor.is_floating_point() and torch.equal(tensor, after[name])]
    head = [name for name in same if layers_of_head(model, name)]
    loaded = f"{len(before) - len(head)} of {len(before)} tensors from {recipe.weights}"
    return f"{loaded}; fresh: {', '.join(head)}" if head else loaded


def layers_of_head(model: nn.Module, name: str) -> bool:
    """Whether a tensor is one of the classifier's."""
    return name.startswith("head.")


def check_growing(recipe: Recipe, data: Data, model: nn.Module) -> None:
    """Refuse growing images where the weights are for one size."""
    if recipe.grow_from is None:
        return
    if recipe.grow_from > data.size:
        raise SkipwayError(f"grow_from={recipe.grow_from}: the rule is grow_from <= size, which is {data.size}")
    if hasattr(getattr(model, "config", None), "image"):
        raise SkipwayError(f"grow_from={recipe.grow_from}: the weights of {recipe.model} are for one image size")


def class_weights(recipe: Recipe, data: Data, device: torch.device) -> Tensor | None:
    """N / (K N_k) for class k: 1 in the mean over the training images, as scikit-learn's "balanced"."""
    if recipe.class_weights == "none":
        return None
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).float()
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).to(device)


def freeze(run: Run) -> None:
    """Let only what stands behind the blocks learn in the first `freeze` epochs; the rest runs as in evaluation."""
    if not run.recipe.freeze:
        return
    frozen = run.position.epoch < run.recipe.freeze
    layers = layer_indices(run.model)
    last = max(layers.values())
    changed = False
    for name, parameter in run.model.named_parameters():
        learns = not frozen or layers[name] == last
        changed |= parameter.requires_grad != learns
        parameter.requires_grad_(learns)
    for module in run.model.children():
        if frozen and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    if changed:
        network = run.ranks.wrap(run.model, run.device, shard=False)
        run.network = torch.compile(network) if run.recipe.compile else network


def begin(run: Run) -> None:
    """Write what is known before training."""
    if run.ranks.first:
        run.folder.begin(config_of(run), file_list(run.data))
        write_json(run.folder.environment, environment(run))


def environment(run: Run) -> dict[str, Any]:
    """What `environment.json` holds: what a result may depend on besides the recipe."""
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


def config_of(run: Run) -> dict[str, Any]:
    """What `config.json` holds."""
    return {
        "skipway": __version__,
        "torch": torch.__version__,
        "recipe": run.recipe.to_json(),
        "model": model_of(run),
        "preprocessing": preprocessing_of(run),
        "data": {
            "fingerprint": run.data.fingerprint,
            **sizes_of(run.data),
            "unreadable": [list(entry) for entry in run.data.unreadable],
        },
    }


def model_of(run: Run) -> dict[str, Any]:
    """What `skipway.build` needs to make the network again."""
    options = build_options(run.recipe, run.data)
    scheme = getattr(getattr(run.model, "config", None), "scheme", None)
    return {"name": run.recipe.model, **options, **({} if scheme is None else {"scheme": str(scheme)})}


def preprocessing_of(run: Run) -> dict[str, Any]:
    """What another image needs to be treated like the training images, and what the outputs mean."""
    names = ("classes", "channels", "size", "mean", "std")
    values = {name: getattr(run.data, name) for name in names}
    return {**values, "crop": run.data.augmentation.crop}


def sizes_of(data: Data) -> dict[str, int]:
    """The number of images of each split."""
    return {split: len(files) for split, files in data.listed.items()}


def file_list(data: Data) -> dict[str, Any] | None:
    """What `split.json` holds: the files of all splits, where one of them was split off here."""
    if not data.splits.split_off:
        return None
    return {"split_off": dict(data.splits.split_off), "fold": data.splits.fold, **data.listed}


def restore(run: Run, stored: dict[str, Any]) -> None:
    """Put the run where its newest good checkpoint left it, after checking that the images are still the same.

    Raises:
        CheckpointError: the classes are others, or no checkpoint can be used.
        DataError: files were added, removed or renamed.
    """
    classes = tuple(stored["preprocessing"]["classes"])
    if classes != run.data.classes:
        lost, new = set(classes) - set(run.data.classes), set(run.data.classes) - set(classes)
        raise CheckpointError(f"the classes have changed since the run began: gone {sorted(lost)}, new {sorted(new)}")
    counts = sizes_of(run.data)
    found = {"fingerprint": run.data.fingerprint, **counts}
    if {name: stored["data"][name] for name in found} != found:
        was, now = sum(stored["data"][split] for split in counts), sum(counts.values())
        raise DataError(
            f"the files have changed since the run began: {was:,} images then, {now:,} now{difference(run)}; start a "
            "new run"
        )
    go_back(run)
    planned = stored["recipe"]["epochs"]
    if run.recipe.time is None and run.recipe.epochs != planned:
        run.position.epochs, run.position.ended = run.recipe.epochs, False
    run.earlier_seconds = run.position.seconds
    if run.ranks.first:
        run.folder.keep_metrics(run.position.epoch)
        run.folder.keep_steps(run.steps_done)
        write_json(run.folder.config, {**stored, "recipe": run.recipe.to_json()})


def difference(run: Run) -> str:
    """The images by which the source differs from the run's file list, if it has one, for a message."""
    listed = run.folder.read_split()
    if listed is None:
        return ""
    then, now = ({file for files in each.values() for file in files} for each in (listed, run.data.listed))
    changes = (("new", now - then), ("gone", then - now))
    return "".join(f"; {word} {name_list(sorted(files), 3)}" for word, files in changes if files)


def go_back(run: Run) -> None:
    """Load the newest good checkpoint into everything that changes in training."""
    snapshot, damaged = run.checkpoints.newest()
    for sentence in damaged:
        run.screen.say("damaged", sentence)
    load_model_state(run.model, snapshot.tensors["model"])
    load_optimizer_state(run.model, run.optimizer, snapshot.tensors["optimizer"])
    if run.average is not None:
        load_average(run.average, snapshot.tensors.get("ema"))
    state = snapshot.state
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.position = Position(**state["position"])
    if state["world"] != run.ranks.world:
        was, now = state["world"], run.ranks.world
        run.screen.say(
            "note", f"{was} processes wrote the checkpoint and {now} go on: equal up to rounding, not bit for bit"
        )


def load_average(average: Average, tensors: Any) -> None:
    """The averages of a checkpoint."""
    if tensors is None:
        raise CheckpointError("the checkpoint holds no averaged weights, which ema asks for")
    average.load(dict(tensors))


def snapshot_state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    return {
        "position": asdict(run.position),
        "scaler": run.scaler.state_dict(),
        "world": run.ranks.world,
    }
