"""A trained language model in use: continue a text, measure it on its own test text or on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat, starmap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipway.checkpoint.files import read_json
from skipway.data.sources.splits import SPLITS, Split
from skipway.data.text import TextChoices, TextData, Tokenizer, load_text
from skipway.data.text.loader import short_text_remarks
from skipway.data.text.tokenizer_file import FILE, WAY_OUT
from skipway.errors import CheckpointError, DataError, MissingExtraError, SkipwayError, counted, printable, spell
from skipway.hardware.device import choose_device
from skipway.inference.decoder_folder import find_decoder_folder
from skipway.inference.generate import generate
from skipway.inference.predict import from_pretrained
from skipway.inference.run_evaluation import autocast_for
from skipway.inference.text_evaluation import TextEvaluation, evaluate_text
from skipway.inference.text_inputs import TextInputs
from skipway.recipe import Recipe, ResolvedRecipe
from skipway.weights.hub import local_path
from skipway.weights.stored_config import CONFIG

__all__ = ["TextRunEvaluation", "decode_continuation", "evaluate_text_run", "generate_text", "with_test"]

# sequences of a forward pass
BATCH = 16
UNTESTED = (
    "no text is left to test on: the result is that of the validation text, which also chooses the weights, so it is a "
    "little too good"
)


@dataclass(frozen=True)
class TextRunEvaluation:
    """The evaluation of a trained language model on a text.

    Args:
        name: of the text.
        evaluation: the result.
        remarks: what a user may not expect of the text.
    """

    name: str
    evaluation: TextEvaluation
    remarks: tuple[str, ...] = ()


def load_text_model(path: str | Path, device: str) -> tuple[nn.Module, TextInputs]:
    """A language model with what it has to be given.

    Raises:
        CheckpointError: the weights cannot be used, or no tokenizer lies beside those of others.
        MissingExtraError: there is one, and the library that reads it is not installed.
        SkipwayError: the weights are those of another kind of network.
    """
    model = from_pretrained(path)
    inputs = getattr(model, "text", None)
    if not isinstance(inputs, TextInputs):
        folder = find_decoder_folder(path)
        if folder is not None and (folder / FILE).is_file():
            raise MissingExtraError("tokenizers", "tokenizers", f"the tokenizer of {printable(folder)}")
        if folder is not None:
            raise CheckpointError(f"{printable(folder)} is a language model without {FILE}; {WAY_OUT}")
        raise SkipwayError(f"{printable(str(path))} classifies images: skipway predict RUN IMAGES… uses it")
    return model.to(choose_device(device)), inputs


def generate_text(path: str | Path, prompt: str, length: int = 200, *, device: str = "auto", **sampling: Any) -> str:
    """Continue a prompt with the language model of a run.

    Args:
        path: see `from_pretrained`.
        prompt: the beginning; without one the model begins a document, if its tokenizer separates documents.
        length: tokens to add.
        device: auto, cpu, cuda, cuda:1.
        sampling: temperature, top_k, top_p and seed, see `generate`.

    Returns:
        the text behind the prompt.

    Raises:
        CheckpointError: the weights cannot be used.
        DataError: the tokenizer cannot represent the prompt.
        SkipwayError: an empty prompt, or a value outside its rule.
    """
    model, inputs = load_text_model(path, device)
    ids, separator = inputs.encode(prompt), inputs.tokenizer.separator
    given = ids[0].tolist()
    if not ids.shape[1] and separator is None:
        raise SkipwayError("the prompt is empty, and the tokenizer has no token that begins a document; give some text")
    if not ids.shape[1]:
        ids = torch.tensor([[separator]])
    grown = generate(model, ids.to(next(model.parameters()).device), length, tokens=inputs.tokenizer.size, **sampling)
    return decode_continuation(inputs.tokenizer, given, grown[0, ids.shape[1] :].tolist())


def decode_continuation(tokenizer: Tokenizer, given: Sequence[int], added: Sequence[int]) -> str:
    """The text that tokens add to given ones: the decoders of some tokenizers drop the space of the first token."""
    before, whole = tokenizer.decode(given), tokenizer.decode([*given, *added])
    # a letter may be divided between the last given token and the first added one
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(added)


def evaluate_text_run(
    path: str | Path,
    data: Path | None = None,
    *,
    column: str | None = None,
    outside: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
) -> TextRunEvaluation:
    """Evaluate a language model on the test text of its run, in the precision of its training, or on another text: on
    its test split, else its validation split, else all of it.

    Args:
        path: the run folder, whose best weights by validation are evaluated, or a file of weights in it.
        data: a file or folder of text, read as the text of the run was; its tokens are those of the model.
        column: of a table in `data`, that holds the text; None: that of the run, else by content.
        outside: follow links that lead out of `data`.
        device: auto, cpu, cuda, cuda:1.
        batch_size: sequences per forward pass; None for 16.

    Raises:
        CheckpointError: there is no run, or its weights cannot be used.
        DataError: the text has changed since the run, or cannot be read.
    """
    model, inputs = load_text_model(path, device)
    precision, remarks = "float32", list[str]()
    if data is None:
        text, precision = stored_text(path, inputs)
        remarks = [each for each in text.remarks if each == UNTESTED]
    else:
        text, remarks = other_text(path, inputs, data, column, outside)
    split: Split = "test" if text.test.targets else "validation" if text.validation.targets else "train"
    part, where = getattr(text, split), next(model.parameters()).device
    batches = text.evaluation_batches(split, batch_size or BATCH)
    found = evaluate_text(
        model,
        ((ids.to(where), targets.to(where)) for ids, targets in batches),
        scored_bytes=part.scored_bytes,
        autocast=lambda: autocast_for(precision, where),
    )
    assert found is not None
    if data is not None and (others := sum(len(getattr(text, each)) for each in SPLITS if each != split)):
        remarks.append(f"the {split} split is evaluated, not the {counted(others, 'token')} of other splits")
    remarks += short_text_remarks(part, text.context, "the text" if split == "train" else f"the {split} text")
    name = text.name if split == "train" else f"{text.name}, {split} split"
    return TextRunEvaluation(name, found, tuple(remarks))


def other_text(
    path: str | Path, inputs: TextInputs, data: Path, column: str | None, outside: bool
) -> tuple[TextData, list[str]]:
    """A text that is not the one of the run, with the column and divider of that one, and remarks. How letters are
    encoded is a matter of each file.
    """
    recipe = stored_recipe(path)
    chosen = {} if recipe is None else recipe.text_choices()
    names = ("column", "divider") if column is None else ("divider",)
    own = {name: chosen[name] for name in names if chosen.get(name) is not None}
    text = load_text(
        data,
        trains=False,
        tokenizer=inputs.tokenizer,
        context=inputs.context,
        holdout=0.0,
        validation=0.0,
        outside=outside,
        **{"column": column, **own},
    )
    idle = {name: f"{spell(name, value)} has no effect" for name, value in own.items()}
    remarks = [each for each in text.remarks if not each.startswith(tuple(idle.values()))]
    used = {
        name: value for name, value in own.items() if not any(map(str.startswith, text.remarks, repeat(idle[name])))
    }
    if used:
        remarks.insert(0, f"read as the text of the run was: {', '.join(starmap(spell, used.items()))}")
    return text, remarks


def with_test(data: TextData) -> TextData:
    """The data, tested on the validation text where no text is held out for a test, with a remark."""
    if data.test.targets or not data.validation.targets:
        return data
    return dataclasses.replace(data, test=data.validation, remarks=(*data.remarks, UNTESTED))


def stored_text(path: str | Path, inputs: TextInputs) -> tuple[TextData, str]:
    """The text of a run, split as in training, and the precision of the run."""
    file = config_file(path)
    stored, recipe = read_json(file), stored_recipe(path)
    if recipe is None:
        raise CheckpointError(f"{printable(file)} contains no recipe, so its test text is unknown; give a text")
    recipe = ResolvedRecipe.of(recipe)
    source = None if recipe.data is None else str(recipe.data)
    choices = TextChoices(source=source, **recipe.text_choices())
    text = with_test(load_text(dataclasses.replace(choices, tokenizer=inputs.tokenizer)))
    fingerprint = stored["data"].get("fingerprint") if isinstance(stored.get("data"), dict) else None
    if text.fingerprint != fingerprint:
        raise DataError(
            f"the text {printable(text.name)} has changed since the run, so which part of it was not trained on is not "
            "known; give a text to test on"
        )
    return text, recipe.precision


def config_file(path: str | Path) -> Path:
    """The file beside the weights that a run describes itself in."""
    path = local_path(path, (CONFIG,))
    return (path if path.is_dir() else path.parent) / CONFIG


def stored_recipe(path: str | Path) -> Recipe | None:
    """The recipe of a run; None where nothing beside the weights holds one, as in a hub folder.

    Raises:
        CheckpointError: it is damaged.
    """
    file = config_file(path)
    stored = read_json(file) if file.is_file() else None
    if not isinstance(stored, dict) or not isinstance(stored.get("recipe"), dict):
        return None
    return Recipe.from_json(stored["recipe"], printable(file))
