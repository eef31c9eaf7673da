"""A network as a file for other runtimes: ONNX, checked in onnxruntime; a program of torch.export, read again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipway.errors import MissingExtraError, SkipwayError

__all__ = ["export_onnx", "export_program"]


def export_onnx(model: nn.Module, path: str | Path, example: Tensor, *, tolerance: float | None = 1e-4) -> float | None:
    """Write `model` as it is in eval to an ONNX file, for any batch size, and check it where onnxruntime is installed.

    The file takes "images" of the example's shape, (N, …) for any N ≥ 1, and yields "outputs". `skipway.fold` before
    makes it smaller and faster. The model's mode is left as it was. Weights of more than 2 GB are written beside the
    file, as `<path>.data`.

    Args:
        model: a network that takes one tensor and returns one.
        path: of the file, by custom with the suffix `.onnx`.
        example: an input of the shape that the file is for; its batch size does not matter.
        tolerance: the largest allowed difference between onnxruntime and torch, over the largest output; None allows
            any. For half precision, say 1e-2.

    Returns:
        the largest absolute difference between the file in onnxruntime, on the CPU, and the model, over random inputs
        of two batch sizes; None where onnxruntime is not installed and nothing was checked.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        SkipwayError: no such folder, the network fixes its batch size, or the outputs differ; no file is left then.

    >>> import skipway as sw
    >>> export_onnx(sw.build("resnet20"), "model.onnx", torch.zeros(1, 3, 32, 32))  # doctest: +SKIP
    4.76837158203125e-07
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "an export to ONNX")
    path = Path(path)
    if not path.parent.is_dir():
        raise SkipwayError(f"{path}: there is no folder {path.parent}; make it first")
    with in_eval(model), torch.no_grad():
        write(model, path, example)
        if find_spec("onnxruntime") is None:
            return None
        try:
            return check(model, path, example, tolerance)
        except SkipwayError:
            path.unlink()
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
            raise


def export_program(
    model: nn.Module, path: str | Path, example: Tensor, *, extra: Mapping[str, str] | None = None
) -> float:
    """Write `model` as it is in eval to a `.pt2` file of torch.export, for any batch size, and read it again.

    Args:
        model: a network that takes one tensor and returns one.
        path: of the file, with the suffix `.pt2`.
        example: an input of the shape that the file is for; its batch size does not matter.
        extra: texts by name that go into the file, `torch.export.load`'s `extra_files`.

    Returns:
        the largest absolute difference between the file's program and the model, over random inputs of two sizes.

    Raises:
        SkipwayError: no such folder, another suffix, or the network cannot be exported; no file is left then.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise SkipwayError(f"{path}: there is no folder {path.parent}; make it first")
    if path.suffix != ".pt2":
        raise SkipwayError(f"{path}: the rule is the suffix .pt2, which torch.export asks for")
    batch = torch.cat([example, example]) if example.shape[0] == 1 else example
    with in_eval(model), torch.no_grad():
        try:
            program = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(program, path, extra_files=dict(extra or {}))
            written = torch.export.load(path).module()
        except Exception as error:  # whatever tracing meets in a network
            path.unlink(missing_ok=True)
            raise SkipwayError(f"this {type(model).__name__} cannot be exported: {error}") from error
        worst, randomness = 0.0, torch.Generator().manual_seed(0)
        for size in (1, 3):
            images = torch.randn(size, *example.shape[1:], generator=randomness, dtype=example.dtype)
            images = images.to(example.device)
            worst = max(worst, float((written(images) - model(images)).abs().max()))
    return worst


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def write(model: nn.Module, path: Path, example: Tensor) -> None:
    """Trace the model and write the file."""
    # a batch of one would be taken for a constant
    batch = torch.cat([example, example]) if example.shape[0] == 1 else example
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # torch's exporter warns about itself; and it gives attention's output, when it takes the fused kernel apart,
        # other strides than those that it was traced with, so that a view behind it fails
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            model,
            (batch,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["outputs"],
            verbose=False,
        )
    assert program is not None
    program.save(path)


def check(model: nn.Module, path: Path, example: Tensor, tolerance: float | None) -> float:
    """The largest difference between the file and the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if isinstance(size := session.get_inputs()[0].shape[0], int):
        raise SkipwayError(
            f"this {type(model).__name__} fixes its batch size at {size}: somewhere it reads the size as a plain "
            "number, as len(x) or int(x.shape[0]) do; use x.shape[0]"
        )
    worst = largest = 0.0
    randomness = torch.Generator().manual_seed(0)
    for size in (1, 3):
        images = torch.randn(size, *example.shape[1:], generator=randomness, dtype=example.dtype)
        expected = model(images.to(example.device)).cpu()
        (found,) = session.run(None, {"images": images.numpy()})
        worst = max(worst, float((torch.from_numpy(found) - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if tolerance is not None and not worst <= tolerance * largest:
        raise SkipwayError(
            f"{path} in onnxruntime differs from the model by {worst:.2g}, its largest output being {largest:.2g}; "
            f"tolerance={tolerance:g} allows {tolerance * largest:.2g}"
        )
    return worst
