"""`LanguageModelling`: tokens in, the next token out, chosen and measured by the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from skipway.data.text import IGNORED, TextData, TokenSplit, load_text
from skipway.errors import DataError, SkipwayError, counted, printable, spell, spelling
from skipway.inference.generate import generate
from skipway.inference.published_weights import is_pretrained
from skipway.inference.text_evaluation import TextEvaluation, evaluate_text
from skipway.inference.text_inputs import TextInputs
from skipway.inference.text_run import decode_continuation, with_test
from skipway.models import build, find_config
from skipway.models.family import split_options
from skipway.recipe import NO_PATIENCE, Recipe, ResolvedRecipe
from skipway.report.run.text_page import write_text_report
from skipway.report.summary import CHANCE, CHANCE_STEPS
from skipway.report.text_summary import bits_text, chosen_step_text, text_lines, unigram_entropy
from skipway.training.distributed import Ranks
from skipway.training.initial_decoder import load_initial_decoder
from skipway.training.initial_weights import resolve_paths
from skipway.training.remarks import length_remarks
from skipway.training.reporter import Reporter
from skipway.training.run import Outcome, Progress, Run
from skipway.training.task import Line, Split, Task, TestLog, shape_options
from skipway.training.text_defaults import choose_length, choose_sequences

__all__ = ["LanguageModelling", "TextBatch"]

# tokens of a sample with its prompt, the prompt's share of them, and the temperature at which it is drawn
SAMPLE_TOKENS, PROMPT_SHARE, TEMPERATURE = 256, 1 / 4, 0.8
# copies of the logits: in float32, their logarithms, and the gradient
LOGITS_BYTES, TOKEN_BYTES = 12, 24
# tokens and logits up to which an evaluation takes larger batches than training: small ones cost twice the time
EVALUATION_TOKENS, EVALUATION_LOGITS = 8192, 1 << 21
# tokens below which a validation is little more than chance
FEW_VALIDATION_TOKENS = 2_000
# passes over the text from which it is said
MANY_PASSES = 50


class TextBatch(NamedTuple):
    """Sequences with the tokens that follow.

    Args:
        inputs: int64 (B, T).
        targets: int64 (B, T); -100 where none is scored.
        labels: the targets.
        numbers: int64 (B,) on the CPU: numbers of the sequences.
        scored: targets that are scored in the whole batch, over all ranks.
    """

    inputs: Tensor
    targets: Tensor
    labels: Tensor
    numbers: Tensor
    scored: int


class LanguageModelling(Task):
    """Tokens in, the next token out: cross-entropy, and the epoch of the lowest loss on the validation text."""

    kind = "text"
    item, unit = "sequence", "token"
    default_data = "python"
    side_field = "context"

    def load(
        self,
        recipe: Recipe,
        reporter: Reporter,
        ranks: Ranks,
        device: torch.device,
        listed: Mapping[str, Sequence[str]] | None = None,
        *,
        fresh: bool = True,
    ) -> tuple[Recipe, TextData]:
        chosen = choose_sequences(recipe, device, ranks.world) if fresh else recipe
        check_decoder(chosen)
        reporter.activity("reading")
        with spelling(column="columns"):
            data = with_test(load_text(None if recipe.data is None else str(recipe.data), **chosen.text_choices()))
        return (choose_length(chosen, data, device) if fresh else chosen), data

    def resolve(self, given: Recipe, data: TextData, precision: Any, world: int) -> ResolvedRecipe:
        recipe = ResolvedRecipe.of(resolve_paths(given))
        shares = world * recipe.accumulate
        if recipe.batch_size % shares:
            processes = counted(world, "process", "processes")
            raise DataError(
                f"{spell('batch_size', recipe.batch_size)}: {processes} x accumulate={recipe.accumulate} cannot "
                "share it evenly; take a multiple"
            )
        if recipe.patience is not None and not self.count(data, "validation"):
            raise SkipwayError(NO_PATIENCE)
        if not self.count(data, "test"):
            raise DataError(
                f"no text of {printable(data.name)} is left to test on; give more, or a larger {spell('holdout', 0.2)}"
            )
        return replace(recipe, lr=recipe.peak_lr, weight_decay=recipe.decay, precision=precision)

    def count(self, data: TextData, split: Split) -> int:
        targets = getattr(data, split).targets
        return -(-targets // data.context)

    def steps(self, data: TextData, batch_size: int) -> int:
        return data.steps(batch_size)

    def describe_inputs(self, data: TextData) -> dict[str, Any]:
        return {"text": TextInputs(data.tokenizer, data.context).to_json()}

    def describe_data(self, data: TextData) -> dict[str, Any]:
        return data.describe()

    def split_files(self, data: TextData) -> None:
        return None

    def check_unchanged(self, run: Run, stored: dict[str, Any]) -> None:
        if stored["data"]["fingerprint"] != run.data.fingerprint:
            was, now = (
                sum(part["tokens"] for part in each["splits"].values())
                for each in (stored["data"], run.data.describe())
            )
            how = f"{was:,} tokens then, {now:,} now" if was != now else "as many tokens, but others"
            raise DataError(
                f"the text, its splits or its tokenizer have changed since the run began: {how}; start a new run"
            )

    def limit_validation(self, data: TextData, count: int, seed: int) -> TextData:
        """The first sequences; their bytes are taken in proportion, so bits per byte are an estimate."""
        part, tokens = data.validation, count * data.context + 1
        share = (tokens - 1) / part.targets
        return replace(
            data,
            validation=replace(
                part,
                tokens=part.tokens[:tokens],
                documents=np.append(part.documents[part.documents < tokens], tokens),
                bytes=round(share * part.bytes),
                scored_bytes=round(share * part.scored_bytes),
            ),
        )

    def network_options(self, recipe: Recipe, data: TextData) -> dict[str, Any]:
        _, config = find_config(str(recipe.model), recipe.depth)
        vocab = split_options(str(recipe.model))[1].get("vocab", data.tokenizer.size)  # some have rows to spare
        if vocab < data.tokenizer.size:
            raise SkipwayError(
                f"{spell('model', recipe.model)}: {data.tokenizer.size} tokens in the tokenizer; leave vocab out"
            )
        return {**shape_options(recipe, config), "vocab": vocab, "context": data.context}

    def build_network(
        self, recipe: ResolvedRecipe, data: TextData, report: Callable[[str, str], None], *, fresh: bool
    ) -> tuple[nn.Module, None]:
        model = build(str(recipe.model), **self.network_options(recipe, data))
        if fresh and recipe.initial_weights is not None:
            report("weights", load_initial_decoder(model, recipe, data, partial(report, "note")))
        return model, None

    def example(self, data: TextData) -> Tensor:
        return self.blank(data, 2, data.context)

    def blank(self, data: TextData, count: int, side: int) -> Tensor:
        return torch.zeros(count, side, dtype=torch.int64)

    def side(self, data: TextData) -> int:
        return data.context

    def side_text(self, side: int) -> str:
        return f"{side} tokens"

    def item_bytes(self, run: Run) -> float:
        return run.data.context * (TOKEN_BYTES + LOGITS_BYTES * run.data.tokenizer.size)

    def train_batches(self, run: Run, epoch: int, start: int) -> Iterator[TextBatch]:
        size, ranks = run.recipe.batch_size, run.ranks
        numbers = torch.arange(size)[ranks.rank * size // ranks.world : (ranks.rank + 1) * size // ranks.world]
        for step in range(start, run.steps_per_epoch):
            ids, targets = run.data.train_batch(epoch, step, size, seed=run.recipe.seed)
            scored = int((targets != IGNORED).sum())
            mine, wanted = (each[numbers].to(run.device, non_blocking=True) for each in (ids, targets))
            yield TextBatch(mine, wanted, wanted, numbers, scored)

    def sample(self, run: Run, count: int) -> TextBatch:
        ids, targets = (each.to(run.device) for each in run.data.train_batch(0, 0, count, seed=run.recipe.seed))
        return TextBatch(ids, targets, targets, torch.arange(count), int((targets != IGNORED).sum()))

    def loss(self, run: Run, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the targets that are scored, in nats per token."""
        flat = targets.flatten()
        total = nn.functional.cross_entropy(outputs.flatten(0, -2).float(), flat, ignore_index=IGNORED, reduction="sum")
        return total / (flat != IGNORED).sum().clamp(min=1)

    def share(self, run: Run, targets: Tensor, batch: TextBatch) -> Tensor:
        """That of the targets that are scored, so that parts and ranks have the gradient of the whole batch."""
        return (targets != IGNORED).sum() * (run.ranks.world / batch.scored)

    def count_correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Not counted in training: the loss says more, and the likeliest of many tokens costs time."""
        return labels.new_zeros(())

    def targets_per_item(self, data: TextData) -> int:
        return data.context

    def item_names(self, run: Run, numbers: Tensor) -> list[str]:
        return [f"sequence {number} of the batch" for number in numbers.tolist()]

    def evaluation_batches(self, run: Run, split: Split, batch_size: int) -> Iterator[TextBatch]:
        world = run.ranks.world
        tokens = min(EVALUATION_TOKENS, EVALUATION_LOGITS // run.data.tokenizer.size)
        batch_size = max(batch_size, tokens // run.data.context, world) // world * world
        left = self.count(run.data, split)
        for ids, targets in run.data.evaluation_batches(split, batch_size, rank=run.ranks.rank, world=world):
            done = max(0, min(len(ids), left // world))
            left -= len(ids) * world
            mine, wanted = (each.to(run.device, non_blocking=True) for each in (ids, targets))
            yield TextBatch(mine, wanted, wanted, torch.arange(done), 0)

    def evaluate(
        self,
        run: Run,
        split: Split,
        batches: Iterable[TextBatch],
        *,
        rounds: int,
        observe: Callable[[TextBatch, Tensor], None] | None = None,
    ) -> TextEvaluation | None:
        together = run.recipe.sharding != "none"  # a sharded network runs on all ranks or on none
        return evaluate_text(
            run.model,
            ((batch.inputs, batch.targets) for batch in batches),
            scored_bytes=getattr(run.data, split).scored_bytes,
            autocast=run.autocast,
            stop=(lambda: run.ranks.any(run.stop())) if together else run.stop,
            total=run.ranks.all_reduce,
        )

    def is_better(self, evaluation: TextEvaluation, progress: Progress) -> bool:
        """A lower loss."""
        return not progress.best_epoch or evaluation.loss < progress.best_loss

    def measures(self, run: Run, loss: float) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(run.data.train, loss)}

    def epoch_metrics(self, run: Run, row: dict[str, Any], evaluation: TextEvaluation | None) -> dict[str, Any]:
        """Bits per byte, and a text that the network writes, always after the same prompt."""
        bits = None if evaluation is None or not math.isfinite(evaluation.loss) else evaluation.bits_per_byte
        return {
            **{name: value for name, value in row.items() if name != "train_accuracy"},
            "train_bits_per_byte": bits_per_byte(run.data.train, row["train_loss"]),
            "validation_bits_per_byte": bits,
            **write_sample(run),
        }

    def header_result(self, run: Run, evaluation: TextEvaluation) -> dict[str, Any]:
        return test_numbers(evaluation)

    def summary(self, outcome: Outcome) -> dict[str, Any]:
        best = next((row for row in outcome.folder.read_metrics() if row["epoch"] == outcome.best_epoch), {})
        return {
            **test_numbers(outcome.evaluation),
            "tested": outcome.folder.best.name,
            "best_epoch": outcome.best_epoch,
            "best_step": best.get("step"),
            "best_validation_loss": best.get("validation_loss"),
            "best_validation_bits_per_byte": best.get("validation_bits_per_byte"),
            "epochs": outcome.epoch,
            "seconds": round(outcome.seconds, 3),
        }

    def test_log(self, run: Run) -> TestLog:
        return TestLog()

    def write_report(self, run: Run, evaluation: TextEvaluation, log: TestLog) -> bool:
        return write_text_report(run, evaluation) is not None

    def data_lines(self, data: TextData) -> Iterator[Line]:
        return text_lines(data)

    def remarks(self, run: Run) -> Iterator[str]:
        recipe, data = run.recipe, run.data
        if 0 < data.validation.targets < FEW_VALIDATION_TOKENS:
            yield (
                f"only {counted(data.validation.targets, 'token')} to validate on: the choice of the weights is little "
                "more than chance"
            )
        passes = run.progress.plan.end / run.steps_per_epoch
        if recipe.time is None and passes > MANY_PASSES:
            yield (
                f"every token is trained on {passes:,.0f} times: the loss on other texts rises before the end, and the "
                "weights of the best validation are kept"
            )
        yield from length_remarks(run.given)

    def sample_remarks(self, run: Run, sample: TextBatch) -> Iterator[str]:
        yield from ()

    def objective(self, run: Run) -> Callable[[Any, Any], Tensor]:
        return run.loss

    def shrink(self, inputs: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
        return inputs[:, :side], labels[:, :side]

    def chance_remark(self, run: Run, row: Mapping[str, Any]) -> str | None:
        chance = unigram_entropy(run.data)
        if row["step"] < CHANCE_STEPS or not row["train_loss"] >= CHANCE * chance:
            return None
        return (
            f"after {counted(row['step'], 'step')} the training loss is {row['train_loss']:.4g}, and {chance:.4g} is "
            "that of an output that is the same at every token: nothing is learned; "
            f"{spell('lr', run.recipe.peak_lr)} may be far off"
        )

    def headline(self, evaluation: TextEvaluation) -> str:
        return f"{evaluation.bits_per_byte:.4f}"

    def result_lines(self, outcome: Outcome) -> list[Line]:
        return [
            ("bits", bits_text(outcome.evaluation)),
            ("chosen", chosen_step_text(outcome.folder, outcome.best_epoch)),
        ]

    def use_line(self, out: str) -> str:
        return f'skipway generate {out} "Once upon a time"'


def check_decoder(recipe: Recipe) -> None:
    """Raise unless the network is a decoder of ours."""
    _, config = find_config(str(recipe.model), recipe.depth)
    if not hasattr(config, "vocab"):
        raise SkipwayError(
            f"{spell('model', recipe.model)}: the rule for text is a decoder: {spell('model', 'gpt-micro')}"
        )
    if is_pretrained(recipe.initial_weights):
        raise SkipwayError(
            f"{spell('start', recipe.start)}: no published weights go with {recipe.model}; give a folder that "
            f"transformers loads (GPT-2, Llama, Mistral, Qwen), or its name on the hub, {spell('start', 'hf:NAME')}"
        )


def bits_per_byte(part: TokenSplit, loss: float) -> float:
    """A mean loss of the tokens of a split in bits per byte of its text."""
    return part.bits_per_byte(loss * (part.targets - part.unknown_tokens))


def test_numbers(evaluation: TextEvaluation) -> dict[str, Any]:
    """The test result as it is stored."""
    finite = math.isfinite(evaluation.loss)
    return {
        "test_loss": evaluation.loss if finite else None,
        "test_bits_per_byte": evaluation.bits_per_byte if finite else None,
        "test_accuracy": evaluation.accuracy,
        "test_tokens": evaluation.total,
        "test_bytes": evaluation.bytes,
    }


def write_sample(run: Run) -> dict[str, str]:
    """A prompt, the beginning of the validation text, and what the network with its averaged weights makes of it."""
    data: TextData = run.data
    part = data.validation if data.validation.targets else data.train
    length = min(SAMPLE_TOKENS, data.context)
    prompt = torch.from_numpy(part.tokens[: max(1, int(PROMPT_SHARE * length))].astype(np.int64))[None].to(run.device)
    if prompt.shape[1] >= length:
        return {}
    choices: dict[str, Any] = {"temperature": TEMPERATURE, "tokens": data.tokenizer.size, "seed": run.recipe.seed}
    with nullcontext() if run.ema is None else run.ema.applied(run.model), run.autocast():
        ids = generate(run.model, prompt, length - prompt.shape[1], **choices)[0].tolist()
    given, added = ids[: prompt.shape[1]], ids[prompt.shape[1] :]
    return {"prompt": data.tokenizer.decode(given), "sample": decode_continuation(data.tokenizer, given, added)}
