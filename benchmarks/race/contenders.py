"""Contenders: a library, a mode of running it, a precision, for inference or training.

Modes are the rows of `MODES`. Peers run in every mode that torch offers, and again with our process-wide switches. The
latter are listed separately: a gain by our switches is to the credit neither of the peer nor of our kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.race.architectures import PEERS, config_of, make_model
from benchmarks.race.devices import DEVICES
from skipway.inference.backends import BACKENDS, PRECISIONS, compile_frozen
from skipway.kernels.onednn import onednn_matmul

__all__ = [
    "MODES",
    "OURS",
    "Contender",
    "Mode",
    "ReadyContender",
    "TrainingWork",
    "Workload",
    "contenders",
    "prepare",
    "switches",
]

OURS = "skipway"
Call = Callable[[Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One piece of work, the same for all contenders.

    Args:
        network: see `benchmarks.race.architectures.config_of`.
        what: "infer" or "train".
        precision: "float32" or "bfloat16".
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
class Mode:
    """A way of running a network.

    Args:
        what: "infer", "train", or both.
        who: libraries that run in this mode.
        ready: takes a model, example images and a precision; returns the function that is called instead of the model.
        channels_last: lay out the model and its images channels-last.
        keeps: leave the model in float32; the function that `ready` returns handles the precision.
        patched: with switches, training uses our kernels; otherwise switches change nothing in how it is prepared.
        devices: supported ones.
        compiles: whether torch's compiler runs, which takes minutes.
    """

    what: frozenset[str]
    who: frozenset[str]
    ready: Callable[[nn.Module, Tensor, str], Call]
    channels_last: bool = False
    keeps: bool = False
    patched: bool = False
    devices: frozenset[str] = frozenset(DEVICES)
    compiles: bool = False


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A library in one mode and precision.

    Args:
        library: one of `benchmarks.race.architectures.LIBRARIES`.
        mode: one of `MODES`.
        what: "infer" or "train".
        precision: "float32" or "bfloat16".
        switched: with our process-wide switches.

    >>> print(Contender(library="timm", mode="compiled", what="infer", precision="float32", switched=True))
    timm compiled + switches
    """

    library: str
    mode: str
    what: str
    precision: str
    switched: bool = False

    def __str__(self) -> str:
        return f"{self.library} {self.mode}{' + switches' if self.switched else ''}"

    @property
    def side(self) -> str:
        """ "ours", "peer", or "switched": a peer under our switches."""
        return "ours" if self.library == OURS else "switched" if self.switched else "peer"

    def prepare(self, workload: Workload) -> ReadyContender:
        """Build and compile the network and run it once, timing each.

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
        run = RUNS[self.what](self, mode, model.to(workload.device), workload)
        run()
        finish()
        now = time.perf_counter()
        return ReadyContender(
            run, self.within(workload.device), parameters, build_seconds=built - begun, prepare_seconds=now - built
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
    """

    run: Callable[[], object]
    within: Callable[[], AbstractContextManager[Any]]
    parameters: int
    build_seconds: float
    prepare_seconds: float


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


def logits_of(out: Any) -> Tensor:
    """Return the logits, which transformers wraps into an object."""
    return getattr(out, "logits", out)


def to_layout(mode: Mode, value: Any) -> Any:
    """Lay out a model or images channels-last where the mode says so."""
    return value.to(memory_format=torch.channels_last) if mode.channels_last else value


def make_inference(contender: Contender, mode: Mode, model: nn.Module, workload: Workload) -> InferenceWork:
    """Prepare inference; in bfloat16 the weights are cast, which is faster than autocast."""
    dtype = PRECISIONS["float32" if mode.keeps else contender.precision]
    model, images = to_layout(mode, model.eval().to(dtype)), to_layout(mode, workload.images().to(dtype))
    return InferenceWork(mode.ready(model, images, contender.precision), images)


def make_training(contender: Contender, mode: Mode, model: nn.Module, workload: Workload) -> TrainingWork:
    """Prepare training."""
    model, images = to_layout(mode, model.train()), to_layout(mode, workload.images())
    if contender.switched and mode.patched:
        run_accelerated(model, images, contender.precision)
    return TrainingWork(
        model, mode.ready(model, images, contender.precision), images, workload.labels(), contender.precision
    )


RUNS: dict[str, Callable[[Contender, Mode, nn.Module, Workload], Callable[[], Tensor]]] = {
    "infer": make_inference,
    "train": make_training,
}


def run_eager(model: nn.Module, images: Tensor, precision: str) -> Call:
    return model


def run_compiled(model: nn.Module, images: Tensor, precision: str) -> Call:
    return torch.compile(model, dynamic=False)


def run_accelerated_compiled(model: nn.Module, images: Tensor, precision: str) -> Call:
    return run_compiled(run_accelerated(model, images, precision), images, precision)


def run_frozen(model: nn.Module, images: Tensor, precision: str) -> Call:
    return compile_frozen(model, images, precision)


def run_accelerated(model: nn.Module, images: Tensor, precision: str) -> nn.Module:
    from skipway.surgery.acceleration import accelerate

    accelerate(model, images)
    return model


def run_optimized(backend: str, model: nn.Module, images: Tensor, precision: str) -> Call:
    from skipway.inference.backend_selection import optimize

    return optimize(model, images, precision=precision, backends=[backend])


@contextmanager
def switches(*, routed: bool = False) -> Iterator[None]:
    """Turn our process-wide switches on within the context: freed memory is kept, float32 products go to oneDNN.

    Args:
        routed: also send float32 products to oneDNN.
    """
    from skipway.hardware.allocator import keep_memory

    with keep_memory(), onednn_matmul() if routed else nullcontext():
        yield


BOTH, INFER, TRAIN = frozenset({"infer", "train"}), frozenset({"infer"}), frozenset({"train"})
EVERYBODY, STRANGERS, SELF = frozenset({OURS, *PEERS}), frozenset(PEERS), frozenset({OURS})
CARD = frozenset({"cuda"})

MODES: dict[str, Mode] = {
    "eager": Mode(what=BOTH, who=EVERYBODY, ready=run_eager, patched=True),
    "channels-last": Mode(what=BOTH, who=EVERYBODY, ready=run_eager, channels_last=True, patched=True),
    "accelerate": Mode(what=TRAIN, who=SELF, ready=run_accelerated),
    "accelerate-channels-last": Mode(what=TRAIN, who=SELF, ready=run_accelerated, channels_last=True),
    **{
        f"optimize-{name}": Mode(
            what=INFER,
            who=SELF,
            ready=partial(run_optimized, name),
            keeps=True,
            devices=frozenset(BACKENDS[name].devices or DEVICES),
            compiles=name == "inductor",
        )
        for name in BACKENDS
    },
    "compiled": Mode(what=BOTH, who=EVERYBODY, ready=run_compiled, compiles=True),
    # on a CPU the compiler chooses channels-last by itself
    "compiled-channels-last": Mode(
        what=BOTH, who=EVERYBODY, ready=run_compiled, channels_last=True, devices=CARD, compiles=True
    ),
    "accelerate-compiled": Mode(what=TRAIN, who=SELF, ready=run_accelerated_compiled, devices=CARD, compiles=True),
    "accelerate-compiled-channels-last": Mode(
        what=TRAIN, who=SELF, ready=run_accelerated_compiled, channels_last=True, devices=CARD, compiles=True
    ),
    "frozen": Mode(what=INFER, who=STRANGERS, ready=run_frozen, compiles=True),
}
"""Modes of running a network, those that are ready at once first."""


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
        precision: "float32" or "bfloat16".
        peers: libraries to compare with ours.
        modes: names in `MODES`; those that do not fit are left out.
        switched: also include each with our switches.
        device: one of `benchmarks.race.devices.DEVICES`.

    >>> [str(each) for each in contenders("infer", "float32", peers=["timm"], modes=["eager"])]
    ['skipway eager', 'timm eager', 'skipway eager + switches', 'timm eager + switches']
    """
    unswitched = [
        Contender(library=library, mode=name, what=what, precision=precision)
        for name, mode in MODES.items()
        for library in (OURS, *peers)
        if name in modes and what in mode.what and library in mode.who and device in mode.devices
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


def prepare(contender: Contender, workload: Workload, known: Mapping[Contender, ReadyContender]) -> ReadyContender:
    """Prepare a contender, or reuse its twin without switches where the switches change nothing in how it is prepared.

    Args:
        contender: library and mode.
        workload: network, batch and precision.
        known: contenders that are ready.
    """
    twin = known.get(replace(contender, switched=False))
    if contender.switched and twin is not None and not (contender.what == "train" and MODES[contender.mode].patched):
        return replace(twin, within=contender.within(workload.device), build_seconds=0.0, prepare_seconds=0.0)
    return contender.prepare(workload)
