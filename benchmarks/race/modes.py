"""Modes of running a network: each peer in every way that torch, OpenVINO and ONNX Runtime offer, ours in its own.

Peers get what ours get: pieces of a batch on streams of their own are searched for with the same cuts and the same rule
for giving up, and the engines that `optimize` may choose also run the peers' networks, set up as their documentation
says for throughput.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.race.architectures import PEERS
from benchmarks.race.devices import DEVICES
from benchmarks.race.engines import (
    CALIBRATION,
    INT8,
    Logits,
    logits_of,
    run_onnxruntime,
    run_openvino,
    run_openvino_queue,
)
from benchmarks.race.pieces import run_in_pieces
from skipway.inference.backends import BACKENDS, PRECISIONS, Choice, compile_frozen
from skipway.kernels.onednn import onednn_matmul

__all__ = ["MODES", "OURS", "Call", "Mode", "run_accelerated", "switches"]

OURS = "skipway"
Call = Callable[[Tensor], Any]
Ready = Callable[[nn.Module, Tensor, str, Choice | None], Call]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way of running a network.

    Args:
        what: "infer", "train", or both.
        who: libraries that run in this mode.
        ready: takes a model, example images, a precision and the choice of an earlier search, if there was one; returns
            the function that is called instead of the model.
        channels_last: lay out the model and its images channels-last.
        keeps: leave the model in float32; the function that `ready` returns handles the precision.
        patched: with switches, training uses our kernels; otherwise switches change nothing in how it is prepared.
        devices: supported ones.
        compiles: whether torch's compiler runs, which takes minutes.
        engine: whether something else than torch computes.
        precisions: supported ones.
    """

    what: frozenset[str]
    who: frozenset[str]
    ready: Ready
    channels_last: bool = False
    keeps: bool = False
    patched: bool = False
    devices: frozenset[str] = frozenset(DEVICES)
    compiles: bool = False
    engine: bool = False
    precisions: tuple[str, ...] = ("float32", "bfloat16")


def run_eager(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Call:
    return model


def run_autocast(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Call:
    def run(x: Tensor) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return model(x)

    return run


def run_traced(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Call:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns about every Python branch, and that it is deprecated
        traced = torch.jit.trace(Logits(model), images, check_trace=False)
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))


def run_compiled(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Call:
    return torch.compile(model, dynamic=False)


def run_accelerated_compiled(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Call:
    return run_compiled(run_accelerated(model, images, precision), images, precision)


def run_frozen(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Call:
    return compile_frozen(model, images, Choice("inductor", precision))


def run_accelerated(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> nn.Module:
    from skipway.surgery.acceleration import accelerate

    accelerate(model, images)
    return model


def run_optimized(
    backends: Sequence[str] | None, model: nn.Module, images: Tensor, precision: str, known: Choice | None = None
) -> Call:
    from skipway.inference.backend_selection import BackendComparison
    from skipway.inference.optimized_model import assemble, optimize

    given: dict[str, Any] = {"precisions": precision, "backends": backends, "cache": False}
    if precision == INT8:  # what a network without training answers is not worth keeping
        trained = CALIBRATION.get()
        samples = images if trained is None else trained
        with torch.no_grad():
            answers = torch.cat([logits_of(model(batch)).argmax(1) for batch in samples.split(len(images))])
        limit = 1.0 if trained is None else 0.005
        return optimize(model, images, **given, calibration=samples, check=(samples, answers), limit=limit)
    if known is None:
        return optimize(model, images, **given)
    comparison = BackendComparison(model, images)
    comparison.add(known)
    return assemble(comparison, known)


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
            ready=partial(run_optimized, [name]),
            keeps=True,
            devices=frozenset(BACKENDS[name].devices or DEVICES),
            compiles=name == "inductor",
            precisions=(*BACKENDS[name].precisions, *([INT8] if name == "openvino" else [])),
        )
        for name in BACKENDS
    },
    "optimize": Mode(what=INFER, who=SELF, ready=partial(run_optimized, None), keeps=True, compiles=True),
    "compiled": Mode(what=BOTH, who=EVERYBODY, ready=run_compiled, compiles=True),
    # on a CPU the compiler chooses channels-last by itself
    "compiled-channels-last": Mode(
        what=BOTH, who=EVERYBODY, ready=run_compiled, channels_last=True, devices=CARD, compiles=True
    ),
    "accelerate-compiled": Mode(what=TRAIN, who=SELF, ready=run_accelerated_compiled, devices=CARD, compiles=True),
    "accelerate-compiled-channels-last": Mode(
        what=TRAIN, who=SELF, ready=run_accelerated_compiled, channels_last=True, devices=CARD, compiles=True
    ),
    "autocast": Mode(
        what=INFER, who=STRANGERS, ready=run_autocast, channels_last=True, keeps=True, precisions=("bfloat16",)
    ),
    "traced": Mode(what=INFER, who=STRANGERS, ready=run_traced, channels_last=True, compiles=True),
    "frozen": Mode(what=INFER, who=STRANGERS, ready=run_frozen, compiles=True),
    **{
        f"{name}-pieces": Mode(
            what=INFER,
            who=STRANGERS,
            ready=partial(run_in_pieces, ready),
            channels_last=name == "channels-last",
            devices=frozenset({"cpu"}),
            compiles=name in ("compiled", "frozen"),
        )
        for name, ready in (
            ("eager", run_eager),
            ("channels-last", run_eager),
            ("compiled", run_compiled),
            ("frozen", run_frozen),
        )
    },
    **{
        name: Mode(
            what=INFER,
            who=STRANGERS,
            ready=ready,
            keeps=True,
            devices=frozenset({"cpu"}),
            engine=True,
            precisions=tuple(kinds),
        )
        for name, ready, kinds in (
            ("openvino", run_openvino, (*PRECISIONS, INT8)),
            ("openvino-throughput", run_openvino_queue, (*PRECISIONS, INT8)),
            ("onnxruntime", run_onnxruntime, ("float32",)),
        )
    },
}
"""Modes of running a network, those that are ready at once first."""
