"""Export of a network to files for other runtimes: ONNX and torch.export, each compared with the network."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipway.checkpoint.files import file_aside
from skipway.errors import MissingExtraError, SkipwayError, printable, spell
from skipway.inference.inputs import call_for_tensor, root_cause, single_tensor
from skipway.inference.modes import eval_mode
from skipway.nn import Multiply, ResidualWarmup, warmup_state
from skipway.tracing.example import Example
from skipway.tracing.module_state import copy_module
from skipway.tracing.restoration import preserved_state

__all__ = ["CAST", "Sides", "export_onnx", "export_program"]

Sides = Literal["dynamic", "fixed"]
Write = Callable[[nn.Module, Path, Tensor, bool], None]
Verify = Callable[[nn.Module, Path, list[Tensor]], float | None]

CAST = (torch.bfloat16, torch.float64)
"""Types in which onnxruntime lacks operators on a CPU, convolutions among them."""
STEPS = (1, 2, 4, 7, 8, 14, 16, 32)
"""Steps in which networks take the sides of images: patches, windows, strides."""
STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Where the exporter leaves paths and lines of code of this machine with each node."""
FURTHEST = 2**20
"""A side up to which a program has to hold that is said to take any."""


class OpsetError(SkipwayError):
    """A network cannot be written by this version of the operators, whatever its sides."""


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    tolerance: float | None = 1e-4,
    sides: Sides = "dynamic",
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    remark: Callable[[str], None] = warnings.warn,
) -> float | None:
    """Write a model in eval mode to an ONNX file for any batch size, and for any image size where the model allows it,
    and check the file in onnxruntime where that is installed; the model stays as it is.

    The file's input is "images", or "ids" for whole numbers, its output "outputs". A model fused by `skipway.fuse`
    gives a smaller and faster file. Weights of more than 2 GB are written beside it, to `<path>.data`. A model in
    bfloat16 or float64 is written in float32, which onnxruntime runs.

    Args:
        model: a network that takes one tensor and returns one.
        example: an input of the shape that the file is for: a tensor, or a `DataLoader` whose first batch is one. The
            batch size does not matter.
        path: of the file, by custom with the suffix `.onnx`.
        tolerance: largest difference allowed between onnxruntime and torch, over the largest output; None allows any.
            Half precision needs some 1e-2.
        sides: "dynamic": the axes after the channels may have other lengths than the example's, if the file then
            agrees with the model at the example's and at larger ones; else they are fixed, and a remark says why.
        opset: version of the ONNX operators; by default the exporter's.
        metadata: texts by name that are stored in the file.
        remark: called with a sentence about a decision: sides that are fixed, a type that was converted, a residual
            warm-up (`prores`) that has not ended and is written with the factors that it stands at; and where nothing
            was checked.

    Returns:
        the largest absolute difference between the file in onnxruntime, on the CPU, and the model, over random inputs
        of two batch sizes; None where onnxruntime is not installed and nothing was checked.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        SkipwayError: no such folder, an example of several tensors, a network that cannot be exported, that fixes its
            batch size or gives no tensor, or outputs that differ. No file is left then, nor after Ctrl-C, and a file
            that was there before stays.

    >>> import skipway as sw
    >>> export_onnx(sw.build("resnet20"), torch.zeros(1, 3, 32, 32), "model.onnx")  # doctest: +SKIP
    4.76837158203125e-07
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "an export to ONNX")
    path, given = check_path(path), single_tensor(example)
    model, given = in_float32(freeze_warmups(model, remark), given, remark)

    def write(model: nn.Module, file: Path, images: Tensor, free: bool) -> None:
        write_onnx_file(model, file, images, free, opset, metadata or {})

    def verify(model: nn.Module, file: Path, batches: list[Tensor]) -> float | None:
        return verify_onnx(model, file, batches, tolerance) if find_spec("onnxruntime") is not None else None

    difference = export_verified(model, given, path, sides, write, verify, remark)
    if difference is None:
        remark(f"{printable(path)} was not compared with the model, since onnxruntime is not installed")
    return difference


def export_program(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    tolerance: float | None = 1e-4,
    sides: Sides = "dynamic",
    extra: Mapping[str, str] | None = None,
    remark: Callable[[str], None] = warnings.warn,
) -> float:
    """Write a model in eval mode to a `.pt2` file of torch.export for any batch size, and for any image size where the
    model allows it, and check the file; the model is not changed.

    Args:
        model: a network that takes one tensor and returns one.
        example: an input of the shape that the file is for: a tensor, or a `DataLoader` whose first batch is one. The
            batch size does not matter.
        path: of the file, with the suffix `.pt2`.
        tolerance: largest difference allowed between the file's program and the model, over the largest output; None
            allows any.
        sides: see `export_onnx`.
        extra: texts by name that are stored in the file, `torch.export.load`'s `extra_files`.
        remark: called with a sentence if the sides are fixed, or a residual warm-up (`prores`) has not ended.

    Returns:
        the largest absolute difference between the file's program and the model, over random inputs of two batch sizes.

    Raises:
        SkipwayError: no such folder, another suffix, an example of several tensors, a network that cannot be exported,
            or outputs that differ; no file is left then.
    """
    path, given = check_path(path), single_tensor(example)
    if path.suffix != ".pt2":
        raise SkipwayError(f"{printable(path)}: the rule is the suffix .pt2, which torch.export requires")
    model = freeze_warmups(model, remark)

    def write(model: nn.Module, file: Path, images: Tensor, free: bool) -> None:
        program = torch.export.export(model, (images,), dynamic_shapes=(free_axes(images, free),))
        refuse_limits(program)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it holds paths of this machine
        torch.export.save(program, file, extra_files=dict(extra or {}))

    def verify(model: nn.Module, file: Path, batches: list[Tensor]) -> float:
        written = torch.export.load(file).module()
        pairs = [(model(images.clone()), written(images.clone())) for images in batches]
        return check_agreement(pairs, printable(file.name), tolerance)

    difference = export_verified(model, given, path, sides, write, verify, remark)
    assert difference is not None
    return difference


def export_verified(
    model: nn.Module,
    given: Tensor,
    path: Path,
    sides: Sides,
    write: Write,
    verify: Verify,
    remark: Callable[[str], None],
) -> float | None:
    """Write a file with free sides if it agrees with the model at two sizes, else with fixed ones, and move it to its
    place only then.
    """
    if sides not in get_args(Sides):
        raise SkipwayError(f"{spell('sides', sides)}: the rule is dynamic or fixed")
    with preserved_state(model), eval_mode(model), torch.no_grad(), file_aside(path) as file:
        call_for_tensor(model, given.clone())  # networks may write into what they are given
        batches = random_batches(given)
        others, fault = other_sizes(model, given) if sides == "dynamic" else ([], "")
        if others:
            try:
                # traced at the largest, since sides of length 1 within the network would count as constants
                write(model, file, at_least_two(others[-1]), True)
                return verify(model, file, [*batches, *others])
            except OpsetError:
                raise
            except Exception as error:  # the exporter and the runtime raise whatever they like
                fault = f"with free sides the export fails: {root_cause(error)}"
        try:
            write(model, file, at_least_two(given), False)
            difference = verify(model, file, batches)
        except (SkipwayError, OSError):
            raise
        except Exception as error:  # as above
            raise SkipwayError(f"this {type(model).__name__} cannot be exported: {root_cause(error)}") from error
        if fault:
            remark(f"{printable(path)} is for images of {sides_of(given)} only: {fault}")
        return difference


def check_path(path: str | Path) -> Path:
    """Return the path of a file to write; refuse one in a folder that does not exist, and a folder."""
    path = Path(path)
    if not os.path.isdir(path.parent):
        raise SkipwayError(f"{printable(path)}: there is no folder {printable(path.parent)}; make it first")
    if os.path.isdir(path):  # False for a name that is too long
        raise SkipwayError(f"{printable(path)} is a folder; give the name of a file")
    return path


def freeze_warmups(model: nn.Module, remark: Callable[[str], None]) -> nn.Module:
    """A model whose residual warm-ups are the constants that they stand at; a copy where it has some."""
    state = warmup_state(model)
    if state is None:
        return model
    twin = copied(model, "give one without a residual warm-up")
    for name, module in list(twin.named_modules()):
        if isinstance(module, ResidualWarmup):
            factor = float(module.factor())
            twin.set_submodule(name, Multiply(factor) if factor != 1 else nn.Identity())
    if state.running:
        remark(f"the residual warm-up stands at {state}; the file holds these factors as constants")
    return twin


def copied(model: nn.Module, remedy: str) -> nn.Module:
    """A copy of a model."""
    try:
        return copy_module(model)
    except Exception as error:  # a module that refuses to be copied
        raise SkipwayError(f"this {type(model).__name__} cannot be copied ({root_cause(error)}); {remedy}") from error


def in_float32(model: nn.Module, given: Tensor, remark: Callable[[str], None]) -> tuple[nn.Module, Tensor]:
    """A model and its input in a type that onnxruntime runs; a copy where they have another."""
    types = {tensor.dtype for tensor in (given, *model.parameters(), *model.buffers())}
    foreign = [kind for kind in CAST if kind in types]
    if not foreign:
        return model, given
    reason = f"onnxruntime does not run {name_of(foreign[0])}, so give model.float()"
    twin = copied(model, reason).float()
    remark(f"the file computes in float32, since onnxruntime does not run {name_of(foreign[0])} on a CPU")
    return twin, given.float() if given.is_floating_point() else given


def name_of(kind: torch.dtype) -> str:
    """The name of a type of numbers."""
    return str(kind).removeprefix("torch.")


def at_least_two(example: Tensor) -> Tensor:
    """Repeat a batch of one: exporters take its size for a constant."""
    return torch.cat([example, example]) if example.shape[0] == 1 else example


def random_batches(example: Tensor) -> list[Tensor]:
    """Inputs of the example's shape and type, of one sample and of three: random numbers, or the example's own."""
    generator = torch.Generator().manual_seed(0)
    if not example.is_floating_point():
        return [example[[number % len(example) for number in range(size)]] for size in (1, 3)]
    shapes = [(size, *example.shape[1:]) for size in (1, 3)]
    batches = (torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
    return [images.to(example) for images in batches]


def other_sizes(model: nn.Module, example: Tensor) -> tuple[list[Tensor], str]:
    """Inputs with other sides, odd multiples of the smallest step that the model allows, the largest last; without
    any, the reason.
    """
    if example.ndim != 4 or not example.is_floating_point():
        return [], ""
    count, channels, height, width = example.shape
    generator, fault = torch.Generator().manual_seed(1), ""

    def sample(high: int, wide: int) -> Tensor:
        return torch.randn(count, channels, high, wide, generator=generator, device="cpu").to(example)

    for step in sorted({*STEPS, height}):
        half = max(height // (2 * step), 1) * step
        made = [
            sample(height + step, width + 2 * step),
            sample(height + half, width + 2 * half + step),
            sample(3 * height + step, width + 4 * step),
            sample(2 * height + 3 * step, 2 * width + step),
        ]
        try:
            for images in made:
                model(images.clone())
        except Exception as error:  # a network raises whatever it likes
            fault = f"the network fails at {sides_of(made[0])}: {root_cause(error)}"
        else:
            return made, ""
    return [], fault


def sides_of(images: Tensor) -> str:
    """The sides of images in words."""
    return " x ".join(map(str, images.shape[2:] or images.shape[1:]))


def free_axes(images: Tensor, free: bool) -> dict[int, Any]:
    """The axes that may have any length: samples, and the sides if they are free."""
    dim = torch.export.Dim
    return {0: dim("batch"), **{axis: dim.DYNAMIC for axis in range(2, images.ndim) if free}}


def refuse_limits(program: torch.export.ExportedProgram) -> None:
    """Refuse a program that holds only up to some length of an axis, since it was traced for a case.

    Raises:
        SkipwayError: it does.
    """
    for values in program.range_constraints.values():
        if bool(values.upper < FURTHEST):
            raise SkipwayError(f"the traced program holds only for {values.lower} to {values.upper} along an axis")


@contextmanager
def quiet_converter() -> Iterator[None]:
    """Without the traceback that the converter of opsets logs where it fails: the caller gets an error of one line."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_onnx_file(
    model: nn.Module, path: Path, images: Tensor, free: bool, opset: int | None, metadata: Mapping[str, str]
) -> None:
    """Trace the model and write the file."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), quiet_converter():
        # torch's exporter warns about its own code. It decomposes fused attention into operators whose output has other
        # strides than the traced one, so that a later view fails: the plain form is traced instead
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=(free_axes(images, free),),
            input_names=["images" if images.is_floating_point() else "ids"],
            output_names=["outputs"],
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    if program.exported_program is not None:
        refuse_limits(program.exported_program)
    written = program.model.opset_imports.get("", opset)
    if opset is not None and written != opset:
        raise OpsetError(f"{spell('opset', opset)}: this network can be written by opset {written}, not by this one")
    program.model.metadata_props.update(metadata)
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop(STACK_TRACE, None)
    program.save(path)


def verify_onnx(model: nn.Module, path: Path, batches: list[Tensor], tolerance: float | None) -> float:
    """Return the largest difference between the file in onnxruntime and the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told from here
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if isinstance(size := session.get_inputs()[0].shape[0], int):
        raise SkipwayError(
            f"this {type(model).__name__} fixes its batch size at {size}: it reads the size as a plain number, "
            "by len(x) or int(x.shape[0]); use x.shape[0]"
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for images in batches:
        expected = model(images.clone()).cpu()
        outputs = np.asarray(session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})[0])
        if outputs.shape != tuple(expected.shape):
            raise SkipwayError(
                f"{printable(path.name)} in onnxruntime gives {outputs.shape} for images of {sides_of(images)}, the "
                f"model {tuple(expected.shape)}"
            )
        pairs.append((expected, torch.from_numpy(outputs)))
    return check_agreement(pairs, f"{printable(path.name)} in onnxruntime", tolerance)


def check_agreement(pairs: Sequence[tuple[Tensor, Tensor]], what: str, tolerance: float | None) -> float:
    """The largest difference between outputs of the model and of a file; infinite where one is not a number.

    Args:
        pairs: outputs of the model, and of the file.
        what: the file, for the message.
        tolerance: see `export_onnx`.

    Raises:
        SkipwayError: they differ by more.
    """
    worst = max(float(gap_of(*pair).max()) for pair in pairs)
    largest = max(float(expected.abs().where(expected.isfinite(), 0).max()) for expected, _ in pairs)
    if tolerance is not None and not worst <= tolerance * largest:
        half = any(expected.dtype in (torch.float16, torch.bfloat16) for expected, _ in pairs)
        raise SkipwayError(
            f"{what} differs from the model by {worst:.2g}, where the largest output is {largest:.2g}; "
            f"{spell('tolerance', tolerance)} allows {tolerance * largest:.2g}"
            + ("; outputs that are not numbers differ from all others" if worst == float("inf") else "")
            + ("; half precision needs some 1e-2, or give model.float()" if half else "")
        )
    return worst


def gap_of(expected: Tensor, given: Tensor) -> Tensor:
    """The difference of each value: 0 where they are equal, infinite ones included, infinite for what is no number."""
    gap = (given - expected).abs().masked_fill(given == expected, 0)
    return gap.nan_to_num(float("inf"), float("inf"))
