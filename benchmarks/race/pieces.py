"""Peers in pieces: the cuts and streams that `optimize` tries for ours, by the same rule for giving up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.inference.backends import Backend, Choice
from skipway.inference.batch_pieces import build_run, find_batch_axes, piece_choices
from skipway.inference.timer import Candidate, time_candidate

__all__ = ["PEER", "Searched", "run_in_pieces", "search_choices"]

PEER = "peer"
"""Name of a backend that is no one's of ours."""
Build = Callable[[Choice], tuple[Callable[[Tensor], Any], Choice]]


@dataclass(frozen=True)
class Searched:
    """What a search found to be the fastest; called like the network.

    Args:
        call: takes a batch.
        choice: pieces and streams.
        tried: how many choices were; 0 where an earlier search had decided.
    """

    call: Callable[[Tensor], Any]
    choice: Choice
    tried: int

    def __call__(self, images: Tensor) -> Any:
        return self.call(images)


@torch.no_grad()
def search_choices(choices: Iterable[Choice], build: Build, images: Tensor, known: Choice | None = None) -> Searched:
    """Build and time choices until two in a row are slower by more than a quarter than the fastest before, as
    `optimize` does, and return the fastest.

    Args:
        choices: in the order in which they are tried.
        build: returns the function for a choice, and the choice as it came out.
        images: a batch.
        known: the choice of an earlier search; nothing else is built then.

    Raises:
        SkipwayError: none runs.

    >>> run = lambda choice: (lambda images: images, choice)
    >>> search_choices([Choice(PEER)], run, torch.ones(2)).tried
    1
    """
    if known is not None:
        return Searched(*build(known), 0)
    best: Searched | None = None
    least, misses, tried, why = math.inf, 0, 0, "there are none"
    for choice in choices:
        tried += 1
        try:
            call, found = build(choice)
        except Exception as error:  # libraries raise errors of their own
            why = f"{type(error).__name__}: {error}"
            continue
        timing = time_candidate(Candidate(str(choice), partial(call, images)), 0, time.perf_counter)
        why = timing.error or why
        misses = 0 if timing.seconds < 1.25 * least else misses + 1
        if timing.seconds < least:
            best, least = Searched(call, found, tried), timing.seconds
        if misses == 2:
            break
    if best is None:
        raise SkipwayError(f"no pieces of {len(images)} images run: {why}")
    return Searched(best.call, best.choice, tried)


def run_in_pieces(
    ready: Callable[..., Callable[[Tensor], Any]],
    model: nn.Module,
    images: Tensor,
    precision: str,
    known: Choice | None = None,
) -> Searched:
    """A peer in the pieces and streams that suit it best; each stream has its share of the threads."""
    backend, axes = Backend(lambda model, piece, choice: ready(model, piece, precision)), find_batch_axes(model, images)
    choices = piece_choices(Choice(PEER, precision), len(images), torch.get_num_threads())

    def build(choice: Choice) -> tuple[Callable[[Tensor], Any], Choice]:
        return build_run(backend, model, images, choice, axes), choice

    return search_choices(choices, build, images, known)
