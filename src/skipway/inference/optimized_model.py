"""`optimize(model, example)`: a network for inference, run in the fastest way on this machine that agrees with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from skipway.checkpoint.files import write_atomically
from skipway.errors import SkipwayError, counted, first_line, printable, suggest, warn_caller
from skipway.hardware.processor import cpu_flags
from skipway.inference.answer_check import AnswerChange, AnswerCheck, collect_images, collect_labelled
from skipway.inference.backend_search import BackendSearch
from skipway.inference.backend_selection import BackendComparison, BackendResult
from skipway.inference.backends import BACKENDS, CONVERTED, INT8, ORIGINAL, PRECISIONS, Choice, Run
from skipway.inference.batch_pieces import BatchAxes, CallForm, argument_kind, arguments_of
from skipway.inference.choice_memory import describe_machine_and_versions, load_choice, save_choice, search_facts
from skipway.inference.onnx import check_path
from skipway.inference.quantization import CALIBRATION_IMAGES, QuantizedNetwork, require_nncf, saturates, saturates_on
from skipway.tracing.containers import tensors_in
from skipway.tracing.example import Example, as_example
from skipway.validation import check_least, check_positive, check_rule, check_tolerance

__all__ = ["GOALS", "OptimizedModel", "load_optimized", "optimize"]

GOALS = ("throughput", "latency")
ANY = "any"
AGAIN = "optimize the model that it was made from again"
FORMAT = 1
REMEMBERED_FROM = 2.0
"""Seconds of a search that is worth a file."""
SHOWN = 8
"""Names of layers in a text."""
SEPARATOR = "; "
"""Between remarks."""
REMEMBERED = "remembered from an earlier search, and verified; cache=False searches anew"


class OptimizedModel(nn.Module):
    """A network for inference; called like the one it was made from, by any number of threads, and it returns what that
    returns. Where every call writes into the network, `remark` says so, and that one thread at a time may call it.

    The choice is built for arguments like the example's: tensors of the same shapes, types and devices, and equal other
    values; torch's own operators take other shapes, too. Where samples do not depend on each other, batches of other
    sizes run in pieces of the same size. Everything else, a further mask or a cache, goes through a copy of the model
    in plain torch, with a warning the first time.
    It does not train, move, take other weights or be copied: `optimize` the network again; `save` writes it to a file.

    Args:
        choice: how it is run.
        report: one result per choice that was tried, the original first.
        run: the chosen backend.
        original: a copy of the model in eval mode, for calls of another kind.
        example: what the backend was built for.
        axes: of the samples; None where they depend on each other.
        any_size: whether `run` takes tensors of any shape.
        quantized: the network in int8, where there is one, chosen or not.
        answer: what the choice changes on the held-out images, where there were some.
        remark: what else there is to know about the choice.
    """

    def __init__(
        self,
        choice: Choice,
        report: Sequence[BackendResult],
        run: Run,
        original: nn.Module,
        example: Any,
        axes: BatchAxes | None = None,
        any_size: bool = False,
        quantized: QuantizedNetwork | None = None,
        answer: AnswerChange | None = None,
        remark: str = "",
    ) -> None:
        super().__init__()
        self.choice, self.report, self.example, self.axes = choice, list(report), example, axes
        self.any_size, self.quantized, self.answer, self.remark = any_size, quantized, answer, remark
        self.original: nn.Module = original.eval()
        self.__dict__["run"] = run  # which may be the original
        self.form = CallForm.of(original, example)
        self.kinds = self.kinds_of(*arguments_of(example))
        self.remarked = False
        super().train(False)

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self.choice.backend

    @property
    def precision(self) -> str:
        """The precision of the products."""
        return self.choice.precision

    @property
    def float_layers(self) -> tuple[str, ...]:
        """The names of the layers with weights that are not in 8-bit integers, where the others are."""
        return self.quantized.float_layers if self.quantized is not None and self.precision == INT8 else ()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.form.bring(args, kwargs)
        if self.kinds_of(args, kwargs) == self.kinds:
            return self.__dict__["run"](*args, **kwargs)
        if not self.remarked:
            self.remarked = True
            warn_caller(
                f"arguments of other shapes, types or names than those it was optimized for: such calls run "
                f"in plain torch, not in {self.choice}; optimize the model for an example of theirs, too"
            )
        return self.original(*args, **kwargs)

    def kinds_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments with shape, type and device in place of each tensor, without what may differ; an object that
        compares by its identity, a cache for example, counts by its class.
        """
        if not self.any_size and self.axes is not None and self.axes.count(args, kwargs):
            args, kwargs = self.axes.cut(args, kwargs, 0, 1)
        return tree_map(partial(argument_kind, any_size=self.any_size), (args, kwargs))

    @property
    def speedup(self) -> float:
        """Seconds of the original over those of the choice, on the example."""
        chosen = next(each for each in self.report if each.choice == self.choice)
        return self.report[0].seconds / chosen.seconds

    def train(self, mode: bool = True) -> Self:
        """Raise unless `mode` is False: what is built does not train."""
        if mode:
            raise SkipwayError(f"an optimized model does not train; {AGAIN}")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for tensor in self.original.state_dict().values():
            probe = fn(tensor[:0] if tensor.ndim else tensor)
            if (probe.device, probe.dtype) != (tensor.device, tensor.dtype):
                raise SkipwayError(f"an optimized model stays on its device and in its types; {AGAIN}")
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: what is built has its weights within."""
        raise SkipwayError(
            f"an optimized model keeps its weights; load them into the model it was made from, and {AGAIN}"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SkipwayError(
            "an optimized model cannot be pickled or copied, since it holds what other libraries have compiled; write "
            "it by optimized.save(path) and read it by skipway.load_optimized(path), or share one: any number of "
            "threads may call it"
        )

    def save(self, path: str | Path) -> Path:
        """Write the network, the choice and the example to a file for `skipway.load_optimized`.

        The network is pickled, as by `torch.save(model)`: its classes have to be importable where it is loaded.

        Raises:
            SkipwayError: the network cannot be pickled, or the file cannot be written.
        """
        path = check_path(path)
        stored = {
            "format": FORMAT,
            "machine": describe_machine_and_versions(),
            "choice": asdict(self.choice),
            "report": [asdict(each) for each in self.report],
            "model": self.original,
            "example": self.example,
            "quantized": self.quantized if self.precision == INT8 else None,
            "answer": self.answer,
            "remark": self.remark,
        }
        try:
            write_atomically(path, lambda partial: torch.save(stored, partial))
        except OSError as error:
            raise SkipwayError(f"path={printable(path)}: {error}") from error
        except Exception as error:  # pickle, and what objects raise in it
            raise SkipwayError(
                f"this {type(stored['model']).__name__} cannot be pickled: {first_line(error)}"
            ) from error
        return path

    def sentences(self) -> list[str]:
        """What there is to know about the choice besides its speed."""
        found = [self.remark] if self.remark else []
        if self.answer is not None:
            found += [str(self.answer), *[self.answer.doubt] * bool(self.answer.doubt)]
        if self.quantized is not None and self.precision == INT8:
            names = ", ".join(self.float_layers[:SHOWN]) + ", …" * (len(self.float_layers) > SHOWN)
            layers = f"{len(self.float_layers)} of {counted(len(self.quantized.layers), 'layer')} in float"
            found.append(f"{layers}: {names}" if names else layers)
        return found

    def __str__(self) -> str:
        lines = [f"{self.choice}: {self.speedup:.2f} times as fast as the original", *self.sentences()]
        width = max(len(str(each.choice)) for each in self.report)
        rows = sorted(self.report, key=lambda each: (bool(each.note), not each.in_turns, each.seconds))
        for each in rows:
            figures = (
                f"{each.seconds * 1e3:8.2f} ms, differs by {each.difference:.1e}, built in {each.build_seconds:.1f} s"
                + ", given up early" * (not each.in_turns)
            )
            lines.append(f"  {each.choice!s:<{width}} {each.note or figures}")
        return "\n".join(lines)


def as_precisions(precisions: str | Sequence[str] | None, calibrated: bool = False) -> tuple[str, ...]:
    """The names of precisions, from one, several, "any" or None for float32; int8 is one where there is a calibration.

    >>> as_precisions(None), as_precisions("bfloat16"), as_precisions("any")
    (('float32',), ('bfloat16',), ('float32', 'bfloat16'))
    """
    if precisions is None:
        return ("float32",)
    known = (*PRECISIONS, INT8)
    every = known if calibrated else tuple(PRECISIONS)
    names = every if precisions == ANY else (precisions,) if isinstance(precisions, str) else precisions
    for name in names:
        if name not in known:
            raise SkipwayError(f"precisions={name!r}: the rule is some of {', '.join(known)}, or any")
    if not names:
        raise SkipwayError("precisions=(): the rule is at least one")
    return tuple(dict.fromkeys(names))


def show_progress(line: str) -> None:
    """Show a line in place of the one before, on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()


def optimize(
    model: nn.Module,
    example: Example,
    *,
    goal: str = "throughput",
    precisions: str | Sequence[str] | None = None,
    backends: str | Sequence[str] | None = None,
    tolerance: float | None = None,
    seconds: float = 60.0,
    patience: float | None = None,
    calibration: Any = None,
    check: Any = None,
    limit: float = 0.005,
    progress: Callable[[str], None] | None = None,
    cache: bool = True,
) -> OptimizedModel:
    """Return a new network for inference, run in the fastest way on this machine that agrees with the model; the model
    stays as it is.

    A copy of the model is put into eval mode and folded (`skipway.fuse`: norms and gains multiplied into the weights).
    Backends × precisions × layouts × pieces of the batch × streams are tried: each is built for the example's shape,
    compared with the original on the example and, if it takes that, on random input of its shape, and timed. Those near
    the fastest are then timed in turns, the original among them, and the fastest is taken; so the result is no slower
    than torch, its compiler (frozen or not) and channels-last, as far as the time allowed to try them. A choice that
    fails or differs is in the report with the reason, and the others go on. What the model writes into tensors of its
    arguments counts as its output, what it puts into lists and caches does not. Where calls change what the model
    holds, the result starts as the model is, and no backend that makes constants of it is taken.

    Args:
        model: any module.
        example: what the model is called with, in the batch size to optimize for, on the model's device. openvino and
            onnxruntime take one tensor and return one; the others take and return whatever the model does.
        goal: "throughput" of batches like the example, or "latency" of its first sample alone.
        precisions: of the products: one or several of "float32", the default, in which a model keeps its type, and
            coarser ones, which change results: "bfloat16", and "int8" with `calibration` and `check`; "any" for all.
            Inputs and outputs keep their type, and caches that are returned have that of the products.
        backends: one or several names from `skipway.inference.BACKENDS`; by default all that are installed, and the
            model itself.
        tolerance: largest difference allowed over the largest output, and share of the whole numbers (tokens, classes)
            that may be others, which is said then; by default 1e-3 in float32 and 5e-2 in bfloat16.
        seconds: time of the search. Backends are tried in the order of what they are expected to gain; what there is no
            time for is in the report, and the remark says which `seconds` it takes. Quantising for int8 comes before.
        patience: seconds, within that, for finding the layers that go back to float; by default as long as `seconds`.
            Where they are not found, there is no int8, and the report says so.
        calibration: images like those to come, for int8, which is then tried as `skipway.quantize` describes: a tensor,
            or an iterable of batches, whose labels are left out.
        check: held-out images with their classes, (images, labels) or an iterable of such batches. A choice is then
            taken only if it classifies them as well as the original but for `limit`.
        limit: largest fall of the accuracy on these images, as a share of them.
        progress: called with a line about each step; by default they are shown on a terminal.
        cache: remember the choice of a search of 2 s or more in Skipway's cache folder for this machine, these
            versions, this structure and such an example, where it is verified again but not searched for again; False
            searches anew and keeps nothing.

    Raises:
        MissingExtraError: a backend given by name is not installed.
        SkipwayError: an unknown goal, precision or backend, a backend given by name that takes one tensor only, an
            output without tensors, samples that depend on each other where the goal is latency, or no backend that
            agrees.

    >>> import skipway as sw
    >>> fast = optimize(sw.build("resnet20"), torch.randn(2, 3, 32, 32), backends=["eager"])
    >>> fast.backend, fast(torch.randn(2, 3, 32, 32)).shape
    ('eager', torch.Size([2, 10]))
    """
    allowed = as_precisions(precisions, calibration is not None)
    if goal not in GOALS:
        raise SkipwayError(suggest("goal", goal, GOALS))
    check_positive("seconds", seconds)
    if patience is not None:
        check_least("patience", patience, 0)
    if tolerance is not None:
        check_tolerance("tolerance", tolerance)
    if isinstance(backends, str):
        backends = (backends,)
    check_rule("backends", backends, backends is None or len(backends) > 0, f"some of {', '.join(BACKENDS)}, or None")
    names = [ORIGINAL, *BACKENDS] if backends is None else list(dict.fromkeys(map(BACKENDS.name_of, backends)))
    given = as_example(example)
    given = given[0] if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], Tensor) else given
    ready = calibration is not None and check is not None
    for name in () if backends is None else names:
        problems = [BACKENDS[name].obstacle(given, Choice(name, each), ready) for each in allowed]
        if all(problems):
            raise problems[0] or SkipwayError(name)
    if INT8 in allowed:
        require_nncf()
        if not ready:
            raise BACKENDS["openvino"].obstacle(given, Choice("openvino", INT8)) or SkipwayError(INT8)
    overlap, show = "", progress or show_progress
    comparison = BackendComparison(model, given)
    if goal == "latency":
        comparison = BackendComparison(model, first_sample(comparison))
    if check is not None:
        watch_answers(comparison, check, limit)
    if INT8 in allowed and "openvino" in names:
        images = fitting(collect_images(calibration, CALIBRATION_IMAGES), comparison.example, "calibration")
        overlap = comparison.check.overlap(images) if comparison.check is not None else ""
        comparison.quantize(images, show, seconds if patience is None else patience)
    asked, cache = (goal, allowed, tuple(names), tolerance), cache and check is None
    facts = search_facts(comparison.pristine, comparison.example, asked) if cache else {}
    search = BackendSearch(comparison, names, allowed, seconds, tolerance, goal == "throughput", show)
    known = load_choice(facts) if cache else None
    if known is not None and search.confirm(known):
        chosen, remark = known, REMEMBERED
    else:
        chosen, remark = search.run().choice, search.missing()
        if cache and search.complete and search.spent >= REMEMBERED_FROM:
            remark = save_choice(facts, chosen)
    if progress is None:
        show("")
    return assemble(comparison, chosen, SEPARATOR.join(filter(None, (remark, overlap))))


def watch_answers(comparison: BackendComparison, check: Any, limit: float) -> None:
    """Have a comparison keep the answers on held-out images.

    Raises:
        SkipwayError: they are no such images, or the original does not know them.
    """
    example = comparison.example
    images, labels = collect_labelled(check)
    batch = len(example) if isinstance(example, Tensor) and example.ndim else 1
    comparison.check = AnswerCheck(fitting(images, example, "check"), labels, limit, batch)
    comparison.check.watch(comparison.at_start(Choice(ORIGINAL))[1])


def fitting(images: Tensor, example: Any, name: str) -> Tensor:
    """Images on the device of an example and in its type.

    Raises:
        SkipwayError: they have another shape.
    """
    if not isinstance(example, Tensor):
        raise SkipwayError(f"{name}: the rule is a model whose example is one tensor")
    if images.shape[1:] != example.shape[1:]:
        raise SkipwayError(
            f"{name}: images of shape {tuple(images.shape[1:])}, and the example has {tuple(example.shape[1:])}; the "
            "rule is the shape that the model is run with"
        )
    return images.to(example)


def assemble(comparison: BackendComparison, choice: Choice, remark: str = "") -> OptimizedModel:
    """The optimized model of a choice that was built."""
    remark = SEPARATOR.join(filter(None, (remark, *comparison.remarks(choice))))
    CONVERTED.pop(comparison.folded, None)  # no more choices are built of it
    report, (run, original) = list(comparison.results.values()), comparison.at_start(choice)
    any_size = choice.pieces == 1 and (choice.backend == ORIGINAL or BACKENDS[choice.backend].any_size)
    example, axes = comparison.example, comparison.axes
    quantized, answer = comparison.quantized, comparison.answers.get(choice)
    return OptimizedModel(choice, report, run, original, example, axes, any_size, quantized, answer, remark)


def load_optimized(path: str | Path) -> OptimizedModel:
    """Return the optimized model that `OptimizedModel.save` wrote: its backend is built again, and compared with the
    network in plain torch by the tolerance of the search; nothing is searched for.

    The file holds a pickle, which can run any code: load only files whose origin you trust.

    Raises:
        MissingExtraError: its backend is not installed.
        SkipwayError: there is no such file, it is none of these files or cannot be unpickled, the backend fails or
            differs here, or products of its 8-bit weights overflow on this processor, or may, where what it has is not
            known.
    """
    path = Path(path)
    try:
        stored = torch.load(path, weights_only=False)
        choice = Choice(**stored["choice"])
        report = [BackendResult(Choice(**row.pop("choice")), **row) for row in stored["report"]]
    except FileNotFoundError as error:
        raise SkipwayError(f"path={printable(path)}: there is no such file") from error
    except Exception as error:  # pickle, and what objects raise in it
        raise SkipwayError(
            f"path={printable(path)}: no file that optimized.save(path) wrote, or one that cannot be read here: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    quantized, answer = stored.get("quantized"), stored.get("answer")
    if quantized is not None and "fits_any" not in vars(quantized):  # of older versions
        quantized = replace(quantized, fits_any=saturates_on(stored["machine"]["processor"]))
    if quantized is not None and saturates() and not quantized.fits_any:
        effect = "overflow on this one, an x86 without VNNI"
        if not cpu_flags():
            effect = "overflow on an x86 without VNNI, which this one may be: only Linux says what a processor has"
        raise SkipwayError(
            f"path={printable(path)}: its weights have 8 bits, as it was made on another processor, and sums of their "
            f"products {effect}; {AGAIN} here, which gives them 7 bits"
        )
    comparison = BackendComparison(stored["model"], stored["example"], quantized=quantized)
    if choice.backend != ORIGINAL:
        problem = BACKENDS[choice.backend].obstacle(comparison.example, choice, comparison.quantized is not None)
        if problem is not None:
            raise problem
        comparison.add(choice, next((each.tolerance for each in report if each.choice == choice), None))
    if choice not in comparison.runs:
        raise SkipwayError(f"path={printable(path)}: {choice}: {comparison.results[choice].note}; {AGAIN}")
    loaded, before, here = assemble(comparison, choice), stored.get("remark", ""), describe_machine_and_versions()
    remarks = [before, *[each for each in loaded.remark.split(SEPARATOR) if each not in before.split(SEPARATOR)]]
    differs = [name for name, value in stored["machine"].items() if value != here.get(name)]
    if differs:
        remarks.append(f"chosen with another {', '.join(differs)}; {AGAIN} for what is the fastest here")
    if answer is not None and "processor" in differs:
        remarks.append(f"its answers were checked on {stored['machine']['processor'][0]}, not on this processor")
    loaded.remark = SEPARATOR.join(filter(None, remarks))
    loaded.report, loaded.answer = report, answer
    return loaded


def first_sample(comparison: BackendComparison) -> Any:
    """The example's first sample; an example of one sample as it is.

    Raises:
        SkipwayError: its samples depend on each other, or its batches are not cut.
    """
    if comparison.axes is None:
        if all(len(each) == 1 for each in tensors_in(comparison.example) if each.ndim):
            return comparison.example
        raise SkipwayError(
            "goal='latency': the samples of this model's batches depend on each other, so one cannot be taken alone"
            f"{comparison.whole and ' (' + comparison.whole + ')'}; the rule is goal='throughput' with an example of "
            "one sample"
        )
    args, kwargs = comparison.axes.cut(*arguments_of(comparison.example), 0, 1)
    return kwargs or (args[0] if len(args) == 1 else args)
