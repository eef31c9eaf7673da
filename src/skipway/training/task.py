"""`Task`: what a run learns, the one object that is asked wherever images and text differ.

The loop, checkpoints, recovery, the clock and everything that is written know steps, items and losses. What these are
is said by an object without a state: `ImageClassification` or `LanguageModelling`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from skipway.data import Batch
    from skipway.recipe import Kind, Recipe, ResolvedRecipe
    from skipway.training.distributed import Ranks
    from skipway.training.reporter import Reporter
    from skipway.training.run import Outcome, Progress, Run

__all__ = ["Split", "Task", "TestLog", "shape_options"]

Split = Literal["train", "validation", "test"]
Line = tuple[str, str]


def shape_options(recipe: Recipe, config: object) -> dict[str, Any]:
    """The depth, width and scheme of a recipe, as options of `skipway.build` for a family with such a config."""
    # transformers call the channels of their stream its dimension
    width = "dim" if hasattr(config, "dim") else "width"
    options = {"depth": recipe.depth, width: recipe.width, "scheme": recipe.scheme}
    return {name: value for name, value in options.items() if value is not None}


class TestLog:
    """What is kept of the test for the report of a run."""

    __test__ = False  # no test case, whatever pytest thinks of the name

    def recording(self) -> AbstractContextManager[object]:
        """Context of the test."""
        return nullcontext()

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """Take note of a batch and the network's outputs for it."""


class Task(ABC):
    """What a run learns. An item is what a batch holds; the loss is a mean over targets, one or more for each item.

    The methods that take `data` are those that a run is built with; the others are given the run.
    """

    kind: ClassVar[Kind]
    """The kind of the data, which fields of a recipe may be meant for."""
    item: ClassVar[str]
    """The word for an item: "image"."""
    unit: ClassVar[str]
    """The word for what is predicted, by which speeds are counted: "image" or "token"."""
    default_data: ClassVar[str]
    """The name of what is learned without data."""
    side_field: ClassVar[str]
    """The field of a recipe that sets how large an item is."""

    # data -------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(
        self,
        recipe: Recipe,
        reporter: Reporter,
        ranks: Ranks,
        device: torch.device,
        listed: Mapping[str, Sequence[str]] | None = None,
        *,
        fresh: bool = True,
    ) -> tuple[Recipe, Any]:
        """Load the data; rank 0 goes first and fills caches for the others.

        Args:
            listed: names of the files of each split, for a resumed run; None to split anew.
            fresh: make the choices that the recipe leaves open; False for a recipe that was stored with them.

        Returns:
            the recipe with these choices, and the data.
        """

    @abstractmethod
    def resolve(self, given: Recipe, data: Any, precision: Any, world: int) -> ResolvedRecipe:
        """The recipe with every open choice resolved from the data, except device and workers."""

    @abstractmethod
    def count(self, data: Any, split: Split) -> int:
        """Items of a split."""

    @abstractmethod
    def steps(self, data: Any, batch_size: int) -> int:
        """Optimizer steps in which all training items are seen."""

    @abstractmethod
    def describe_inputs(self, data: Any) -> dict[str, Any]:
        """What anybody who uses the network has to know about its inputs: stored with weights and in `config.json`."""

    @abstractmethod
    def describe_data(self, data: Any) -> dict[str, Any]:
        """What `config.json` says about the data: a fingerprint and the size of each split."""

    @abstractmethod
    def split_files(self, data: Any) -> dict[str, Any] | None:
        """The content of `split.json`; None where the splits follow from the recipe."""

    @abstractmethod
    def check_unchanged(self, run: Run, stored: dict[str, Any]) -> None:
        """Raise unless the data are those that a run began with.

        Raises:
            CheckpointError: the network would have other outputs.
            DataError: the data have changed.
        """

    @abstractmethod
    def limit_validation(self, data: Any, count: int, seed: int) -> Any:
        """The data with only so many validation items, always the same ones."""

    # network ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def network_options(self, recipe: Recipe, data: Any) -> dict[str, Any]:
        """What the network is built from besides its name; stored with the weights."""

    @abstractmethod
    def build_network(
        self, recipe: ResolvedRecipe, data: Any, report: Callable[[str, str], None], *, fresh: bool
    ) -> tuple[nn.Module, list[Any] | None]:
        """Build the network, with its initial weights where it is fresh; and the hidden layer that its head got."""

    @abstractmethod
    def example(self, data: Any) -> Tensor:
        """Two items, as the network takes them, that it is watched with."""

    @abstractmethod
    def blank(self, data: Any, count: int, side: int) -> Tensor:
        """So many items of zeros of this size."""

    @abstractmethod
    def side(self, data: Any) -> int:
        """How large an item is: the side of an image, the tokens of a sequence."""

    @abstractmethod
    def side_text(self, side: int) -> str:
        """The size of an item in words."""

    @abstractmethod
    def item_bytes(self, run: Run) -> float:
        """Bytes that an item takes besides what autograd keeps of the network."""

    # steps ------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def train_batches(self, run: Run, epoch: int, start: int) -> Iterator[Any]:
        """The batches of a pass over the data from one on, the share of this rank of each."""

    @abstractmethod
    def sample(self, run: Run, count: int) -> Any:
        """Up to so many training items, as they are evaluated."""

    @abstractmethod
    def loss(self, run: Run, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, which is trained on."""

    def share(self, run: Run, targets: Tensor, batch: Any) -> Tensor | float:
        """The share of a part of a batch in its mean loss."""
        return len(targets) / len(batch.targets)

    @abstractmethod
    def count_correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The number of correct predictions."""

    @abstractmethod
    def targets_per_item(self, data: Any) -> int:
        """Number of predictions for an item."""

    @abstractmethod
    def item_names(self, run: Run, numbers: Tensor) -> list[str]:
        """Names of training items, for the description of a batch that failed."""

    # evaluation -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluation_batches(self, run: Run, split: Split, batch_size: int) -> Iterable[Any]:
        """The items of a split once, in order, the share of this rank."""

    @abstractmethod
    def evaluate(
        self,
        run: Run,
        split: Split,
        batches: Iterable[Any],
        *,
        rounds: int,
        observe: Callable[[Any, Tensor], None] | None = None,
    ) -> Any:
        """Evaluate the network over the batches of a split; None if told to stop. The evaluation has `loss` and
        `accuracy`.
        """

    @abstractmethod
    def is_better(self, evaluation: Any, progress: Progress) -> bool:
        """Whether a validation result is better than the best so far."""

    def measures(self, run: Run, loss: float) -> dict[str, float]:
        """What a training loss is shown as besides, as fields of a `StepReport`."""
        return {}

    def epoch_metrics(self, run: Run, row: dict[str, Any], evaluation: Any) -> dict[str, Any]:
        """The row of an epoch with what the task adds to it."""
        return row

    @abstractmethod
    def header_result(self, run: Run, evaluation: Any) -> dict[str, Any]:
        """The test result, as it is stored with the weights."""

    @abstractmethod
    def summary(self, outcome: Outcome) -> dict[str, Any]:
        """The content of `summary.json`."""

    @abstractmethod
    def test_log(self, run: Run) -> TestLog:
        """What takes note of the test for the report; the best weights are loaded."""

    @abstractmethod
    def write_report(self, run: Run, evaluation: Any, log: TestLog) -> bool:
        """Write `report.html`; False if told to stop before."""

    # words ------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def data_lines(self, data: Any) -> Iterator[Line]:
        """The data in words, with labels."""

    @abstractmethod
    def remarks(self, run: Run) -> Iterator[str]:
        """Remarks about data and options, before the first step."""

    @abstractmethod
    def sample_remarks(self, run: Run, sample: Any) -> Iterator[str]:
        """Remarks about what some items tell, before the first step."""

    def objective(self, run: Run) -> Callable[[Any, Any], Tensor] | None:
        """The loss that a diagnosis is given; None: it knows that of these targets itself."""
        return None

    @abstractmethod
    def shrink(self, inputs: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Items of a smaller size and their labels, with which a network is judged where time is short."""

    @abstractmethod
    def chance_remark(self, run: Run, row: Mapping[str, Any]) -> str | None:
        """A sentence where the training loss of an epoch shows that nothing is learned."""

    @abstractmethod
    def headline(self, evaluation: Any) -> str:
        """The one number of an evaluation, for scripts."""

    @abstractmethod
    def result_lines(self, outcome: Outcome) -> list[Line]:
        """The test result in words, with labels."""

    @abstractmethod
    def use_line(self, out: str) -> str:
        """The command that uses a trained network."""
