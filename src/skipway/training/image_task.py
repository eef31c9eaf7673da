"""`ImageClassification`: images in, classes out, chosen and measured by accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.data import Batch, Data, load
from skipway.data.data_config import WeightsDescription
from skipway.data.randomness import permutation
from skipway.data.source_reader import SourceSummary
from skipway.data.split import name_list
from skipway.errors import CheckpointError, DataError, SkipwayError, counted, first_line, printable
from skipway.inference.evaluation import Evaluation, evaluate, wilson_interval
from skipway.inference.network import add_hidden_layer, build_classifier, is_ours
from skipway.inference.published_weights import is_pretrained
from skipway.models import find_config
from skipway.recipe import NO_PATIENCE, WHITENED, Recipe, ResolvedRecipe
from skipway.report.run import write_report
from skipway.report.run.predictions import PredictionLog
from skipway.report.summary import accuracy_text, chance_remark, chosen_text, data_lines, mistakes_text
from skipway.tracing import preserved_state
from skipway.training.defaults import decide
from skipway.training.distributed import Ranks
from skipway.training.image_features import FeatureRecorder, report_findings
from skipway.training.initial_weights import load_initial_weights, resolve_paths
from skipway.training.remarks import image_remarks, option_remarks
from skipway.training.reporter import Reporter
from skipway.training.run import Outcome, Progress, Run, growing_side
from skipway.training.task import Line, Split, Task, TestLog, shape_options
from skipway.training.whitened_start import PATCHED_IMAGES, whiten_

__all__ = ["ImageClassification"]

# the confusion matrix of more classes would be most of the summary
MAX_CONFUSION_CLASSES = 100
# copies of a batch: decoded in advance (uint8), augmented and normalised (float32)
DECODED_BATCHES, FLOAT_BATCHES = 3, 3


class ImageLog(TestLog):
    """Predictions for the test images, and the features that the classifier saw of them.

    Args:
        run: has its best weights.
    """

    def __init__(self, run: Run) -> None:
        self.predictions = PredictionLog()
        self.recorder = FeatureRecorder(run)

    def recording(self) -> AbstractContextManager[object]:
        return self.recorder.recording()

    def add(self, batch: Batch, outputs: Tensor) -> None:
        self.predictions.add(batch, outputs)


class ImageClassification(Task):
    """Images in, classes out: cross-entropy, and the epoch of the best accuracy on the validation images."""

    kind = item = unit = "image"
    default_data = "digits"
    side_field = "size"

    def load(
        self,
        recipe: Recipe,
        reporter: Reporter,
        ranks: Ranks,
        device: torch.device,
        listed: Mapping[str, Sequence[str]] | None = None,
        *,
        fresh: bool = True,
    ) -> tuple[Recipe, Data]:
        chosen = recipe

        def choose(summary: SourceSummary) -> Mapping[str, Any]:
            nonlocal chosen
            if fresh:
                reporter.activity("weights")
                chosen = decide(recipe, summary, device, ranks.world, reporter.message)
            return chosen.data_choices()

        data = load(
            recipe.data,
            **recipe.data_choices(),
            listed=listed,
            decide=choose,
            progress=partial(reporter.activity, "reading"),
            remark=partial(reporter.message, "note"),
        )
        return chosen, replace(data, preprocessing=replace(data.preprocessing, flip_test=chosen.flip_test))

    def resolve(self, given: Recipe, data: Data, precision: Any, world: int) -> ResolvedRecipe:
        recipe = ResolvedRecipe.of(resolve_paths(given))
        most = len(data.train) // (world * recipe.accumulate) * world * recipe.accumulate
        if most == 0:
            processes = counted(world, "process", "processes")
            raise DataError(
                f"{counted(len(data.train), 'training image')} for {processes} x accumulate={recipe.accumulate}, the "
                "rule is one each; reduce either"
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
            grey16=data.preprocessing.grey16,
            fit=data.preprocessing.fit,
            crop_share=data.preprocessing.crop_share,
            resample=data.preprocessing.resample,
            mean=Recipe.text_of(data.mean),
            std=Recipe.text_of(data.std),
            model=recipe.model or ("resnet20" if data.size <= 64 else "resnet50"),
            lr=recipe.peak_lr,
            weight_decay=recipe.decay,
            precision=precision,
        )

    def count(self, data: Data, split: Split) -> int:
        return len(getattr(data, split))

    def steps(self, data: Data, batch_size: int) -> int:
        return data.steps(batch_size)

    def describe_inputs(self, data: Data) -> dict[str, Any]:
        return {"preprocessing": data.preprocessing.to_json()}

    def describe_data(self, data: Data) -> dict[str, Any]:
        return {
            "fingerprint": data.fingerprint,
            **count_images(data),
            "unreadable": [list(entry) for entry in data.unreadable],
            "left_out": dict(data.splits.left_out.counts),
        }

    def split_files(self, data: Data) -> dict[str, Any] | None:
        if not data.splits.split_off:
            return None
        return {"split_off": dict(data.splits.split_off), "fold": data.splits.fold, **data.listed}

    def check_unchanged(self, run: Run, stored: dict[str, Any]) -> None:
        data: Data = run.data
        classes = tuple(stored["preprocessing"]["classes"])
        if classes != data.classes:
            lost, new = set(classes) - set(data.classes), set(data.classes) - set(classes)
            raise CheckpointError(
                f"the classes have changed since the run began: gone {sorted(lost)}, new {sorted(new)}"
            )
        counts = count_images(data)
        found = {"fingerprint": data.fingerprint, **counts}
        if {name: stored["data"][name] for name in found} != found:
            was, now = sum(stored["data"][split] for split in counts), sum(counts.values())
            raise DataError(
                f"the files have changed since the run began: {counted(was, 'image')} then, {now:,} "
                f"now{describe_file_changes(run)}; start a new run"
            )

    def limit_validation(self, data: Data, count: int, seed: int) -> Data:
        numbers = permutation(len(data.validation), seed, -1)[:count].sort().values
        return replace(data, validation=data.validation.subset(numbers))

    def network_options(self, recipe: Recipe, data: Data) -> dict[str, Any]:
        """The options of `build_classifier` besides the name: those of `skipway.build` for a network of ours, with the
        image size for families whose weights depend on it.
        """
        if not is_ours(str(recipe.model)):
            shape = {"classes": len(data.classes), "channels": data.channels, "image": data.size}
            return shape if recipe.scheme is None else {**shape, "scheme": recipe.scheme}
        _, config = find_config(str(recipe.model), recipe.depth)
        image = {"image": data.size} if hasattr(config, "image") else {}
        return {**shape_options(recipe, config), **image, "classes": len(data.classes), "channels": data.channels}

    def build_network(
        self, recipe: ResolvedRecipe, data: Data, report: Callable[[str, str], None], *, fresh: bool
    ) -> tuple[nn.Module, list[Any] | None]:
        remark = partial(report, "note")
        model = build_classifier({"name": recipe.model, **self.network_options(recipe, data)}, remark=remark)
        starts = fresh and recipe.initial_weights is not None
        known = starts and not is_pretrained(recipe.start)
        head = WeightsDescription(str(recipe.start)).hidden_layer if known else None
        if head is not None:
            add_hidden_layer(model, *head)
        if starts:
            report("weights", load_initial_weights(model, recipe, data.classes, self.example(data), remark))
        if fresh and recipe.start == WHITENED:
            batch = data.sample(PATCHED_IMAGES, seed=recipe.seed, device=torch.device("cpu"))
            report("weights", whiten_(model, batch.inputs))
        check_grow_from(recipe, data, model)
        return model, head

    def example(self, data: Data) -> Tensor:
        """Two black images."""
        return data.preprocessing.example.expand(2, -1, -1, -1)

    def blank(self, data: Data, count: int, side: int) -> Tensor:
        return torch.zeros(count, data.channels, side, side)

    def side(self, data: Data) -> int:
        return data.size

    def side_text(self, side: int) -> str:
        return f"{side}x{side}"

    def item_bytes(self, run: Run) -> float:
        return run.data.channels * run.data.size**2 * (DECODED_BATCHES + 4 * FLOAT_BATCHES)

    def train_batches(self, run: Run, epoch: int, start: int) -> Iterator[Batch]:
        return run.data.train_batches(
            seed=run.recipe.seed,
            epoch=epoch,
            batch_size=run.recipe.batch_size,
            device=run.device,
            start=start,
            rank=run.ranks.rank,
            world=run.ranks.world,
            size=run.side,
        )

    def sample(self, run: Run, count: int) -> Batch:
        return run.data.sample(count, seed=run.recipe.seed, device=run.device)

    def loss(self, run: Run, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy. With class weights w each image has the weight of its own class, w[y], whatever mass
        label smoothing puts on others; a mixed image, the weights of its classes in their shares. They are 1 on average
        over the training images, so the mean over a batch does not depend on how it is divided.
        """
        losses = nn.functional.cross_entropy(
            outputs.float(), targets, label_smoothing=run.recipe.label_smoothing, reduction="none"
        )
        if run.class_weights is not None:
            mixed = targets.is_floating_point()
            losses = losses * (targets @ run.class_weights if mixed else run.class_weights[targets])
        return losses.mean()

    def count_correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).sum()

    def targets_per_item(self, data: Data) -> int:
        return 1

    def item_names(self, run: Run, numbers: Tensor) -> list[str]:
        return [str(run.data.train.names[number]) for number in numbers.tolist()]

    def evaluation_batches(self, run: Run, split: Split, batch_size: int) -> Iterable[Batch]:
        return run.data.evaluation_batches(
            split, batch_size=batch_size, device=run.device, rank=run.ranks.rank, world=run.ranks.world
        )

    def evaluate(
        self,
        run: Run,
        split: Split,
        batches: Iterable[Batch],
        *,
        rounds: int,
        observe: Callable[[Batch, Tensor], None] | None = None,
    ) -> Evaluation | None:
        return evaluate(
            run.model,
            batches,
            classes=len(run.data.classes),
            autocast=run.autocast,
            stop=run.stop,
            flip=run.recipe.flip_test,
            total=run.ranks.all_reduce,
            rounds=rounds,
            filler=run.example if rounds else None,
            observe=observe,
        )

    def is_better(self, evaluation: Evaluation, progress: Progress) -> bool:
        """A higher accuracy, or the same and a lower loss.

        A few validation images give many epochs the same accuracy, of which the first is the least trained one.
        """
        if evaluation.accuracy != progress.best_accuracy:
            return evaluation.accuracy > progress.best_accuracy
        return evaluation.loss < progress.best_loss

    def header_result(self, run: Run, evaluation: Evaluation) -> dict[str, Any]:
        low, high = wilson_interval(evaluation.correct, evaluation.total)
        return {
            "test_accuracy": evaluation.accuracy,
            "test_correct": evaluation.correct,
            "test_images": evaluation.total,
            "test_interval": [low, high],
            "validation_images": len(run.data.validation),
            "validation_accuracy": run.progress.best_accuracy if len(run.data.validation) else None,
        }

    def summary(self, outcome: Outcome) -> dict[str, Any]:
        evaluation: Evaluation = outcome.evaluation
        few = len(outcome.classes) <= MAX_CONFUSION_CLASSES
        return {
            "test_accuracy": evaluation.accuracy,
            "test_loss": evaluation.loss if math.isfinite(evaluation.loss) else None,
            "test_correct": evaluation.correct,
            "test_images": evaluation.total,
            "test_interval": list(wilson_interval(evaluation.correct, evaluation.total)),
            "tested": outcome.folder.best.name,
            "best_epoch": outcome.best_epoch,
            "best_validation_accuracy": outcome.best_accuracy if outcome.validation_images else None,
            "validation_images": outcome.validation_images,
            "epochs": outcome.epoch,
            "seconds": round(outcome.seconds, 3),
            "confusion": evaluation.confusion.tolist() if few else None,
        }

    def test_log(self, run: Run) -> ImageLog:
        return ImageLog(run)

    def write_report(self, run: Run, evaluation: Evaluation, log: TestLog) -> bool:
        assert isinstance(log, ImageLog)
        findings = report_findings(run, log.recorder)
        # with several ranks, each saw only a share of the test images
        predictions = log.predictions.predictions() if run.ranks.world == 1 else None
        return write_report(run, evaluation, predictions, findings) is not None

    def data_lines(self, data: Data) -> Iterator[Line]:
        return data_lines(data)

    def remarks(self, run: Run) -> Iterator[str]:
        return option_remarks(run)

    def sample_remarks(self, run: Run, sample: Batch) -> Iterator[str]:
        return image_remarks(run.data, sample)

    def shrink(self, inputs: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
        return nn.functional.interpolate(inputs, size=(side, side), mode="bilinear", antialias=True), labels

    def chance_remark(self, run: Run, row: Mapping[str, Any]) -> str | None:
        return chance_remark(run.recipe, run.data, row)

    def headline(self, evaluation: Evaluation) -> str:
        return f"{evaluation.accuracy:.4f}"

    def result_lines(self, outcome: Outcome) -> list[Line]:
        evaluation: Evaluation = outcome.evaluation
        choice = chosen_text(outcome.validation_images, outcome.best_accuracy, outcome.best_epoch, outcome.epoch)
        return [
            ("accuracy", accuracy_text(evaluation)),
            ("chosen", choice),
            ("mistakes", mistakes_text(evaluation, outcome.classes)),
        ]

    def use_line(self, out: str) -> str:
        return f"skipway predict {out} photo.jpg"


def check_grow_from(recipe: Recipe, data: Data, model: nn.Module) -> None:
    """Raise if `grow_from` exceeds the image size, or the network does not take one of the sizes in between."""
    if recipe.grow_from is None:
        return
    if recipe.grow_from > data.size:
        raise SkipwayError(f"grow_from={recipe.grow_from}: the rule is grow_from <= size, which is {data.size}")
    # where the length is no number of epochs, as many as there are sizes
    epochs = ResolvedRecipe.of(recipe).epochs if recipe.time is None and recipe.steps is None else data.size
    for side in sorted({growing_side(recipe.grow_from, data.size, epoch / epochs) for epoch in range(epochs)}):
        try:
            with preserved_state(model), torch.no_grad():
                model.eval()(torch.zeros(1, data.channels, side, side))
        except Exception as error:  # of any kind, in a network that is not ours
            raise SkipwayError(
                f"grow_from={recipe.grow_from}: {recipe.model} does not take images of {side}x{side}, one of the sizes "
                f"between: {printable(first_line(error))}; leave it out"
            ) from error


def count_images(data: Data) -> dict[str, int]:
    """The number of images of each split."""
    return {split: len(files) for split, files in data.listed.items()}


def describe_file_changes(run: Run) -> str:
    """The new and missing files compared with the file list of the run, if it has one, for an error message."""
    listed = run.folder.read_split()
    if listed is None:
        return ""
    then, now = ({file for files in each.values() for file in files} for each in (listed, run.data.listed))
    changes = (("new", now - then), ("gone", then - now))
    return "".join(f"; {word} {name_list(sorted(files), 3)}" for word, files in changes if files)
