"""Random inputs of transformers' models, by what forward takes, the sizes in the config, and what runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.tracing.example import call_model
from skipway.tracing.watch import preserved_state

__all__ = ["RandomInput", "find_inputs"]

Shape = tuple[int, ...]
TOKENS = 64
AUDIO, FRAMES = 8000, 64
SIDE = 224


@dataclass(frozen=True)
class RandomInput:
    """A keyword argument drawn at random.

    Args:
        name: of the argument.
        shape: of one sample; empty for a flag, which is True.
        vocabulary: samples are whole numbers below it; None: standard normal numbers.
    """

    name: str
    shape: Shape
    vocabulary: int | None = None

    def draw(self, count: int) -> Any:
        """The values for that many samples.

        >>> RandomInput("input_ids", (5,), 9).draw(2).shape
        torch.Size([2, 5])
        """
        if not self.shape:
            return True
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary, (count, *self.shape))
        return torch.randn(count, *self.shape)

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}" if self.shape else self.name


def find_inputs(model: nn.Module, shape: Shape | None = None) -> tuple[RandomInput, ...]:
    """The inputs with which a model of transformers runs, the one named by `main_input_name` first.

    Candidates come from the names of forward's arguments and the sizes in the config; the first that runs on two
    samples is taken. The model is left as it is.

    Args:
        model: of transformers.
        shape: of one sample of the main input; None: as the config states it.

    Raises:
        SkipwayError: none runs; says with what the last failed.
    """
    failure = SkipwayError(f"no random values are known for its argument {model.main_input_name}")
    for inputs in candidates(model, shape):
        try:
            with preserved_state(model.eval()), torch.no_grad():
                call_model(model, {each.name: each.draw(2) for each in inputs})
        except SkipwayError as error:
            failure = error
            continue
        return inputs
    raise failure


def candidates(model: Any, shape: Shape | None) -> Iterator[tuple[RandomInput, ...]]:
    """Sets of inputs, those with few arguments and with a loss of the model's own first."""
    names = list(inspect.signature(model.forward).parameters)
    main, config = model.main_input_name, model.config
    flags = [RandomInput("return_loss", ())] if "return_loss" in names else []
    others = [name for name in SHAPES if name in names and name != main]
    firsts = shapes_of(main, config) if shape is None else [replace_shape(main, config, shape)]
    for partners in ([], *([each] for each in others), others):
        for choice in product(firsts, *(shapes_of(name, config) for name in partners)):
            for targets in targets_of(names, main, config, choice[0], type(model).__name__):
                yield (*choice, *targets, *flags)
                if flags:
                    yield (*choice, *targets)


def targets_of(
    names: Sequence[str], main: str, config: Any, first: RandomInput, kind: str
) -> Iterator[tuple[RandomInput, ...]]:
    """Labels for a loss of the model's own where its outputs are tokens, inputs of a decoder, or none of both."""
    predicts = kind.endswith(("LM", "LMHeadModel", "ForConditionalGeneration"))
    text = shapes_of("decoder_input_ids", config)[:1]
    length = first.shape if main == "input_ids" else (16,)
    if predicts and "labels" in names:
        yield tuple(RandomInput("labels", length, each.vocabulary) for each in text)
    yield ()
    if "decoder_input_ids" in names:
        yield tuple(RandomInput("decoder_input_ids", length, each.vocabulary) for each in text)


def replace_shape(name: str, config: Any, shape: Shape) -> RandomInput:
    """The input of that name with another shape."""
    known = shapes_of(name, config)
    return RandomInput(name, shape, known[0].vocabulary if known else None)


def shapes_of(name: str, config: Any) -> list[RandomInput]:
    """The inputs of a name that the sizes of a config allow."""
    make = SHAPES.get(name)
    return [] if make is None else [RandomInput(name, *each) for each in make(config)]


def size_in(config: Any, *names: str) -> Any:
    """The first size of one of these names in a config, else in the configs inside it; None where there is none."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    inner = [value for value in vars(config).values() if hasattr(value, "to_diff_dict")]
    return next((size for each in inner if (size := size_in(each, *names)) is not None), None)


def token_shapes(config: Any) -> Iterator[tuple[Any, ...]]:
    vocabulary = size_in(config, "vocab_size")
    positions = size_in(config, "max_position_embeddings", "n_positions", "max_target_positions")
    if vocabulary is not None:
        yield (min(positions, TOKENS) if isinstance(positions, int) and positions > 2 else TOKENS,), vocabulary


def image_shapes(config: Any) -> Iterator[tuple[Any, ...]]:
    size, channels = size_in(config, "image_size"), size_in(config, "num_channels") or 3
    sides = tuple(size) if isinstance(size, list | tuple) else (size or SIDE,) * 2
    frames = size_in(config, "num_frames")
    if frames is not None:
        yield ((frames, channels, *sides),)
    yield ((channels, *sides),)
    yield ((channels, SIDE, SIDE),)


def waveform_shapes(config: Any) -> Iterator[tuple[Any, ...]]:
    bands = size_in(config, "num_mel_bins")
    if bands is not None:
        yield ((size_in(config, "max_length") or FRAMES, bands),)
    yield ((AUDIO,),)


def spectrum_shapes(config: Any) -> Iterator[tuple[Any, ...]]:
    bands, positions = size_in(config, "num_mel_bins"), size_in(config, "max_source_positions")
    if bands is not None and positions is not None:
        yield ((bands, 2 * positions),)
    for width in (size_in(config, "input_feat_per_channel"), size_in(config, "feature_projection_input_dim"), bands):
        if width is not None:
            yield ((FRAMES, width),)
            yield ((1, FRAMES, width),)


SHAPES: dict[str, Callable[[Any], Iterator[tuple[Any, ...]]]] = {
    "input_ids": token_shapes,
    "decoder_input_ids": token_shapes,
    "pixel_values": image_shapes,
    "input_values": waveform_shapes,
    "input_features": spectrum_shapes,
}
"""Shapes of one sample, with a vocabulary for tokens, by the name of the argument."""
