"""A network as a function of its depth, and what it is trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipway.data import load
from skipway.data.randomness import draw_key
from skipway.data.sources.columns import parse_column, parse_columns
from skipway.data.text import load_text
from skipway.depth_transfer.batches import TrainingBatches, as_training_batches, image_batches, text_batches
from skipway.errors import SkipwayError, counted, first_line, spell, spelling
from skipway.models.family import find_config, join_options, split_options
from skipway.schemes import DepthScaled, Scheme, parse_scheme
from skipway.schemes.scheme import short_spec
from skipway.surgery import rescheme
from skipway.tracing.chain import chain
from skipway.tracing.restoration import seed_generators
from skipway.zoo import LoadedModel, ModelRequest, depth_argument, load_model, source_of

__all__ = ["OWN", "Design", "Make", "based_scheme", "choose_design", "count_branches", "spec_of"]

OWN = "own"
"""The network as it is made."""
Make = Callable[..., Any]
MOST_TOKENS, SHORTEST = 2048, 16
"""Tokens of a batch, and of a window at least."""


@dataclass(frozen=True)
class Design:
    """A network by depth and scheme.

    Args:
        name: as a user types it.
        make: (depth, scheme) → the network; the scheme is None for the network's own.
        builds: whether `make` takes schemes; else they are put on by `rescheme`.
        scheme: the network's own scheme, where it is known.
    """

    name: str
    make: Callable[[int, Scheme | None], nn.Module]
    builds: bool = False
    scheme: str = ""

    def build(self, depth: int, scheme: Scheme | None, example: Any, *, seed: int, device: torch.device) -> nn.Module:
        """A fresh network in training mode, whose weights are a function of the seed."""
        seed_generators([device], draw_key(seed, "weights"))
        model = self.make(depth, scheme if self.builds else None).to(device)
        if scheme is not None and not self.builds:
            rescheme(model, example, scheme, start="scheme")
        return model.train()

    def is_own(self, scheme: Scheme | None, branches: int) -> bool:
        """Whether a scheme leaves the network of that many branches as it is made: a depth scaling at its base."""
        plain = not self.builds or self.scheme in ("", "identity()")
        return scheme is None or (plain and isinstance(scheme, DepthScaled) and scheme.base == branches)

    def code(self, scheme: Scheme | None) -> str:
        """Python that makes the network with a scheme, with `depth` and `example` to be filled in."""
        if not self.builds:
            made = f"model = {self.name.rpartition(':')[2]}(depth)"
            return (
                made if scheme is None else f'{made}\nsw.rescheme(model, example, "{spec_of(scheme)}", start="scheme")'
            )
        chosen = "" if scheme is None else f', scheme="{spec_of(scheme)}"'
        name, options = split_options(self.name)
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        return f'model = sw.build("{name}", depth=depth{given}{chosen})'


def choose_design(
    make: str | Make, batches: Any, depths: Sequence[int], *, steps: int, samples: int, columns: str | None = None
) -> tuple[Design, TrainingBatches, tuple[str, ...]]:
    """The design that a user names or makes, what it is trained on, and remarks.

    Raises:
        SkipwayError: there is no such network, or nothing to train it on.
    """
    if columns is not None and not isinstance(batches, str | Path):
        raise SkipwayError(f"{spell('columns', columns)}: the rule is batches from a file; leave it out")
    if callable(make):
        return made_design(make, batches, depths[0], steps)
    source, _ = source_of(make)
    if source.library == "skipway":
        return our_design(make, batches, depths[0], steps, samples, columns)
    if source.library is not None:
        raise SkipwayError(
            f"{make}: {source.form} has no depth to set; give a file with a function that makes the network at a "
            "depth: FILE.py:make with def make(depth): …"
        )
    return file_design(make, batches, depths[0], steps, samples, columns)


def made_design(make: Make, batches: Any, depth: int, steps: int) -> tuple[Design, TrainingBatches, tuple[str, ...]]:
    """A function of the user's that makes the network at a depth, or (network, batch)."""
    named = make.func if isinstance(make, functools.partial) else make
    name = getattr(named, "__name__", type(named).__name__)
    argument = depth_argument(make, name)

    def call(depth: int) -> tuple[nn.Module, Any]:
        try:
            made = make(**{argument: depth})
        except SkipwayError:
            raise
        except Exception as error:  # anybody's function
            raise SkipwayError(
                f"{name}({argument}={depth}) raises {type(error).__name__}: {first_line(error)}"
            ) from error
        model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module):
            raise SkipwayError(
                f"{name}({argument}={depth}) gives a {type(model).__name__}; the rule is a torch.nn.Module, or "
                "(module, batch)"
            )
        return model, batch

    given = batches
    if given is None:
        given = call(depth)[1]
    if given is None:
        raise SkipwayError(
            f"{name} gives a network without a batch; give batches=(a DataLoader, or inputs and targets)"
        )
    # a lambda has no name that says anything
    known = "network" if name == "<lambda>" else name
    return Design(known, lambda depth, scheme: call(depth)[0]), as_training_batches(given, steps), ()


def our_design(
    text: str, batches: Any, depth: int, steps: int, samples: int, columns: str | None
) -> tuple[Design, TrainingBatches, tuple[str, ...]]:
    """A family or variant of Skipway's, on digits or a text where no data are given."""
    _, config = find_config(text, depth)
    remarks: list[str] = []
    path = batches if isinstance(batches, str | Path) else None
    request = ModelRequest()
    if batches is not None and path is None:
        found = as_training_batches(batches, steps)
    elif hasattr(config, "vocab"):
        found = batches_of_text(path, config.context, config.vocab, samples, remarks, columns)
    else:
        data = load(path, crop="none", flip=False, validation=0.0, columns=parse_columns(columns))
        found = image_batches(data, samples)
        request = ModelRequest(shape=(data.channels, data.size, data.size), classes=len(data.classes))
        text = with_fitting_patches(text, config, data.size, remarks)
        if path is None:
            remarks.append("no data are given: scikit-learn's 8 × 8 digits are taken")

    def make(depth: int, scheme: Scheme | None) -> nn.Module:
        chosen = None if scheme is None else str(scheme)
        return load_model(text, replace(request, depth=depth, scheme=chosen)).model

    return Design(text, make, builds=True, scheme=str(config.scheme)), found, tuple(remarks)


def with_fitting_patches(text: str, config: Any, size: int, remarks: list[str]) -> str:
    """The name of a network whose patches fit images of a size: where they do not, a quarter of it."""
    patch = getattr(config, "patch", None)
    if patch is None or size % patch == 0:
        return text
    name, options = split_options(text)
    fitting = max(size // 4, 1) if size % 4 == 0 else 1
    remarks.append(f"patches of {fitting} × {fitting} pixels, since {patch} do not fit images of {size}")
    return join_options(name, {**options, "patch": fitting})


def file_design(
    text: str, batches: Any, depth: int, steps: int, samples: int, columns: str | None
) -> tuple[Design, TrainingBatches, tuple[str, ...]]:
    """A function of a Python file that makes the network at a depth."""
    first = load_model(text, ModelRequest(depth=depth))
    path = batches if isinstance(batches, str | Path) else None
    remarks = list(first.remarks[1:])
    if batches is None and first.batch is None:
        raise SkipwayError(
            f"{text} gives a network without a batch: let it return (model, batch) with a DataLoader or (inputs, "
            f"targets) as the batch, or give {'a text' if first.vocabulary else 'a folder of images'} as --batch"
        )
    if path is None:
        found = as_training_batches(first.batch if batches is None else batches, steps)
    elif first.vocabulary is not None:
        found = batches_of_text(path, first.shape[0], first.vocabulary, samples, remarks, columns)
    else:
        found = batches_of_images(path, first, samples, columns)
    return Design(text, lambda depth, scheme: load_model(text, ModelRequest(depth=depth)).model), found, tuple(remarks)


def batches_of_text(
    path: str | Path | None, context: int, vocabulary: int, samples: int, remarks: list[str], columns: str | None
) -> TrainingBatches:
    """Windows of bytes of a text, by default Python's standard library."""
    if vocabulary < 256:
        raise SkipwayError(
            f"{path or 'the text'}: the rule is a vocabulary of at least 256, for bytes, and the network has "
            f"{vocabulary}; give a loader of its own tokens"
        )
    length = min(context, max(SHORTEST, MOST_TOKENS // samples))
    with spelling(column="columns"):
        chosen = {"column": parse_column(columns), "holdout": 0.0, "validation": 0.0}
        data = load_text(path, tokenizer="bytes", context=length, **chosen)
    if path is None:
        remarks.append("no data are given: Python's standard library is read as text")
    if length < context:
        remarks.append(
            f"windows of {length} bytes, not the network's {context}, to keep {counted(samples, 'sample')} cheap"
        )
    return text_batches(data, samples)


def batches_of_images(path: str | Path, first: LoadedModel, samples: int, columns: str | None) -> TrainingBatches:
    """Images of a folder as a network takes them."""
    shape = first.shape
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise SkipwayError(
            f"{path}: the rule is a network that takes square images, grey or colour, and this one takes "
            f"{','.join(map(str, shape))}; let the file return (model, loader)"
        )
    chosen = {"channels": shape[0], "size": shape[1], "columns": parse_columns(columns)}
    return image_batches(load(path, crop="none", flip=False, validation=0.0, **chosen), samples)


def based_scheme(text: str, branches: int) -> Scheme | None:
    """A scheme by its spec string, None for the network's own; a depth scaling without a base is given that of the
    shallowest network, so that it leaves that network as it is and its rates hold (CompleteP).
    """
    if text == OWN:
        return None
    scheme = parse_scheme(text)
    if isinstance(scheme, DepthScaled) and scheme.how == "forward" and scheme.base is None:
        return replace(scheme, base=branches)
    return scheme


def spec_of(scheme: Scheme | None) -> str:
    """The shortest spec string of a scheme, without what is the default.

    >>> spec_of(DepthScaled(exponent=1, base=4))
    'depthscaled(exponent=1, base=4)'
    """
    return OWN if scheme is None else short_spec(scheme)


def count_branches(design: Design, depth: int, example: Any, device: torch.device) -> int:
    """The residual connections of the network at a depth; 0 where none are found."""
    return len(chain(design.build(depth, None, example, seed=0, device=device), example))
