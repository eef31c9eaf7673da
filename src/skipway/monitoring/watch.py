"""`monitor(model, optimizer)`: the signals of every connection, in anybody's training loop."""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from skipway._version import __version__
from skipway.errors import SkipwayError, first_line
from skipway.monitoring.call_record import Call, LastCall
from skipway.monitoring.history import Record, WatchHistory
from skipway.monitoring.journal import WatchJournal
from skipway.monitoring.last_batch import DeepReading, largest_gradients
from skipway.monitoring.ranks import find_ranks
from skipway.monitoring.rules import EarlyWarning, Evidence
from skipway.monitoring.sample import Rows, SignalSampler
from skipway.monitoring.schedule import FIRST_WAIT, Schedule
from skipway.monitoring.sinks import as_sinks
from skipway.monitoring.step_hooks import StepHooks, scaler_around, unwrapped_optimizer
from skipway.monitoring.step_log import StepLog, StepRecord
from skipway.monitoring.updates import WeightSample, gradient_norms, parameters_by_connection
from skipway.monitoring.warmup_clock import WarmupClock
from skipway.tracing import unwrap
from skipway.validation import check_rule, is_real, is_whole

__all__ = ["Watch", "monitor"]

OUTSIDE = "a parameter outside of the model"
"""Name of what an optimizer holds and the model does not, such as copies in another precision."""


def monitor(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    every: int = 100,
    budget: float | None = 0.02,
    sink: Any = None,
    on_warning: Callable[[EarlyWarning], Any] | None = None,
    scaler: Any = None,
    constant: float | None = None,
    step: int = 0,
) -> Watch:
    """Watch the training of any network from its own loop, which stays as it is; to be used in a `with` block.

    Every step: the norm of all gradients, the loss where it is known (the model's own, or `watch.log(loss=loss)`),
    how far both are from the last 128 steps. On some steps a sample: the last batch's first 32 samples pass the
    network once more, forward and backward, with the gradient that the training's own backward pass had at the output.
    It yields for each connection the size of stream, branch and gradient, gains, relative update, dead units and
    attention logits. The training computes bit for bit what it computes without.

    Args:
        model: what the loop calls; wrappers of `torch.compile`, DistributedDataParallel and FSDP2 included.
        optimizer: one or several, whose steps are counted.
        every: steps between samples; the first ones come sooner.
        budget: share of the time that the monitor may take; where samples cost more they become rarer, with a remark.
            None samples as often as `every` says.
        sink: where records go, see `skipway.monitoring.sinks.as_sinks`: a path for JSON lines, a SummaryWriter, an
            object with `log` or `log_metrics`, a function of a table, a list of those. None keeps them in memory.
        on_warning: is called with each `EarlyWarning`, and may raise an exception that ends the training; None:
            Python's `warnings`.
        scaler: the loop's GradScaler, if it has one, whose scale gradients are divided by, and whose skipped steps do
            not count; None: that of the optimizer's wrapper (Accelerate), if there is one.
        constant: loss of the best constant answer; None: the entropy of the labels, where the loss is the mean of a
            cross-entropy.
        step: steps that were taken before, of a training that is continued.

    Raises:
        SkipwayError: no module, no optimizer, numbers out of range, a sink that cannot be written.

    >>> import skipway as sw
    >>> model = sw.build("resnet20")
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with monitor(model, optimizer) as watch:
    ...     for _ in range(3):
    ...         loss = model(torch.randn(8, 3, 16, 16)).square().mean()
    ...         optimizer.zero_grad(), loss.backward(), optimizer.step()
    ...         watch.log(loss=loss)
    (None, None, None)
    (None, None, None)
    (None, None, None)
    >>> len(watch.losses), list(watch.samples[0]["rows"])[0]
    (3, 'stages.0.0')
    """
    several = isinstance(optimizer, Sequence)
    given = list(optimizer) if several else [optimizer]
    optimizers = [unwrapped_optimizer(each) for each in given]
    if scaler is None:
        scaler = next(filter(None, map(scaler_around, given)), None)
    if not optimizers:
        raise SkipwayError("optimizer=[]: the rule is one torch.optim.Optimizer or more")
    if not is_whole(every, 1):
        raise SkipwayError(f"every={every!r}: the rule is a whole number of steps from 1 on")
    share = budget is None or (is_real(budget) and 0 < budget < 1)
    check_rule("budget", budget, share, "a share of the time, 0 < budget < 1, or None")
    check_rule("constant", constant, constant is None or is_real(constant), "a number, the loss of an answer, or None")
    check_rule("on_warning", on_warning, on_warning is None or callable(on_warning), "a function of a warning, or None")
    if not is_whole(step, 0):
        raise SkipwayError(f"step={step!r}: the rule is a whole number from 0 on")
    unwrap(model)
    return Watch(
        model, optimizers, int(every), budget, WatchJournal(as_sinks(sink), on_warning), scaler, constant, int(step)
    )


class Watch:
    """What a monitor sees of a training, while it runs and afterwards; see `skipway.monitor`.

    A monitor never ends a training: what it cannot do is said in a remark and with Python's `warnings`.
    """

    def __init__(
        self, model: nn.Module, optimizers: list[Optimizer], every: int, budget: float | None, journal: WatchJournal,
        scaler: Any, constant: float | None, step: int,
    ) -> None:  # fmt: skip
        self.model, self.optimizers = model, optimizers
        self.journal, self.scaler, self.constant, self.step = journal, scaler, constant, step
        self.parameters, self.names = self.held_parameters()
        self.held = sum(len(group["params"]) for group in self.groups)
        self.ranks = find_ranks(unwrap(model), self.parameters)
        journal.rank = self.ranks.rank
        on_cpu = all(each.device.type == "cpu" for each in self.parameters) and not self.ranks.together
        self.log_of_steps = StepLog(journal, self.ranks, self.names, on_cpu, self.best_constant)
        self.stack = ExitStack()
        self.recorder: LastCall | None = None
        self.sampler: SignalSampler | None = None
        self.schedule = Schedule(every, budget, step + 1, start=step, agree=self.ranks.agree)
        self.norms_every, self.thinned, self.rarer = 1, False, False
        self.weights: WeightSample | None = None
        self.rows: Rows = {}
        self.first_rows: Rows = {}
        self.record: StepRecord | None = None
        self.pending_losses: list[Any] = []
        self.skipped = False
        """Whether a GradScaler left out the last step."""
        self.last_norms: Tensor | None = None
        self.clock = WarmupClock()
        self.began = self.left = math.nan
        self.spent = self.light = self.sample_seconds = self.setup_seconds = 0.0

    def held_parameters(self) -> tuple[list[nn.Parameter], list[str]]:
        """The parameters that the optimizers hold now, in the order of the model, with their names."""
        names = {id(parameter): name for name, parameter in unwrap(self.model).named_parameters()}
        held = {id(each): each for group in self.groups for each in group["params"]}
        order = {key: place for place, key in enumerate(names)}
        parameters = sorted(held.values(), key=lambda each: order.get(id(each), len(order)))
        return parameters, [names.get(id(each), OUTSIDE) for each in parameters]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def look_for_groups(self) -> None:
        """Take in parameters that an optimizer was given meanwhile, as where layers are unfrozen one by one."""
        held = sum(len(group["params"]) for group in self.groups)
        if held == self.held:
            return
        self.held = held
        self.log_of_steps.resolve()
        self.parameters, self.names = self.held_parameters()
        self.ranks = find_ranks(unwrap(self.model), self.parameters)
        self.log_of_steps.parameters, self.log_of_steps.ranks = self.names, self.ranks
        self.last_norms = None

    # What is seen ----------------------------------------------------------------------------------------------------

    @property
    def history(self) -> WatchHistory:
        """All records."""
        return self.journal.history

    @property
    def losses(self) -> Sequence[float]:
        """The loss of every step; NaN where it was not known."""
        return self.history.losses

    @property
    def norms(self) -> Sequence[float]:
        """The norm of all gradients that the optimizer was given, of every step; after clipping, if there is one.

        NaN where it was not computed, and where a GradScaler let the step be skipped.
        """
        return self.history.norms

    @property
    def samples(self) -> list[Record]:
        """The samples: step, and a row for each connection."""
        return self.history.samples

    @property
    def warnings(self) -> list[Record]:
        """The early warnings."""
        return self.history.warnings

    @property
    def remarks(self) -> list[str]:
        """What could not be done as asked, or cost more."""
        return self.history.remarks

    @property
    def share(self) -> float:
        """The share of the time that the monitor has taken, without what it did once (`setup_seconds`)."""
        elapsed = self.left - self.began - self.setup_seconds
        return self.spent / elapsed if elapsed > 0 else math.nan

    def log(self, *, loss: Any) -> None:
        """Tell the loss of a step, before or after the optimizer's step; of several (accumulation) the mean counts.

        It counts in place of the losses that the model returns. A tensor is not fetched from its device before it is
        needed.
        """
        if isinstance(loss, Tensor) and loss.numel():
            value: Tensor | float = loss.detach().reshape(-1).mean()
        else:
            try:
                value = float(loss)
            except (TypeError, ValueError, OverflowError) as error:
                kind = f"{type(loss).__name__} of shape {tuple(getattr(loss, 'shape', ()))}"
                raise SkipwayError(f"log(loss=…): a {kind}; the rule is one number or a tensor of some") from error
        fresh = self.recorder is None or self.recorder.fresh
        if self.skipped and not fresh and self.recorder is not None and self.recorder.last is not None:
            return
        if self.record is None or fresh:
            self.pending_losses.append(value)
        else:
            kept = [] if self.record.own else self.record.losses
            self.record.losses, self.record.own = [*kept, value], False

    def deep(self) -> DeepReading:
        """Read the last batch once more: every connection, the first value that is not finite, the largest gradients.

        For a moment of doubt, such as a spike; costs some passes over 32 samples. With sharded weights every process
        has to call it.

        Raises:
            SkipwayError: outside of the `with` block, or before the model was called; the model fails.
        """
        call = self.recorder.last if self.recorder is not None else None
        if call is None:
            raise SkipwayError("deep(): the model was not called within `with skipway.monitor(…) as watch:` yet")
        start = time.perf_counter()
        rows, culprit = self.read_deeply(call) if self.ranks.takes_part else ({}, "")
        self.spent += time.perf_counter() - start
        largest = largest_gradients(self.names, self.last_norms)
        reading = DeepReading(self.step, rows, culprit, largest, dict(self.log_of_steps.scores))
        self.journal.write("deep", **reading.to_record())
        return reading

    def read_deeply(self, call: Call) -> tuple[Rows, str]:
        """The rows of a call, and the first value that is not finite, if one is not."""
        sampler = self.prepared(call)
        rows = sampler.read(call, self.scale())
        numbers = [value for row in rows.values() for value in row.values()]
        norms = [] if self.last_norms is None else self.last_norms.tolist()
        bad = not all(map(math.isfinite, [*numbers, *norms])) or math.inf in self.log_of_steps.scores.values()
        return rows, str(sampler.culprit(call)) if bad else ""

    # The context -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        if self.history.start:
            raise SkipwayError("this monitor was used already; make a new one with skipway.monitor(model, optimizer)")
        self.recorder = LastCall(self.model)
        self.recorder.due = True
        self.sampler = SignalSampler(self.model, self.recorder)
        self.stack.callback(self.recorder.close)
        hooks = StepHooks(self.optimizers, self.before_step, self.after_step, self.forget_losses)
        self.stack.callback(hooks.remove)
        if callable(getattr(self.scaler, "step", None)):
            self.stack.enter_context(hooks.watching(self.scaler, self.optimizers, self.skip_step))
        model = type(self.sampler.inner).__name__
        settings = {"every": self.schedule.every, "budget": self.schedule.budget, "step": self.step}
        if self.names and set(self.names) == {OUTSIDE}:
            text = (
                f"the optimizer holds no parameter of {model}: give the two of one training, or what is seen is not it"
            )
            self.journal.remark(text, aloud=True)
        self.journal.write("start", skipway=__version__, model=model, **settings)
        return self

    def start(self) -> Watch:
        """Enter the context until `stop`, or the end of the process; for loops that have no room for a `with` block."""
        atexit.register(self.stop)
        return self.__enter__()

    def stop(self) -> None:
        """Leave the context, if it was entered."""
        atexit.unregister(self.stop)
        if self.recorder is not None:
            self.__exit__(None, None, None)

    def __exit__(self, kind: Any, problem: Any, trace: Any) -> None:
        self.stack.close()
        if math.isnan(self.began):
            text = "the optimizer took no step within the monitor, or its step is compiled: nothing was seen"
            self.journal.remark(text, aloud=problem is None)
        self.finish_step()
        self.log_of_steps.resolve()
        self.journal.write_steps()
        self.journal.write("end", step=self.step, share=self.share, setup_seconds=self.setup_seconds)
        self.recorder = None

    def before_step(self) -> None:
        """A step begins: gradients are there, weights are those of the pass."""
        start, recorder = time.perf_counter(), self.recorder
        assert recorder is not None
        if self.weights is not None:  # of several optimizers not all have stepped
            self.finish_sample()
        if not math.isnan(self.left):
            self.schedule.step_seconds.append(start - self.left)
        self.finish_step()
        self.look_for_groups()
        self.step += 1
        self.skipped = False
        own = not self.pending_losses
        losses, self.pending_losses = self.pending_losses or recorder.own_losses, []
        recorder.forget_losses()
        found = self.of_scaler("found_inf")
        skipped = found.detach().sum() if isinstance(found, Tensor) else None
        self.record = StepRecord(self.step, self.read_norms(losses), losses, own, skipped)
        self.light += time.perf_counter() - start
        # a skipped step says nothing of the update; processes that sample together cannot postpone it each for itself
        due = self.step >= self.schedule.next and self.ranks.takes_part
        if due and (self.ranks.together or skipped is None or not float(skipped)):
            self.sample()
        self.began = start if math.isnan(self.began) else self.began
        self.spent += time.perf_counter() - start

    def forget_losses(self) -> None:
        """A closure was called once more in a step, as in a line search: the losses of that pass are of no step."""
        if self.recorder is not None:
            self.recorder.forget_losses()
        self.pending_losses = []

    def skip_step(self) -> None:
        """A GradScaler has left out a whole step: its losses, those that are told after it too, are of no step."""
        self.finish_step()
        self.forget_losses()
        self.skipped = True

    def after_step(self) -> None:
        """A step is over: the weights are new."""
        start = time.perf_counter()
        if self.weights is not None:
            self.finish_sample()
        if self.schedule.settled and not self.thinned:
            self.thin_norms()
        if self.recorder is not None:
            self.recorder.due = self.step + 1 >= self.schedule.next
        self.left = time.perf_counter()
        self.spent += self.left - start

    # Every step ------------------------------------------------------------------------------------------------------

    def finish_step(self) -> None:
        """The losses of the last step, which may be told after it, are there."""
        record, self.record = self.record, None
        if record is not None:
            self.log_of_steps.add(record)

    def read_norms(self, losses: list[Any]) -> Tensor | None:
        """The norms of all gradients; where they are at hand, a value that is not finite is looked into at once."""
        at_once = self.log_of_steps.at_once and not self.journal.fault
        wrong = at_once and not all(math.isfinite(float(each)) for each in losses)
        norms = gradient_norms(self.parameters) if wrong or not self.step % self.norms_every else None
        if norms is None:
            return None
        scale = self.of_scaler("grad_scale")
        self.last_norms = norms = norms if scale is None else norms / scale
        if at_once and (wrong or not math.isfinite(float(norms.sum()))):
            skipped = self.of_scaler("found_inf")
            call = self.recorder.last if self.recorder is not None else None
            if call is not None and not (skipped is not None and float(skipped)) and self.ranks.takes_part:
                self.attempt(lambda: self.find_fault(call))
        return norms

    def of_scaler(self, name: str) -> Any:
        """What a GradScaler has told a fused optimizer, which divides by the scale and skips steps itself.

        Args:
            name: grad_scale, or found_inf: above 0 where the step is skipped. None where there is none.
        """
        return next((found for each in self.optimizers if (found := getattr(each, name, None)) is not None), None)

    def find_fault(self, call: Call) -> None:
        """Name the first value of a step that is not finite, before the weights change."""
        self.journal.fault = str(self.prepared(call).culprit(call))

    def thin_norms(self) -> None:
        """Compute the gradient norm less often where it alone takes half of the budget."""
        self.thinned = True
        seconds = self.light / (self.step - self.schedule.start)
        interval = 1 if self.ranks.together else self.schedule.norm_interval(seconds)
        self.schedule.other = seconds / interval
        if interval > 1:
            self.norms_every = interval
            share = f"{seconds / self.schedule.usual:.1%} of a step"
            self.journal.remark(f"the norm of all gradients takes {share}: it is computed every {interval} steps")

    def best_constant(self) -> float:
        """Loss of the best constant answer; NaN where it is not known."""
        if self.constant is not None:
            return self.constant
        return math.nan if self.sampler is None else self.sampler.constant

    # Samples ---------------------------------------------------------------------------------------------------------

    def scale(self) -> float:
        """What the loss is multiplied by."""
        if self.scaler is not None:
            return float(self.scaler.get_scale())
        scale = self.of_scaler("grad_scale")
        return 1.0 if scale is None else float(scale)

    def prepared(self, call: Call) -> SignalSampler:
        """The sampler, which finds the connections once."""
        sampler = self.sampler
        assert sampler is not None
        if not sampler.ready:
            start = time.perf_counter()
            sampler.prepare(call)
            self.setup_seconds = time.perf_counter() - start
            self.spent -= self.setup_seconds
            self.write_connections(sampler)
        return sampler

    def write_connections(self, sampler: SignalSampler) -> None:
        """Write what is sampled, and the remarks on it."""
        names = [each.name for each in sampler.connections] or list(sampler.modules)
        thing = "connections" if sampler.connections else "modules"
        self.journal.write("connections", thing=thing, names=names, setup_seconds=self.setup_seconds)
        self.write_remarks(sampler)

    def write_remarks(self, sampler: SignalSampler) -> None:
        """Write the sampler's remarks, each once."""
        for text in sampler.remarks:
            self.journal.remark(text)
        sampler.remarks.clear()

    def sample(self) -> None:
        """Take a sample of the last call, and of the weights before the step."""
        assert self.recorder is not None
        call, start = self.recorder.last, time.perf_counter()
        if call is None:
            self.schedule.next = self.step + FIRST_WAIT
            if self.step > 1:
                self.journal.remark(
                    f"the loop does not call {type(self.model).__name__} itself with gradients, so nothing is sampled: "
                    "give monitor() the module that the loop calls, compiled or wrapped as it is",
                    aloud=True,
                )
        elif self.attempt(lambda: self.read_call(call)):
            self.sample_seconds = time.perf_counter() - start - (0.0 if self.first_rows else self.setup_seconds)

    def read_call(self, call: Call) -> None:
        """Read the rows of a call, at modules where the connections cannot be measured."""
        sampler = self.prepared(call)
        if self.parameters and self.parameters[0].is_cuda:
            torch.cuda.synchronize()  # else the sample would be charged for the step
        try:
            self.rows = sampler.read(call, self.scale())
        except SkipwayError as problem:
            if not sampler.connections:
                raise
            self.journal.remark(f"the connections cannot be measured: {first_line(problem)}")
            sampler.use_modules()
            self.write_connections(sampler)
            self.rows = sampler.read(call, self.scale())
        self.write_remarks(sampler)
        self.weights = WeightSample(parameters_by_connection(sampler.inner, sampler.connections, sampler.modules))

    def attempt(self, action: Callable[[], Any]) -> bool:
        """Do what may fail on a foreign network; then no more samples are taken, and that is said."""
        try:
            action()
        except Exception as problem:  # a monitor must not end a training
            self.schedule.next, self.rows, self.weights = math.inf, {}, None
            text = f"no more samples are taken: {type(problem).__name__}: {first_line(problem)}"
            self.journal.remark(text, aloud=True)
            return False
        return True

    def finish_sample(self) -> None:
        """After the step: relative updates, the record, warnings, and when the next sample is due."""
        start = time.perf_counter()
        rows, weights, self.rows, self.weights = self.rows, self.weights, {}, None
        for name, update in weights.relative_updates().items() if weights is not None else ():
            if name in rows and not math.isnan(update):
                rows[name]["update"] = update
        self.sample_seconds += time.perf_counter() - start
        self.first_rows = self.first_rows or rows
        self.journal.write("sample", step=self.step, seconds=self.sample_seconds, rows=rows)
        call = self.recorder.last if self.recorder is not None else None
        dtype = call.autocast[0][1] if call is not None and call.autocast else self.parameters[0].dtype
        self.journal.warn(self.step, Evidence(self.first_rows, rows, dtype=dtype))
        clock = self.clock.warning(unwrap(self.model), self.step - 1)  # loops set it after the step
        if clock:
            self.journal.tell(EarlyWarning(self.step, "warm-up", "", clock, "skipway.set_step"))
        remark = self.schedule.plan(self.step, self.sample_seconds)
        if remark and not self.rarer:
            self.rarer = True
            self.journal.remark(remark)
