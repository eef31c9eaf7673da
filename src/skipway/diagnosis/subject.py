"""A model with its example, targets and loss, and the passes over them that leave no trace."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.diagnosis.asked_classes import AskedClasses, read_asked_classes, sees_later
from skipway.diagnosis.batches import Batches
from skipway.diagnosis.progress import PassCounter
from skipway.diagnosis.residual_warmup import JudgedWarmup
from skipway.errors import SkipwayError
from skipway.nn import Streams, set_step
from skipway.probes import MEASURES, Observer, Probe, Signals
from skipway.probes.objective import Loss, Objective, choose_objective, next_token_loss, output_heads, predicted_tokens
from skipway.tracing import Example, Program, preserved_state, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain_from_program
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import call_model
from skipway.tracing.reentrant_checkpoints import without_reentry
from skipway.tracing.restoration import devices_in_use, seed_generators, seeded_generators
from skipway.tracing.samples import SampleAxes, find_sample_axes

__all__ = ["Gradients", "Subject", "dense", "reseed"]

Gradients = list[Tensor]


@dataclass
class Subject:
    """The subject of a diagnosis.

    Args:
        model: any module.
        inputs: what the model is called with.
        targets: what the loss compares the output with; None: labels drawn at random.
        loss: (output, targets) → a scalar; None: as `skipway.probes.objective.choose_objective` chooses it.
        training: run the model in training mode.
        seed: of dropout, stochastic depth and targets, the same in every pass.
        progress: is told of every pass.
        batches: of the loader that the batch is the first of; None: there is this batch only.
    """

    model: nn.Module
    inputs: Example
    targets: Any = None
    loss: Loss | None = None
    training: bool = True
    seed: int = 0
    passes: float = field(default=0.0, init=False)
    """Forward-backward passes over the whole batch so far; a backward pass counts two forward passes."""
    progress: PassCounter | None = field(default=None, repr=False)
    batches: Batches | None = field(default=None, repr=False)
    warmup: JudgedWarmup | None = field(default=None, init=False)
    """Where the clock of a residual warm-up stands in all passes; None: where it is."""
    objective: Objective | None = field(default=None, init=False)
    """The loss, chosen on the first output."""
    draws_in_python: bool = field(default=False, init=False)
    """Whether the watched pass drew random numbers in Python."""
    unreached: tuple[str, ...] = field(default=(), init=False, repr=False)
    """Names of the trainable parameters that the loss of the probed part was not computed from."""
    asked: tuple[AskedClasses, Tensor] | None = field(default=None, init=False, repr=False)
    """What the loss asks of the probed part, where it is a cross-entropy, and the class at each place."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: what was given, without a loader, of which the batch is left. The rest is
        derived, part of it by the identity of tensors.
        """
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"batches": None}

    @property
    def labelled(self) -> bool:
        """Whether the loss compares with something given, and not with what is drawn at random."""
        return self.objective is None or self.objective.labelled

    @cached_property
    def program(self) -> Program:
        """The program that the model runs on the probed samples, with the random choices of the passes (LayerDrop)."""
        with preserved_state(self.model), seeded(self.seed):
            before = random.getstate()
            program = watch(self.model, self.probed_part[0], training=self.training)
            self.draws_in_python = random.getstate() != before
            return program

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """Numbers of tokens that the model knows: the lengths of the tables that tokens are looked up in."""
        tables = [self.program[value.operands[0]] for value in self.program.values if value.operator == "embedding"]
        return tuple({table.shape[0] for table in tables if table.shape})

    @cached_property
    def random_modules(self) -> tuple[str, ...]:
        """The outermost modules that run with some random numbers and not with others, as under LayerDrop."""
        values = self.program.values
        drawn = any(value.numel == 1 and not value.operands and "rand" in value.operator for value in values)
        if not self.training or not (drawn or self.draws_in_python):
            return ()
        runs = [self.program.runs]
        for seed in range(self.seed + 1, self.seed + 4):
            with preserved_state(self.model), seeded(seed):
                runs.append(watch(self.model, self.part(0, min(2, self.size))[0], training=True).runs)
        names = [name for name in dict.fromkeys(itertools.chain(*runs)) if len({name in each for each in runs}) > 1]
        return tuple(name for name in names if name.rpartition(".")[0] not in names)

    @cached_property
    def chain(self) -> Chain[WatchedConnection]:
        """The residual connections, in the order in which they run."""
        return chain_from_program(self.model, self.program)

    @cached_property
    def layers(self) -> list[str]:
        """The modules with linear maps, in the order in which the signal meets them."""
        maps = [value for value in self.program.values if value.part == "map" and value.norm is None]
        return list(dict.fromkeys(self.program.weight_owner(value) for value in maps))

    @cached_property
    def samples(self) -> SampleAxes:
        """The axis of the samples in every tensor of the batch."""
        compared = None if self.loss is not None and not isinstance(self.targets, Tensor) else self.targets
        return find_sample_axes(self.model, self.inputs, compared).including(self.targets)

    @property
    def size(self) -> int:
        """Samples in the batch."""
        return self.samples.size

    @cached_property
    def terms(self) -> int:
        """Terms that the loss averages over: a sequence counts once for each token that has a label."""
        labels = self.targets
        if labels is None and isinstance(self.inputs, Mapping):
            labels = next((self.inputs[name] for name in ("labels", "label", "targets") if name in self.inputs), None)
        if labels is None:
            labels = [each for each in tensors_in(self.inputs) if not each.is_floating_point()]
        counts = (each.numel() for each in tensors_in(labels) if not each.is_floating_point())
        return max(self.size, max(counts, default=0))

    @property
    def chunk(self) -> int:
        """Samples in one trial step: an eighth of the batch, at least 8 where a quarter of the batch has as many.

        Of fewer than 8 sequences it is a half.
        """
        return max(min(8, self.size // 4), self.size // 8) if self.size >= 8 else self.size // 2

    @cached_property
    def probed_part(self) -> tuple[Example, Any]:
        """The first quarter of the batch, at least two chunks: enough to measure signals on."""
        return self.part(0, min(self.size, max(2 * self.chunk, self.size // 4)))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def stream_connections(self) -> int:
        """Connections that carry several streams: by type in networks of ours, else as they were watched."""
        own = sum(isinstance(module, Streams) and module.count > 1 for module in self.model.modules())
        return max(own, sum(connection.seen.streams is not None for connection in self.chain))

    @cached_property
    def skippable(self) -> tuple[str, ...]:
        """The modules that a skip fits around: siblings with linear maps whose outputs are shaped like their inputs.

        Of several levels of nesting (blocks, the layers in them) the one with most such modules, of equals the outer.
        """
        holding = {
            ".".join(parts[:length])
            for parts in (path.split(".") for path in self.layers)
            for length in range(1, len(parts) + 1)
        }
        names = [name for name, _ in self.model.named_modules() if name in holding]
        with self.running(), torch.no_grad(), ShapeObserver(self.model, (), names) as observer:
            self.call(self.probed_part)
        rows: dict[str, list[str]] = {}
        for name in (name for name in names if observer.kept.get(name)):
            rows.setdefault(name.rpartition(".")[0], []).append(name)
        # the blocks of several stages have several parents on one level, and are taken together
        levels: dict[int, list[str]] = {}
        for parent, members in rows.items():
            if len(members) > 1:
                levels.setdefault(parent.count("."), []).extend(members)
        return tuple(max(levels.values(), key=len, default=()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter the chosen mode, with the same random numbers each time and a residual warm-up at the step at which it
        is judged, and put everything back afterwards.
        """
        with preserved_state(self.model), seeded(self.seed), torch.enable_grad(), without_reentry():
            if self.warmup is not None:
                set_step(self.model, self.warmup.judged.step, self.warmup.total)
            if self.model.training != self.training:  # else parts in another mode, such as frozen norms, stay in it
                self.model.train(self.training)
            yield

    def rests(self, module: nn.Module) -> bool:
        """Whether a part that acts differently in training is in evaluation mode while the model is trained."""
        acts = isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd | nn.RNNBase)
        return acts and self.training and self.model.training and not module.training

    def part(self, start: int, stop: int) -> tuple[Example, Any]:
        """Example and targets of some of the samples."""
        return self.samples.part(self.inputs, start, stop), self.samples.part(self.targets, start, stop)

    def call(self, part: tuple[Example, Any]) -> Any:
        """The model's output for a part of the batch; the model gets copies, since it may write into its inputs."""
        return call_model(self.model, map_tensors(torch.clone, part[0]))

    def count(self, part: tuple[Example, Any]) -> int:
        """Samples in a part of the batch."""
        pairs = zip(tensors_in(self.inputs), tensors_in(part[0]), strict=True)
        axes = self.samples.axes
        return next((cut.shape[axes[id(each)]] for each, cut in pairs if id(each) in axes), self.size)

    def value(self, output: Any, part: tuple[Example, Any]) -> Tensor:
        """The loss of an output for a part of the batch."""
        inputs, targets = part
        if self.objective is None and not torch.is_grad_enabled():  # a loss of the model's own is known by its gradient
            with self.running():
                self.value(self.call(part), part)
        if self.objective is None:
            self.objective = choose_objective(output, targets, self.loss, inputs=inputs, vocabularies=self.vocabularies)
        return self.objective(output, targets, inputs)

    def refuse_later_tokens(self, heads: Mapping[str, Tensor]) -> None:
        """Refuse to ask a network for next tokens that it sees.

        Raises:
            SkipwayError: tokens alone were given, and outputs depend on later ones.
        """
        if self.objective is None or self.objective.function is not next_token_loss:
            return
        tokens = predicted_tokens(heads, self.probed_part[0], self.vocabularies)
        if tokens is not None and sees_later(self, tokens):
            raise SkipwayError(
                f"no targets given, and {type(self.model).__name__} cannot be asked for each next token: its outputs "
                "depend on later tokens, as in masked language models or without a causal mask; give targets=, in a "
                "mapping the labels that the model takes (-100 where none is asked), or loss=(output, targets) → a "
                "scalar"
            )

    def signal(self, output: Any, part: tuple[Example, Any]) -> Tensor:
        """All heads of an output as one tensor, its first axis the samples."""
        heads = [self.samples.samples_first(head, self.count(part)) for head in output_heads(output)[0].values()]
        if len(heads) == 1 or any(head.shape[0] != heads[0].shape[0] for head in heads):
            return heads[0] if len(heads) == 1 else torch.cat([head.flatten() for head in heads])[None]
        return torch.cat([head.flatten(1) if head.ndim > 1 else head[:, None] for head in heads], 1)

    def spend(self, passes: float) -> None:
        """Count passes, and report progress."""
        self.passes += passes
        if self.progress is not None:
            self.progress.report(self.passes)

    def begin(self, stage: str, *, counted: bool = False) -> None:
        """Tell what the passes from here on are for; see `PassCounter.begin`."""
        if self.progress is not None:
            self.progress.begin(stage, counted=counted)

    def share(self, part: tuple[Example, Any]) -> float:
        """Fraction of the batch that is in a part."""
        return self.count(part) / self.size

    def gradients(self, part: tuple[Example, Any]) -> tuple[Tensor, Gradients]:
        """Loss on a part of the batch, and the gradient of each parameter, 0 where none arrives."""
        self.spend(self.share(part))
        with self.running():
            loss = self.value(self.call(part), part)
            parameters = list(self.parameters.values())
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else dense(gradient.detach())
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return loss.detach(), gradients

    def probed(self) -> tuple[Tensor, Tensor, Gradients, Signals]:
        """Loss, output, gradients and the probe's readings of one pass."""
        part = self.probed_part
        self.spend(self.share(self.probed_part))
        parameters = list(self.parameters.values())
        measures = [name for name in MEASURES if name not in ("largest", "finite")]
        channels = output_channels(self.program, self.layers)
        with self.running(), Probe(self.model, self.chain, measures, self.layers, channels) as probe:
            probe.arrange = partial(self.samples.samples_first, count=self.count(part))
            output = self.call(part)
            loss = self.value(output, part)
            if not loss.requires_grad:
                raise SkipwayError(
                    f"the loss {float(loss):.3g} depends on no parameter with requires_grad=True; unfreeze some, "
                    "or give a loss that uses the output"
                )
            heads = output_heads(output)[0]
            names = [name for name, head in heads.items() if head.requires_grad and head is not loss]
            found = torch.autograd.grad(loss, [*parameters, *(heads[name] for name in names)], allow_unused=True)
            heads = {name: head.detach() for name, head in heads.items()}  # no graph is held beyond the probe
            entering = [(heads[n], g) for n, g in zip(names, found[len(parameters) :], strict=True) if g is not None]
            self.asked = read_asked_classes(*entering[0]) if len(entering) == 1 else None
            found = found[: len(parameters)]
            loss, output = loss.detach(), self.signal(output, part).detach()
        self.refuse_later_tokens(heads)
        self.unreached = tuple(name for name, each in zip(self.parameters, found, strict=True) if each is None)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else dense(gradient)
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return loss, output, gradients, probe.readings()


def output_channels(program: Program, modules: Sequence[str]) -> dict[str, int]:
    """The axes of the channels in what modules put out, from the end, where the weights tell them."""
    found = {}
    for name in modules:
        value = next((program[number] for number in program.returned.get(name, {}).values()), None)
        if value is not None and value.channel is not None:
            found[name] = value.channel - len(value.shape)
    return found


class ShapeObserver(Observer):
    """Notes of each module whether its output has the shape of its input."""

    def start(self) -> None:
        self.kept: dict[str, bool] = {}
        self.shapes: dict[str, torch.Size | None] = {}

    def module_input(self, name: str, value: Any) -> None:
        self.shapes[name] = value.shape if isinstance(value, Tensor) else None

    def module_output(self, name: str, value: Any) -> None:
        self.kept[name] = isinstance(value, Tensor) and value.shape == self.shapes[name]


def dense(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor; a table that tokens are looked up in may have a sparse one."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers in every pass, those of Python and NumPy, too, and torch's random state put back."""
    with seeded_generators(devices_in_use(), seed):
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Set the random numbers of torch, Python and NumPy, within `Subject.running`, which puts them back."""
    seed_generators(devices_in_use(), seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
