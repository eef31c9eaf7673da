"""`train`: a recipe and a folder in, a trained network and its run folder out. One process, one file to read.

Order, augmentation and every other random draw are functions of (seed, epoch, step), and the learning rate is a
function of the step. So the state of a run is its weights, its optimiser's tensors and two integers, and a run that
continues ends in the weights of an uninterrupted one: bit for bit on one CPU with the same number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipway import __version__
from skipway.anatomy import chain
from skipway.data import Data, load
from skipway.data.randomness import draw_key
from skipway.errors import CheckpointError, DataError, DivergedError, SkipwayError
from skipway.groups import param_groups
from skipway.models import build, find_config
from skipway.training.checkpoint import all_finite, load_checkpoint, save_checkpoint
from skipway.training.describe import data_lines, model_lines, signal_lines
from skipway.training.device import choose_device, choose_precision
from skipway.training.evaluation import Evaluation, evaluate
from skipway.training.propagation import first_non_finite, signal_check
from skipway.training.recipe import Recipe
from skipway.training.run_folder import RunFolder
from skipway.training.schedule import rate_factor, set_rates
from skipway.training.screen import Screen, Silent, StepReport
from skipway.training.storage import write_json, write_tensors
from skipway.weights import load as load_weights

__all__ = ["Outcome", "train"]

# fields that may differ when a run continues: all others decide what the weights become (that the files in a data
# folder that has moved are the same is checked apart)
FREE_TO_CHANGE = frozenset({"data", "epochs", "device", "workers"})
# a GPU is asked for its losses once in so many steps, because each question makes it wait
GPU_STEPS_PER_CHECK = 25
# the confusion matrix of more classes than this would be most of the summary
MOST_CLASSES_IN_CONFUSION = 100


@dataclass
class Position:
    """Where a run stands: `step` steps into epoch `epoch`, both from 0, with the sums of that epoch so far."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = 0


@dataclass
class Run:
    """What the functions below share."""

    recipe: Recipe
    data: Data
    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: RunFolder
    screen: Screen
    device: torch.device
    stop: Callable[[], bool]
    position: Position = field(default_factory=Position)
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    epoch_began: float = 0.0
    steps_taken: int = 0
    steps_this_epoch: int = 0
    images_per_second: float = 0.0
    evaluation: Evaluation | None = None

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.data.steps(self.recipe.batch_size)

    @property
    def steps_done(self) -> int:
        """Steps since the start of training, over all sessions."""
        return self.position.epoch * self.steps + self.position.step

    @property
    def seconds(self) -> float:
        """Time spent in training, over all sessions."""
        return self.earlier_seconds + time.monotonic() - self.began

    @property
    def finished(self) -> bool:
        return self.position.epoch >= self.recipe.epochs

    def rate_factor(self, step: int) -> float:
        """What multiplies the peak learning rate at a step of the whole run."""
        return rate_factor(step, self.recipe.epochs * self.steps, self.recipe.warmup)

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of forward passes."""
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call of `train` came to.

    Args:
        finished: whether all epochs are done; False after `stop`.
        folder: where everything is.
        recipe: with every choice resolved.
        classes: names in the order of their numbers.
        evaluation: of the last weights on the test images; None if the run was stopped.
        best_accuracy: over all epochs, on the same test images; -1 before the first.
        best_epoch: the epoch of that, from 1.
        epoch: complete epochs.
        step: steps into the next.
        seconds: spent in training, over all sessions.
    """

    finished: bool
    folder: RunFolder
    recipe: Recipe
    classes: tuple[str, ...]
    evaluation: Evaluation | None
    best_accuracy: float
    best_epoch: int
    epoch: int
    step: int
    seconds: float


def train(
    recipe: Recipe | None,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    screen: Screen | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a network as `recipe` says and leave everything in the folder `out`.

    Args:
        recipe: what to do; None with `resume` takes the one in the folder.
        out: the run folder, see `RunFolder`.
        resume: continue the run in `out` from its checkpoint.
        overwrite: replace the run in `out`.
        screen: where to report; None reports nowhere.
        stop: asked after every step; once it says True the state is saved and the call returns.

    Raises:
        DataError: the images cannot be trained on.
        CheckpointError: the weights to start from, or the run to continue, cannot be used.
        DivergedError: a loss or a weight is not finite; the last good checkpoint is kept.
        SkipwayError: an unknown model or scheme, an impossible depth, a folder that is taken.
    """
    screen = Silent() if screen is None else screen
    folder = RunFolder(out)
    stored = folder.read_config() if resume else None
    if stored is not None:
        recipe = continued(Recipe.from_json(stored["recipe"], str(folder.config)), recipe)
    elif recipe is None:
        raise SkipwayError("recipe=None: a run that starts needs a recipe; only resume=True finds one in the folder")
    else:
        folder.check_free(overwrite=overwrite)
    folder.check_apart(recipe.data)
    device = choose_device(recipe.device)
    precision, reason = choose_precision(recipe.precision, device)
    data = load_data(recipe, screen)
    recipe = resolved(recipe, data, precision)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = assemble(recipe, data, folder, screen, device, stop)
        if stored is None:
            folder.begin(config_of(run), split_of(data))
        else:
            restore(run, stored)
        introduce(run, reason, stored)
        if stored is None:
            save(run)
        fit(run)
        return conclude(run)


def continued(stored: Recipe, given: Recipe | None) -> Recipe:
    """The recipe with which a run continues: the stored one, with those changes that do not decide its result.

    A field of `given` that leaves the choice open (None or "auto") does not count as a change.
    """
    if given is None:
        return stored
    given = absolute(given)
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
    return replace(recipe, **{name: path.resolve() for name, path in paths.items() if path is not None})


def load_data(recipe: Recipe, screen: Screen) -> Data:
    """The images that the recipe asks for."""
    return load(
        recipe.data,
        size=recipe.size,
        channels=recipe.channels,
        held_out=recipe.holdout,
        seed=recipe.seed,
        crop=recipe.crop,
        flip=recipe.flip,
        unreadable=recipe.unreadable,
        workers=recipe.workers,
        progress=screen.reading,
    )


def resolved(recipe: Recipe, data: Data, precision: Any) -> Recipe:
    """The recipe with every choice made that it left to the data, except for device and workers."""
    recipe = replace(absolute(recipe), batch_size=min(recipe.batch_size, len(data.train)))
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
    recipe: Recipe, data: Data, folder: RunFolder, screen: Screen, device: torch.device, stop: Callable[[], bool]
) -> Run:
    """Build the network and its optimiser on the device."""
    torch.manual_seed(draw_key(recipe.seed, "weights"))
    model = build(str(recipe.model), **build_options(recipe, data))
    if recipe.weights is not None:
        load_weights(model, recipe.weights)
    model = model.to(device).to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    groups = param_groups(model, lr=recipe.peak_lr, weight_decay=recipe.decay)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(recipe.momentum, 0.999))
    return Run(recipe, data, model, optimizer, folder, screen, device, stop)


def build_options(recipe: Recipe, data: Data) -> dict[str, Any]:
    """What `skipway.build` is told besides the name. Families whose weights depend on the image size have it told."""
    options = {"depth": recipe.depth, "width": recipe.width, "scheme": recipe.scheme}
    given = {name: value for name, value in options.items() if value is not None}
    _, config = find_config(str(recipe.model), recipe.depth)
    image = {"image": data.size} if hasattr(config, "image") else {}
    return {**given, **image, "classes": len(data.classes), "channels": data.channels}


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
            "train": len(run.data.train),
            "test": len(run.data.test),
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
    return {name: getattr(run.data, name) for name in names}


def split_of(data: Data) -> dict[str, Any] | None:
    """The file list of both parts, where the split was made here."""
    if data.held_out is None:
        return None
    return {"held_out": data.held_out, "train": list(data.train.names), "test": list(data.test.names)}


def restore(run: Run, stored: dict[str, Any]) -> None:
    """Put the run where its checkpoint left it, after checking that the images are still the same.

    Raises:
        CheckpointError: the classes are others, or the checkpoint does not fit.
        DataError: files were added, removed or renamed.
    """
    classes = tuple(stored["preprocessing"]["classes"])
    if classes != run.data.classes:
        lost, new = set(classes) - set(run.data.classes), set(run.data.classes) - set(classes)
        raise CheckpointError(f"the classes have changed since the run began: gone {sorted(lost)}, new {sorted(new)}")
    counts = {"train": len(run.data.train), "test": len(run.data.test)}
    found = {"fingerprint": run.data.fingerprint, **counts}
    if {name: stored["data"][name] for name in found} != found:
        was, now = stored["data"]["train"] + stored["data"]["test"], sum(counts.values())
        raise DataError(
            f"the files have changed since the run began: {was:,} images then, {now:,} now; start a new run"
        )
    state = load_checkpoint(run.folder.checkpoint, run.model, run.optimizer)
    run.position = Position(**state["position"])
    run.earlier_seconds = run.position.seconds
    run.folder.keep_metrics(run.position.epoch)
    write_json(run.folder.config, {**stored, "recipe": run.recipe.to_json()})


def introduce(run: Run, reason: str, stored: dict[str, Any] | None) -> None:
    """Say what was found and what will be done; one batch through the network shows whether signals survive."""
    for line in data_lines(run.data):
        run.screen.say(*line)
    for line in model_lines(run.model, run.recipe, len(chain(run.model)), run.steps):
        run.screen.say(*line)
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    reason = reason if stored is None else "as before"
    run.screen.say("device", f"{run.device}, {name}, {run.recipe.precision} ({reason}), torch {torch.__version__}")
    if stored is not None:
        run.screen.say("resume", f"after epoch {run.position.epoch}, step {run.position.step}")
        earlier = stored["recipe"]["epochs"]
        if earlier != run.recipe.epochs:
            run.screen.say("note", f"{earlier} epochs were planned: the cosine now spans all {run.recipe.epochs}")
        return
    batch = run.data.sample(min(64, run.recipe.batch_size), seed=run.recipe.seed, device=run.device)
    for line in signal_lines(signal_check(run.model, batch)):
        run.screen.say(*line)


def fit(run: Run) -> None:
    """Train until all epochs are done or `stop` says so; the checkpoint on disk is current when this returns."""
    while not run.finished:
        complete = train_epoch(run)
        evaluation = test(run) if complete else None
        if evaluation is None:
            save(run)
            return
        record(run, evaluation)
        save(run)


def train_epoch(run: Run) -> bool:
    """Train from the run's position to the end of its epoch; False if `stop` ended it early."""
    recipe, position = run.recipe, run.position
    run.model.train()
    run.epoch_began, run.steps_this_epoch = time.monotonic(), 0
    batches = run.data.train_batches(
        seed=recipe.seed,
        epoch=position.epoch,
        batch_size=recipe.batch_size,
        device=run.device,
        start=position.step,
    )
    for inputs, labels in batches:
        set_rates(run.optimizer, run.rate_factor(run.steps_done))
        torch.manual_seed(draw_key(recipe.seed, "step", position.epoch, position.step))
        take_step(run, inputs, labels)
        if run.stop():
            break
    settle(run)
    return position.step == run.steps and not run.stop()


def take_step(run: Run, inputs: Tensor, labels: Tensor) -> None:
    """Forward, check, backward, update."""
    with run.autocast():
        logits = run.model(inputs).float()
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=run.recipe.label_smoothing)
    run.pending.append((loss.detach(), (logits.detach().argmax(1) == labels).sum()))
    run.position.step += 1
    run.steps_taken += 1
    run.steps_this_epoch += 1
    if run.device.type == "cpu" or len(run.pending) >= GPU_STEPS_PER_CHECK:
        settle(run, inputs)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()


def settle(run: Run, inputs: Tensor | None = None) -> None:
    """Fetch the losses that are still on the device, check them, add them up and report."""
    if not run.pending:
        return
    losses = torch.stack([loss for loss, _ in run.pending]).tolist()
    first = run.position.step - len(losses) + 1
    for step, loss in enumerate(losses, start=first):
        if not math.isfinite(loss):
            raise diverged(run, f"the loss is {loss}", step, inputs)
    run.position.loss_sum += math.fsum(losses) * run.recipe.batch_size
    run.position.correct += int(torch.stack([correct for _, correct in run.pending]).sum())
    run.pending.clear()
    report(run)


def report(run: Run) -> None:
    """Tell the screen how far the run is."""
    position, images = run.position, run.position.step * run.recipe.batch_size
    elapsed = time.monotonic() - run.epoch_began
    run.images_per_second = run.steps_this_epoch * run.recipe.batch_size / max(elapsed, 1e-9)
    per_step = (time.monotonic() - run.began) / run.steps_taken
    run.screen.step(
        StepReport(
            epoch=position.epoch + 1,
            epochs=run.recipe.epochs,
            step=position.step,
            steps=run.steps,
            loss=position.loss_sum / images,
            accuracy=position.correct / images,
            images_per_second=run.images_per_second,
            seconds_left=per_step * (run.recipe.epochs * run.steps - run.steps_done),
        )
    )


def diverged(run: Run, what: str, step: int, inputs: Tensor | None) -> DivergedError:
    """The error for numbers that are not finite: what, where, and what to do."""
    where = f"in epoch {run.position.epoch + 1}, step {step} of {run.steps}"
    place = first_non_finite(run.model, inputs) if inputs is not None and all_finite(run.model) else None
    at = f", first in connection {place}" if place else ""
    return DivergedError(
        f"{what} {where}{at}, at learning rate {run.optimizer.param_groups[0]['lr']:.3g}. The last good checkpoint is "
        f"{run.folder.checkpoint}. Try a lower --lr, a longer --warmup or another --scheme"
    )


def test(run: Run) -> Evaluation | None:
    """Evaluate on the test images; None if `stop` ended it early."""
    batches = run.data.test_batches(batch_size=run.recipe.batch_size, device=run.device)
    classes = len(run.data.classes)
    return evaluate(run.model, batches, classes=classes, autocast=run.autocast, stop=run.stop)


def record(run: Run, evaluation: Evaluation) -> None:
    """Enter a complete epoch into the metrics, keep its weights if they are the best, and move on to the next."""
    position, images = run.position, run.steps * run.recipe.batch_size
    run.evaluation = evaluation
    last_rate = run.recipe.peak_lr * run.rate_factor(run.steps_done - 1)
    position.epoch, position.step = position.epoch + 1, 0
    if evaluation.accuracy > position.best_accuracy:
        position.best_accuracy, position.best_epoch = evaluation.accuracy, position.epoch
        write_weights(run, run.folder.best)
    row = {
        "epoch": position.epoch,
        "step": run.steps_done,
        "lr": last_rate,
        "train_loss": position.loss_sum / images,
        "train_accuracy": position.correct / images,
        "test_loss": evaluation.loss if math.isfinite(evaluation.loss) else None,
        "test_accuracy": evaluation.accuracy,
        "images_per_second": round(run.images_per_second, 1),
        "seconds": round(run.seconds, 3),
    }
    run.folder.append_metrics(row)
    run.screen.epoch(row, run.recipe.epochs)
    position.loss_sum, position.correct = 0.0, 0


def save(run: Run) -> None:
    """Write the checkpoint, unless its weights are not finite: then the last good one stays."""
    if not all_finite(run.model):
        raise diverged(run, "a weight is not finite", run.position.step, None)
    run.position.seconds = run.seconds
    save_checkpoint(run.folder.checkpoint, run.model, run.optimizer, {"position": asdict(run.position)})


def write_weights(run: Run, path: Path) -> None:
    """Write the weights alone, with what is needed to use them in the header."""
    about = {"model": model_of(run), "preprocessing": preprocessing_of(run), "epoch": run.position.epoch}
    write_tensors(path, run.model.state_dict(), about)


def conclude(run: Run) -> Outcome:
    """Write the last weights and the summary."""
    evaluation = run.evaluation
    if run.finished and evaluation is None:
        evaluation = test(run)
    write_weights(run, run.folder.last)
    position = run.position
    outcome = Outcome(
        finished=run.finished,
        folder=run.folder,
        recipe=run.recipe,
        classes=run.data.classes,
        evaluation=evaluation if run.finished else None,
        best_accuracy=position.best_accuracy,
        best_epoch=position.best_epoch,
        epoch=position.epoch,
        step=position.step,
        seconds=run.seconds,
    )
    if outcome.evaluation is not None:
        write_json(run.folder.summary, summary_of(outcome, outcome.evaluation))
    return outcome


def summary_of(outcome: Outcome, evaluation: Evaluation) -> dict[str, Any]:
    """What `summary.json` holds."""
    confusion = evaluation.confusion.tolist() if len(outcome.classes) <= MOST_CLASSES_IN_CONFUSION else None
    return {
        "test_accuracy": evaluation.accuracy,
        "test_correct": evaluation.correct,
        "test_images": evaluation.total,
        "best_test_accuracy": outcome.best_accuracy,
        "best_epoch": outcome.best_epoch,
        "epochs": outcome.epoch,
        "seconds": round(outcome.seconds, 3),
        "confusion": confusion,
    }
