"""Contenders: a library, a mode of running it, a precision, for inference or training.

Modes are the rows of `MODES`. Peers run in every mode that torch offers, and again with our process-wide switches. The
latter are listed separately: a gain by our switches is to the credit neither of the peer nor of our kernels. So are
peers in OpenVINO and ONNX Runtime: a gain by the engine is not ours either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.race.architectures import PEERS, config_of, make_model
from benchmarks.race.devices import DEVICES
from benchmarks.race.engines import logits_of
from benchmarks.race.modes import MODES, OURS, Call, Mode, run_accelerated, switches
from benchmarks.race.pieces import PEER
from skipway.inference.backends import PRECISIONS, Choice

__all__ = [
    "ANY",
    "Contender",
    "ReadyContender",
    "TrainingWork",
    "Workload",
    "contenders",
    "prepare",
]


ANY = "any"
"""The precision of a workload in which each contender may have its own."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One piece of work, the same for all contenders.

    Args:
        network: see `benchmarks.race.architectures.config_of`.
        what: "infer" or "train".
        precision: "float32", "bfloat16", or "any": each contender in the precisions in which it keeps its accuracy.
        batch: images at a time.
        size: their side, in pixels.
        device: one of `benchmarks.race.devices.DEVICES`.

    >>> print(Workload(network="vit@8", what="train", precision="bfloat16", batch=2, size=32, device="cuda"))
    train vit@8 bfloat16 2x32 on cuda
    """

    network: str
    what: str
    precision: str
    batch: int
    size: int
    device: str = "cpu"

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.what} {self.network} {self.precision} {self.batch}x{self.size}{where}"

    def images(self) -> Tensor:
        """Return random images, the same in each process."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(self.device)

    def labels(self) -> Tensor:
        """Return random classes."""
        classes = config_of(self.network, self.size).classes
        return torch.randint(classes, (self.batch,), generator=torch.Generator().manual_seed(1)).to(self.device)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A library in one mode and precision.

    Args:
        library: one of `benchmarks.race.architectures.LIBRARIES`.
        mode: one of `MODES`.
        what: "infer" or "train".
        precision: "float32", "bfloat16" or "int8".
        switched: with our process-wide switches.
        named: its name has the precision, since others of the race have another one.

    >>> print(Contender(library="timm", mode="compiled", what="infer", precision="float32", switched=True))
    timm compiled + switches
    """

    library: str
    mode: str
    what: str
    precision: str
    switched: bool = False
    named: bool = False

    def __str__(self) -> str:
        precision = f" {self.precision}" if self.named else ""
        return f"{self.library} {self.mode}{precision}{' + switches' if self.switched else ''}"

    @property
    def side(self) -> str:
        """ "ours", "peer", "switched": a peer under our switches, or "engine": a peer in what is not torch."""
        if self.library == OURS:
            return "ours"
        return "switched" if self.switched else "engine" if MODES[self.mode].engine else "peer"

    def prepare(self, workload: Workload, known: Choice | None = None) -> ReadyContender:
        """Build and compile the network and run it once, timing each.

        Args:
            workload: network, batch and size.
            known: pieces and streams of an earlier search; by default they are searched for.

        Raises:
            Exception: whatever the library, the compiler or the backend raises.
        """
        mode, finish = MODES[self.mode], DEVICES[workload.device].finish
        import_library(self.library, workload.network, workload.size)
        torch.manual_seed(0)
        begun = time.perf_counter()
        model = make_model(self.library, workload.network, workload.size)
        built = time.perf_counter()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        run = RUNS[self.what](self, mode, model.to(workload.device), workload, known)
        run()
        finish()
        now = time.perf_counter()
        return ReadyContender(
            run,
            self.within(workload.device),
            parameters,
            build_seconds=built - begun,
            prepare_seconds=now - built,
            choice=getattr(run.forward, "choice", None),
            tried=count_tried(run.forward),
        )

    def within(self, device: str) -> Callable[[], AbstractContextManager[Any]]:
        """Return the context of its timings; the switches exist on a CPU only."""
        if not self.switched or device != "cpu":
            return nullcontext
        # a setting that on some machines gives up precision is the peers' alone
        return partial(switches, routed=self.precision == "float32" and self.library != OURS)


@dataclass(frozen=True)
class ReadyContender:
    """A contender that can run.

    Args:
        run: does the work once.
        within: context of its timings.
        parameters: number of the network's parameters.
        build_seconds: time to build the network.
        prepare_seconds: time to compile it and for the first call.
        choice: pieces and streams, where it was searched for the best ones.
        tried: how many were; 0 where an earlier search had decided.
    """

    run: Callable[[], object]
    within: Callable[[], AbstractContextManager[Any]]
    parameters: int
    build_seconds: float
    prepare_seconds: float
    choice: Choice | None = None
    tried: int = 0

    def row(self) -> dict[str, Any]:
        """What is written about the preparation."""
        chosen = None if self.choice is None else asdict(self.choice)
        how = "" if self.choice is None else str(self.choice).removeprefix(f"{PEER} ")
        times = {"build_seconds": self.build_seconds, "prepare_seconds": self.prepare_seconds}
        return {"parameters": self.parameters, "how": how, "choice": chosen, "tried": self.tried, **times}


def count_tried(forward: Any) -> int:
    """How many choices a search tried."""
    report = getattr(forward, "report", None)
    if report is not None:
        return sum(not each.note and each.choice.backend != "original" for each in report) if len(report) > 2 else 0
    return getattr(forward, "tried", 0)


def import_library(library: str, network: str, size: int) -> None:
    """Import the modules that a library builds a family with, so that they do not count as build time."""
    kind = (library, type(config_of(network, size)))
    if kind not in LOADED:
        make_model(library, network, size)
        LOADED.add(kind)


LOADED: set[tuple[str, type]] = set()


class TrainingWork:
    """A training step: forward, cross entropy, backward, SGD with momentum, under autocast in bfloat16.

    Args:
        model: network whose parameters are trained.
        forward: called instead of the model.
        images: inputs.
        labels: their classes.
        precision: "float32" or "bfloat16".

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> step = TrainingWork(model, model, torch.ones(2, 3, 2, 2), torch.tensor([0, 1]))
    >>> first, second = step().item(), step().item()
    >>> second < first
    True
    """

    def __init__(
        self, model: nn.Module, forward: Call, images: Tensor, labels: Tensor, precision: str = "float32"
    ) -> None:
        self.forward, self.images, self.labels = forward, images, labels
        self.half = precision == "bfloat16"
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        # a contender that waits for its next timing holds no gradients
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self) -> Tensor:
        """Return the loss: the forward half of the step."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.half):
            return functional.cross_entropy(logits_of(self.forward(self.images)).float(), self.labels)


class InferenceWork:
    """Inference: the logits of images, without gradients.

    Args:
        forward: called.
        images: inputs.
    """

    def __init__(self, forward: Call, images: Tensor) -> None:
        self.forward, self.images = forward, images

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return logits_of(self.forward(self.images))


def to_layout(mode: Mode, value: Any) -> Any:
    """Lay out a model or images channels-last where the mode says so."""
    return value.to(memory_format=torch.channels_last) if mode.channels_last else value


def make_inference(
    contender: Contender, mode: Mode, model: nn.Module, workload: Workload, known: Choice | None
) -> InferenceWork:
    """Prepare inference; in bfloat16 the weights are cast, which is faster than autocast."""
    dtype = torch.float32 if mode.keeps else PRECISIONS[contender.precision]
    model, images = to_layout(mode, model.eval().to(dtype)), to_layout(mode, workload.images().to(dtype))
    return InferenceWork(mode.ready(model, images, contender.precision, known), images)


def make_training(
    contender: Contender, mode: Mode, model: nn.Module, workload: Workload, known: Choice | None
) -> TrainingWork:
    """Prepare training."""
    model, images = to_layout(mode, model.train()), to_layout(mode, workload.images())
    if contender.switched and mode.patched:
        run_accelerated(model, images, contender.precision)
    forward = mode.ready(model, images, contender.precision, known)
    return TrainingWork(model, forward, images, workload.labels(), contender.precision)


RUNS: dict[str, Callable[[Contender, Mode, nn.Module, Workload, Choice | None], InferenceWork | TrainingWork]] = {
    "infer": make_inference,
    "train": make_training,
}


def contenders(
    what: str,
    precision: str,
    *,
    peers: Sequence[str] = PEERS,
    modes: Sequence[str] = tuple(MODES),
    switched: bool = True,
    device: str = "cpu",
) -> list[Contender]:
    """Return all contenders of a workload.

    Args:
        what: "infer" or "train".
        precision: "float32", "bfloat16", or "any" for each of them and "int8".
        peers: libraries to compare with ours.
        modes: names in `MODES`; those that do not fit are left out.
        switched: also include each with our switches.
        device: one of `benchmarks.race.devices.DEVICES`.

    >>> [str(each) for each in contenders("infer", "float32", peers=["timm"], modes=["eager"])]
    ['skipway eager', 'timm eager', 'skipway eager + switches', 'timm eager + switches']
    """
    unswitched = [
        Contender(library=library, mode=name, what=what, precision=kind, named=precision == ANY)
        for name, mode in MODES.items()
        for library in (OURS, *peers)
        for kind in (mode.precisions if precision == ANY else (precision,))
        if name in modes
        and what in mode.what
        and library in mode.who
        and device in mode.devices
        and kind in mode.precisions
    ]
    # in eager training the switches include our kernels, which for our library is a mode of its own, and on a GPU they
    # do nothing else; `optimize` sets its own switches
    again = [
        replace(each, switched=True)
        for each in unswitched
        if switched
        and not MODES[each.mode].keeps
        and (device == "cpu" or (what == "train" and MODES[each.mode].patched))
        and not (each.library == OURS and what == "train" and MODES[each.mode].patched)
    ]
    return [*unswitched, *again]


def prepare(
    contender: Contender, workload: Workload, known: Mapping[Contender, ReadyContender], choice: Choice | None = None
) -> ReadyContender:
    """Prepare a contender, or reuse its twin without switches where the switches change nothing in how it is prepared.

    Args:
        contender: library and mode.
        workload: network, batch and precision.
        known: contenders that are ready.
        choice: pieces and streams of an earlier search.
    """
    twin = known.get(replace(contender, switched=False))
    if contender.switched and twin is not None and not (contender.what == "train" and MODES[contender.mode].patched):
        return replace(twin, within=contender.within(workload.device), build_seconds=0.0, prepare_seconds=0.0)
    return contender.prepare(workload, choice)
