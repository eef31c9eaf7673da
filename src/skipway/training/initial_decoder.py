"""The language model that a training on text starts from: a folder of transformers, or weights of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from skipway.data.text import TextData
from skipway.errors import CheckpointError, counted, printable, spell, spelling
from skipway.inference.decoder_folder import find_decoder_folder, read_text_inputs
from skipway.inference.predict import find_text_inputs
from skipway.models.family import join_options, split_options
from skipway.models.gpt.variants import gpt_name
from skipway.recipe import Recipe
from skipway.weights import load_state, read_source
from skipway.weights.decoder_config import read_decoder_config
from skipway.weights.stored_config import read_config, refuse_other_config

__all__ = ["adopt_decoder", "load_initial_decoder"]

ADAPTED = ("size", "depth", "unexpected")
"""Differences that a recipe may allow; the rows of a classifier are tokens, and tokens are not exchanged."""


def adopt_decoder(recipe: Recipe) -> Recipe:
    """The recipe with network, names and tokenizer of the folder of transformers to start from, where not chosen.

    Raises:
        CheckpointError: the family gpt cannot express the network, or the folder brings no tokenizer.
    """
    folder = None if recipe.initial_weights is None else find_decoder_folder(recipe.initial_weights)
    if folder is None:
        return recipe
    if recipe.tokenizer is None and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{printable(folder)} holds no tokenizer.json: give the one that the weights were trained with, "
            f"{spell('tokenizer', 'FILE')}"
        )
    config = read_decoder_config(read_config(folder) or {}, printable(folder))
    name, options = split_options(gpt_name(config))
    names = "huggingface" if recipe.weights_names == "skipway" else recipe.weights_names
    return replace(
        recipe,
        model=recipe.model or join_options(name, {**options, "vocab": config.vocab}),
        tokenizer=recipe.tokenizer or str(folder.resolve()),
        weights_names=names,
    )


def load_initial_decoder(model: nn.Module, recipe: Recipe, data: TextData, remark: Callable[[str], None]) -> str:
    """Load the weights to start from into a network, strictly; in words, what of them was used.

    Raises:
        CheckpointError: they do not fit, or they were trained with another tokenizer or another config.
    """
    start = str(recipe.initial_weights)
    folder = find_decoder_folder(start)
    if folder is not None:
        read_decoder_config(read_config(folder) or {}, printable(folder), remark)
    inputs = find_text_inputs(start) if folder is None else read_text_inputs(folder, data.context)
    if inputs is not None and inputs.tokenizer.to_json() != data.tokenizer.to_json():
        raise CheckpointError(
            f"{spell('start', start)}: these weights were trained with another tokenizer, {inputs.tokenizer.kind} of "
            f"{inputs.tokenizer.size:,} tokens, and this text is read by {data.tokenizer.kind} of "
            f"{data.tokenizer.size:,}; {spell('tokenizer', 'bytes')} is the same for all texts"
        )
    adapt = [choice for choice in ADAPTED if choice in (each.strip() for each in recipe.weights_adapt.split(","))]
    choices: dict[str, Any] = {"names": recipe.weights_names, "adapt": adapt, "remark": remark}
    with spelling(entry="weights_entry", names="weights_names", adapt="weights_adapt"):
        refuse_other_config(model, start, recipe.weights_names)
        report = load_state(model, read_source(start, recipe.weights_entry, remark), **choices)
    parts = [f"{counted(len(report.tensors), 'tensor')} from {printable(start)}"]
    parts += [f"{title}: {', '.join(keys)}" for title, keys in report.differences().items()]
    return "; ".join(parts)
