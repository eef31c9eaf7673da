"""Who takes part: a library, a mode of running it, a precision, and whether it infers or trains.

A mode is a row of `MODES`. Peers are run in every mode that torch offers them, and once more under our switches, which
is told apart: what a switch of ours does for a stranger is no merit of the stranger's library, nor of our kernels.
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

from benchmarks.race.architectures import PEERS, config_of, made
from benchmarks.race.devices import DEVICES
from skipway.inference.backends import BACKENDS, PRECISIONS, compile_frozen
from skipway.kernels.onednn import onednn_matmul

__all__ = ["MODES", "OURS", "Cell", "Contender", "Mode", "Prepared", "Step", "contenders", "prepared", "switches"]

OURS = "skipway"
Call = Callable[[Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work.

    Args:
        network: see `benchmarks.race.architectures.config_of`.
        what: "infer" or "train".
        precision: "float32" or "bfloat16".
        batch: images at a time.
        size: their side, in pixels.
        device: one of `benchmarks.race.devices.DEVICES`.

    >>> print(Cell(network="vit@8", what="train", precision="bfloat16", batch=2, size=32, device="cuda"))
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
        """Random images, the same in each process."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(self.device)

    def labels(self) -> Tensor:
        """Random classes."""
        classes = config_of(self.network, self.size).classes
        return torch.randint(classes, (self.batch,), generator=torch.Generator().manual_seed(1)).to(self.device)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way of running a network.

    Args:
        what: "infer", "train", or both.
        who: the libraries that are run like this.
        ready: a model, example images and a precision → what is called in the model's place.
        channels_last: the model and its images are laid out by pixels.
        keeps: the model stays in single precision, what `ready` gives takes care of the precision.
        patched: our kernels are put in where the switches are asked for and it trains; else it runs under the switches
            as it was prepared without.
        devices: that it makes sense on.
        compiles: torch's compiler has to be waited for.
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
    """One that takes part.

    Args:
        library: one of `benchmarks.race.architectures.LIBRARIES`.
        mode: one of `MODES`.
        what: "infer" or "train".
        precision: "float32" or "bfloat16".
        switched: under our switches.

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

    def prepare(self, cell: Cell) -> Prepared:
        """Build, compile, run once; seconds of each are kept.

        Raises:
            Exception: whatever the library, the compiler or the backend raises.
        """
        mode, finish = MODES[self.mode], DEVICES[cell.device].finish
        loaded(self.library, cell.network, cell.size)
        torch.manual_seed(0)
        begun = time.perf_counter()
        model = made(self.library, cell.network, cell.size)
        built = time.perf_counter()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        run = RUNS[self.what](self, mode, model.to(cell.device), cell)
        run()
        finish()
        now = time.perf_counter()
        return Prepared(
            run, self.within(cell.device), parameters, build_seconds=built - begun, prepare_seconds=now - built
        )

    def within(self, device: str) -> Callable[[], AbstractContextManager[Any]]:
        """What its turns happen in; the switches are those of a CPU."""
        if not self.switched or device != "cpu":
            return nullcontext
        # a setting that on some machines gives up precision is the peers' alone
        return partial(switches, routed=self.precision == "float32" and self.library != OURS)


@dataclass(frozen=True)
class Prepared:
    """A contender that can run.

    Args:
        run: does the work once.
        within: what its turns happen in.
        parameters: of its network.
        build_seconds: of making the network.
        prepare_seconds: of compiling it and of the first call.
    """

    run: Callable[[], object]
    within: Callable[[], AbstractContextManager[Any]]
    parameters: int
    build_seconds: float
    prepare_seconds: float


def loaded(library: str, network: str, size: int) -> None:
    """Import what a library builds a family with, so that the time of building is that alone."""
    kind = (library, type(config_of(network, size)))
    if kind not in LOADED:
        made(library, network, size)
        LOADED.add(kind)


LOADED: set[tuple[str, type]] = set()


class Step:
    """A training step: forward, cross entropy, backward, SGD with momentum, under autocast in bfloat16.

    Args:
        model: whose parameters are trained.
        forward: called in its place.
        images: with
        labels: their classes.
        precision: "float32" or "bfloat16".

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> step = Step(model, model, torch.ones(2, 3, 2, 2), torch.tensor([0, 1]))
    >>> first, second = step().item(), step().item()
    >>> second < first
    True
    """

    def __init__(
        self, model: nn.Module, forward: Call, images: Tensor, labels: Tensor, precision: str = "float32"
    ) -> None:
        self.forward, self.images, self.labels = forward, images, labels
        self.half = precision == "bfloat16"
        self.optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        # whoever waits for a turn holds no gradients
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self) -> Tensor:
        """The forward half of the step."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.half):
            return functional.cross_entropy(logits(self.forward(self.images)).float(), self.labels)


class Inference:
    """The logits of images, without gradients.

    Args:
        forward: what is called.
        images: with what.
    """

    def __init__(self, forward: Call, images: Tensor) -> None:
        self.forward, self.images = forward, images

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return logits(self.forward(self.images))


def logits(out: Any) -> Tensor:
    """What transformers wrap into an object."""
    return getattr(out, "logits", out)


def laid_out(mode: Mode, value: Any) -> Any:
    """A model or images, by pixels where the mode says so."""
    return value.to(memory_format=torch.channels_last) if mode.channels_last else value


def inference(contender: Contender, mode: Mode, model: nn.Module, cell: Cell) -> Inference:
    """The work of a contender that infers; in bfloat16 its weights are, which is faster than autocast."""
    dtype = PRECISIONS["float32" if mode.keeps else contender.precision]
    model, images = laid_out(mode, model.eval().to(dtype)), laid_out(mode, cell.images().to(dtype))
    return Inference(mode.ready(model, images, contender.precision), images)


def training(contender: Contender, mode: Mode, model: nn.Module, cell: Cell) -> Step:
    """The work of a contender that trains."""
    model, images = laid_out(mode, model.train()), laid_out(mode, cell.images())
    if contender.switched and mode.patched:
        accelerated(model, images, contender.precision)
    return Step(model, mode.ready(model, images, contender.precision), images, cell.labels(), contender.precision)


RUNS: dict[str, Callable[[Contender, Mode, nn.Module, Cell], Callable[[], Tensor]]] = {
    "infer": inference,
    "train": training,
}


def as_it_is(model: nn.Module, images: Tensor, precision: str) -> Call:
    return model


def compiled(model: nn.Module, images: Tensor, precision: str) -> Call:
    return torch.compile(model, dynamic=False)


def accelerated_compiled(model: nn.Module, images: Tensor, precision: str) -> Call:
    return compiled(accelerated(model, images, precision), images, precision)


def constant(model: nn.Module, images: Tensor, precision: str) -> Call:
    return compile_frozen(model, images)


def accelerated(model: nn.Module, images: Tensor, precision: str) -> nn.Module:
    from skipway.surgery.acceleration import accelerate

    accelerate(model, images)
    return model


def optimized(backend: str, model: nn.Module, images: Tensor, precision: str) -> Call:
    from skipway.inference.backend_selection import optimize

    return optimize(model, images, precision=precision, backends=[backend])


@contextmanager
def switches(*, routed: bool = False) -> Iterator[None]:
    """Our process-wide switches, for a while: freed memory is kept, and products in single precision go to oneDNN.

    Args:
        routed: the second, too.
    """
    from skipway.hardware.allocator import keep_memory

    with keep_memory(), onednn_matmul() if routed else nullcontext():
        yield


BOTH, INFER, TRAIN = frozenset({"infer", "train"}), frozenset({"infer"}), frozenset({"train"})
EVERYBODY, STRANGERS, SELF = frozenset({OURS, *PEERS}), frozenset(PEERS), frozenset({OURS})
CARD = frozenset({"cuda"})

MODES: dict[str, Mode] = {
    "eager": Mode(what=BOTH, who=EVERYBODY, ready=as_it_is, patched=True),
    "channels-last": Mode(what=BOTH, who=EVERYBODY, ready=as_it_is, channels_last=True, patched=True),
    "accelerate": Mode(what=TRAIN, who=SELF, ready=accelerated),
    "accelerate-channels-last": Mode(what=TRAIN, who=SELF, ready=accelerated, channels_last=True),
    **{
        f"optimize-{name}": Mode(
            what=INFER,
            who=SELF,
            ready=partial(optimized, name),
            keeps=True,
            devices=frozenset(BACKENDS[name].devices or DEVICES),
            compiles=name == "inductor",
        )
        for name in BACKENDS
    },
    "compiled": Mode(what=BOTH, who=EVERYBODY, ready=compiled, compiles=True),
    # on a CPU the compiler lays maps out by pixels of itself
    "compiled-channels-last": Mode(
        what=BOTH, who=EVERYBODY, ready=compiled, channels_last=True, devices=CARD, compiles=True
    ),
    "accelerate-compiled": Mode(what=TRAIN, who=SELF, ready=accelerated_compiled, devices=CARD, compiles=True),
    "accelerate-compiled-channels-last": Mode(
        what=TRAIN, who=SELF, ready=accelerated_compiled, channels_last=True, devices=CARD, compiles=True
    ),
    "frozen": Mode(what=INFER, who=STRANGERS, ready=constant, compiles=True),
}
"""Ways of running a network, those that are ready at once first."""


def contenders(
    what: str,
    precision: str,
    *,
    peers: Sequence[str] = PEERS,
    modes: Sequence[str] = tuple(MODES),
    switched: bool = True,
    device: str = "cpu",
) -> list[Contender]:
    """Everybody that takes part in a cell.

    Args:
        what: "infer" or "train".
        precision: "float32" or "bfloat16".
        peers: beside our library.
        modes: of those in `MODES` that fit.
        switched: each under our switches, too.
        device: one of `benchmarks.race.devices.DEVICES`.

    >>> [str(each) for each in contenders("infer", "float32", peers=["timm"], modes=["eager"])]
    ['skipway eager', 'timm eager', 'skipway eager + switches', 'timm eager + switches']
    """
    plain = [
        Contender(library=library, mode=name, what=what, precision=precision)
        for name, mode in MODES.items()
        for library in (OURS, *peers)
        if name in modes and what in mode.what and library in mode.who and device in mode.devices
    ]
    # in eager training the switches put our kernels in, which of ours is a mode of its own; on a GPU they do nothing
    # else. `optimize` has its own
    again = [
        replace(each, switched=True)
        for each in plain
        if switched
        and not MODES[each.mode].keeps
        and (device == "cpu" or (what == "train" and MODES[each.mode].patched))
        and not (each.library == OURS and what == "train" and MODES[each.mode].patched)
    ]
    return [*plain, *again]


def prepared(contender: Contender, cell: Cell, known: Mapping[Contender, Prepared]) -> Prepared:
    """Prepare a contender, or take over what runs under the switches as it does without.

    Args:
        contender: who.
        cell: for what.
        known: those that are prepared.
    """
    twin = known.get(replace(contender, switched=False))
    if contender.switched and twin is not None and not (contender.what == "train" and MODES[contender.mode].patched):
        return replace(twin, within=contender.within(cell.device), build_seconds=0.0, prepare_seconds=0.0)
    return contender.prepare(cell)
