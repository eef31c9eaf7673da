"""A sample of a network in training: a pass of its own over a few samples of the last batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.monitoring.attention import AttentionLogits
from skipway.monitoring.call_record import Call, LastCall, computed_from
from skipway.nn import Residual
from skipway.probes import Probe
from skipway.probes.nonfinite import Culprit, find_culprit
from skipway.probes.signals import to_floats
from skipway.tracing import Example, call_model, preserved_state, unwrap
from skipway.tracing.chain import Chain, WatchedConnection, chain
from skipway.tracing.containers import tensors_in
from skipway.tracing.module_state import version_of
from skipway.tracing.paths import condense_paths
from skipway.tracing.samples import SampleAxes, axis_of, find_sample_axes, has_axes

__all__ = ["SAMPLES", "SIGNALS_OF_A_SAMPLE", "Rows", "SignalSampler", "block_names"]

SAMPLES = 32
"""Samples of the batch in one pass."""
MOST_MODULES = 64
MEASURES = ("skip", "branch", "stream", "largest", "dead", "gradient_after", "gradient_before")
SIGNALS_OF_A_SAMPLE = {
    "stream": "Stream after each connection, rms",
    "largest": "Largest magnitude of the stream",
    "ratio": "Branch over stream, rms F(x) / rms x",
    "forward_gain": "Forward gain, rms y / rms x",
    "backward_gain": "Backward gain, rms ∂L/∂x / rms ∂L/∂y",
    "gradient": "Gradient after each connection, rms ∂L/∂y",
    "update": "Relative update of the weights, |Δw| / |w|",
    "logits": "Largest attention logit, |q·k| / √d",
    "dead": "Dead units, share of a rectifier's channels",
}
"""The columns of a sample, and what they are."""
Rows = dict[str, dict[str, float]]


@dataclass
class SignalSampler:
    """Takes samples of a network from the calls that a recorder has seen.

    The pass runs eagerly, on the first samples of the last batch, in the precision and mode of the call, with buffers,
    random state and gradients put back. What comes back is not a loss computed anew: the gradient of the output is that
    of the training's own backward pass, at these samples, so any loss will do. Dropout draws anew, BatchNorm normalises
    by the few samples, and what reaches the loss by another way than the output is not seen.

    Args:
        model: the network, as it is trained.
        recorder: of its calls.
    """

    model: nn.Module
    recorder: LastCall
    connections: Chain[WatchedConnection] | tuple[WatchedConnection, ...] = ()
    modules: tuple[str, ...] = ()
    axis: int | None = None
    remarks: list[str] = field(default_factory=list)
    ready: bool = False
    labels: Counter[int] = field(default_factory=Counter)
    summed: bool = False
    means: dict[int, float] = field(default_factory=dict)
    writes: bool = False

    def prepare(self, call: Call) -> None:
        """Find the axis of the samples and the connections, from the first call."""
        example = call.example(self.inner)
        with preserved_state(self.inner), call.precision():
            try:
                axes = find_sample_axes(self.inner, example)
                self.axis, remark = axes.axis, axes.remark
                self.remarks += [f"samples: {remark}"] if remark else []
            except SkipwayError as problem:
                self.remarks.append(f"the whole batch is sampled, since its axis of samples is not known: {problem}")
            try:
                self.connections = chain(self.inner, self.part(example)[0])
            except SkipwayError as problem:
                self.remarks.append(f"no connections: {problem}")
        if not self.connections:
            self.use_modules()
        self.ready = True

    def use_modules(self) -> None:
        """Sample the outputs of modules, where there are no connections or they cannot be measured."""
        self.connections, self.modules = (), block_names(self.inner)
        names = condense_paths(self.modules)
        self.remarks.append(f"no residual connection was found; sampled instead are the outputs of {names}")

    @property
    def inner(self) -> nn.Module:
        """The network without wrappers."""
        return unwrap(self.model)

    def axes(self, example: Example) -> SampleAxes | None:
        """The axis of the samples in every tensor of a batch."""
        tensors = [each for each in tensors_in(example) if has_axes(each)]
        if self.axis is None or not tensors or tensors[0].ndim <= self.axis:
            return None
        size = tensors[0].shape[self.axis]
        places = {id(each): axis_of(each, size, self.axis) for each in tensors}
        return SampleAxes(size, self.axis, {key: place for key, place in places.items() if place is not None})

    def part(self, example: Example) -> tuple[Example, float]:
        """The first samples of a batch, and their share of it."""
        axes = self.recorder.axes = self.axes(example)
        if axes is None:
            return example, 1.0
        self.recorder.count = min(SAMPLES, axes.size)
        return axes.part(example, 0, self.recorder.count), self.recorder.count / axes.size

    @contextmanager
    def replay(self, call: Call) -> Iterator[tuple[Example, float]]:
        """Context in which the network may be called with the samples of a call, and is left as it was."""
        part, share = self.part(call.example(self.inner))
        versions = [(name, each, version_of(each)) for name, each in self.inner.named_parameters()]
        with preserved_state(self.inner), call.precision(), torch.enable_grad():
            yield part, share
        written = next((name for name, each, version in versions if version_of(each) != version), None)
        if written is not None and not self.writes:
            self.writes = True
            self.remarks.append(
                f"the forward pass writes into the parameter {written}, and every sample does so once more; keep such "
                "values in a buffer, which is put back"
            )

    def read(self, call: Call, scale: float = 1.0) -> Rows:
        """One forward and one backward pass over the samples of a call: a row for each connection or module.

        Args:
            call: with the gradients of its output; without, the forward half is read.
            scale: of the loss, which gradients are divided by.
        """
        with self.replay(call) as (part, share), Probe(self.inner, self.connections, MEASURES, self.modules) as probe:
            attention = AttentionLogits(lambda: self.running(probe))
            with attention:
                output = call_model(self.inner, part)
            outputs, gradients = self.seeds(call, output, share)
            for gradient in gradients:
                self.count_labels(gradient, scale)
            if outputs and probe.edges:
                torch.autograd.grad(outputs, probe.edges, gradients, allow_unused=True)
            del output, outputs
        signals = probe.readings()
        names, values = list(attention.largest), to_floats(list(attention.largest.values()))
        logits = dict(zip(names, values, strict=True))
        rows = signals.connections if self.connections else signals.modules
        return complete_rows(rows, logits, scale)

    def running(self, probe: Probe) -> str | None:
        """The connection or module that runs: the one that is finished next."""
        names = [each.name for each in self.connections] or list(self.modules)
        done = probe.passed if self.connections else len(probe.module_rows)
        return names[min(done, len(names) - 1)] if names else None

    def seeds(self, call: Call, output: Any, share: float) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the output at which the backward pass begins, and the training's gradients there.

        A number among the outputs, such as a loss, that is a mean is one over fewer samples here, see `share_of`. One
        that no sample reaches, such as a temperature, carries no gradient to them.
        """
        tensors = dict(enumerate(tensors_in(output)))
        pairs: list[tuple[Tensor, Tensor]] = []
        for place, gradient in call.gradients.items():
            tensor = tensors.get(place)
            if tensor is None or not tensor.requires_grad:
                continue
            gradient = self.recorder.part(gradient) if gradient.shape != tensor.shape else gradient
            if gradient.shape == tensor.shape:
                factor = self.share_of(place, tensor, call, share) if tensor.numel() == 1 else 1.0
                pairs.append((tensor, gradient.to(tensor.dtype) * factor))
        ancestors = computed_from([tensor for tensor, _ in pairs])
        pairs = [pair for number, pair in enumerate(pairs) if number not in ancestors]
        return [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs]

    def share_of(self, place: int, number: Tensor, call: Call, share: float) -> float:
        """What the gradient of a number of the output is multiplied by where only a share s of the samples is run.

        ∂L/∂y of a mean grows by 1/s as the samples become fewer, and that of a sum does not. A mean hardly changes
        itself, and a sum becomes s times as large: on which side of √s it is counts over all samples so far together.
        """
        whole = call.numbers.get(place)
        ratio = float(number.detach()) / float(whole) if whole is not None and float(whole) else math.nan
        if 0 < ratio < math.inf:
            self.means[place] = self.means.get(place, 0.0) + math.log(ratio) - math.log(share) / 2
        return 1.0 if self.means.get(place, 0.0) < 0 else share

    def count_labels(self, gradient: Tensor, scale: float) -> None:
        """Count the labels of a cross-entropy, whose gradient p − y sums to 0 and is negative at the label alone.

        Of a mean, with weights of classes or without, the entries at the labels sum to 1 at most in size, Σ w (1 − p) /
        Σ w. Where they are larger the loss is a sum, with which the entropy of a label cannot be compared.
        """
        if gradient.ndim < 2 or not gradient.is_floating_point() or gradient.shape[1 if gradient.ndim == 4 else -1] < 2:
            return
        rows = (gradient.movedim(1, -1) if gradient.ndim == 4 else gradient).detach().flatten(0, -2).float()
        size = rows.abs().sum(-1)
        rows, size = rows[size > 0], size[size > 0]
        if len(rows) and bool((rows.sum(-1).abs() <= 1e-2 * size).all()):
            low = rows.min(-1)
            if bool((low.values * -2 >= 0.9 * size).all()):
                self.labels.update(low.indices.tolist())
                if not self.summed and float(-low.values.sum()) > 1.02 * scale:  # bfloat16 rounds to 0.4 %
                    self.summed = True
                    self.remarks.append(
                        "the gradients are larger than those of a mean over the labels, so the loss is not compared "
                        "with that of the best constant answer: it is a sum, or scaled (give scaler=)"
                    )

    @property
    def constant(self) -> float:
        """Loss of the best constant answer, in nats: the entropy of the labels seen so far; NaN where none were, or
        where the loss is no mean over them.
        """
        count = sum(self.labels.values())
        if self.summed or count < 2 * len(self.labels) or not count:
            return math.nan
        entropy = -sum(n / count * math.log(n / count) for n in self.labels.values())
        return entropy + (len(self.labels) - 1) / (2 * count)  # Miller 1955: few samples make it small

    def culprit(self, call: Call) -> Culprit:
        """The first value that is not finite when a call is run again, and the gradient of its output taken back.

        Where the samples are fine, the whole batch is run forward.
        """
        with self.replay(call) as (part, share):
            found = find_culprit(self.inner, part, lambda: self.surrogate(call, call_model(self.inner, part), share))
        if found.kind != "gone":
            return found
        example = call.example(self.inner)
        with self.replay(call):
            forward = find_culprit(self.inner, example, lambda: total(call_model(self.inner, example)))
        return forward if forward.kind in ("input", "weight", "forward") else found

    def surrogate(self, call: Call, output: Any, share: float) -> Tensor:
        """⟨output, its gradient in the training⟩, a number whose gradients are those of the loss."""
        outputs, gradients = self.seeds(call, output, share)
        if not outputs:
            return total(output)
        parts = [(tensor * gradient).sum() for tensor, gradient in zip(outputs, gradients, strict=True)]
        return torch.stack([each.float() for each in parts]).sum()


def total(output: Any) -> Tensor:
    """The sum of all numbers of an output."""
    parts = [each.float().sum() for each in tensors_in(output) if each.is_floating_point()]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def complete_rows(rows: Rows, logits: dict[str, float], scale: float) -> Rows:
    """The columns of a sample from those of a probe; what was not measured is left out."""
    done: Rows = {}
    before: dict[str, float] = {}
    for name, row in rows.items():
        stream, gradient = row.get("stream", math.nan), row.get("gradient_after", math.nan) / scale
        carried = row.get("skip", before.get("stream", math.nan))
        arrived = row["gradient_before"] / scale if "gradient_before" in row else math.nan
        full = {
            "stream": stream,
            "largest": row.get("largest", math.nan),
            "ratio": quotient(row.get("branch", math.nan), carried),
            "forward_gain": quotient(stream, carried),
            "backward_gain": quotient(arrived, gradient),
            "gradient": gradient,
            "logits": logits.get(name, math.nan),
            "dead": row.get("dead", math.nan),
        }
        if before and "gradient_before" not in row:
            full["backward_gain"] = quotient(before["gradient"], gradient)
        # where no gradient arrives, as in front of layers that are trained, there is none to be finite
        kept = {"stream", "gradient"} if "gradient_after" in row else {"stream"}
        done[name] = {key: value for key, value in full.items() if not math.isnan(value) or key in kept}
        before = full
    return done


def quotient(above: float, below: float) -> float:
    """A ratio; NaN where it has none."""
    return above / below if below else math.nan


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The modules whose outputs stand for connections where there are none: blocks of ours whose skips were cut, else
    the blocks of the longest list, else the modules that hold weights themselves; at most 64, evenly spaced; the model
    itself where it holds no other module.

    >>> block_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    ('0', '2')
    """
    own = [name for name, module in model.named_modules() if isinstance(module, Residual)]
    lists = [
        [f"{name}.{key}".lstrip(".") for key, child in module.named_children() if any(True for _ in child.parameters())]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    longest = max(lists, key=len, default=[])
    holders = [name for name, module in model.named_modules() if name and module._parameters]
    chosen = own or (longest if len(longest) > 1 else holders)
    return tuple(chosen[:: max(1, math.ceil(len(chosen) / MOST_MODULES))]) or ("",)
