"""Export of a network to files for other runtimes: ONNX and torch.export, each compared with the network."""

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
from skipway.inference.inputs import single_tensor
from skipway.tracing.example import Example

__all__ = ["export_onnx", "export_program"]


def export_onnx(
    model: nn.Module, example: Example, path: str | Path, *, tolerance: float | None = 1e-4
) -> float | None:
    """Write a model in eval mode to an ONNX file for any batch size, and check the file in onnxruntime where that is
    installed; the model stays as it is.

    The file's input "images" has the example's shape, (N, …) for any N ≥ 1; its output is "outputs". A model fused by
    `skipway.fuse` gives a smaller and faster file. Weights of more than 2 GB are written beside it, to `<path>.data`.

    Args:
        model: a network that takes one tensor and returns one.
        example: an input of the shape that the file is for: a tensor, or a `DataLoader` whose first batch is one. The
            batch size does not matter.
        path: of the file, by custom with the suffix `.onnx`.
        tolerance: largest difference allowed between onnxruntime and torch, over the largest output; None allows any.
            Half precision needs some 1e-2.

    Returns:
        the largest absolute difference between the file in onnxruntime, on the CPU, and the model, over random inputs
        of two batch sizes; None where onnxruntime is not installed and nothing was checked.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        SkipwayError: no such folder, an example of several tensors, a network that fixes its batch size, or outputs
            that differ; no file is left then.

    >>> import skipway as sw
    >>> export_onnx(sw.build("resnet20"), torch.zeros(1, 3, 32, 32), "model.onnx")  # doctest: +SKIP
    4.76837158203125e-07
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "an export to ONNX")
    path, given = existing_folder(path), single_tensor(example)
    with eval_mode(model), torch.no_grad():
        write_onnx_file(model, path, given)
        if find_spec("onnxruntime") is None:
            return None
        try:
            return verify_onnx(model, path, given, tolerance)
        except SkipwayError:
            path.unlink()
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
            raise


def export_program(
    model: nn.Module, example: Example, path: str | Path, *, extra: Mapping[str, str] | None = None
) -> float:
    """Write a model in eval mode to a `.pt2` file of torch.export for any batch size, and check the file; the model is
    not changed.

    Args:
        model: a network that takes one tensor and returns one.
        example: an input of the shape that the file is for: a tensor, or a `DataLoader` whose first batch is one. The
            batch size does not matter.
        path: of the file, with the suffix `.pt2`.
        extra: texts by name that are stored in the file, `torch.export.load`'s `extra_files`.

    Returns:
        the largest absolute difference between the file's program and the model, over random inputs of two batch sizes.

    Raises:
        SkipwayError: no such folder, another suffix, an example of several tensors, or a network that cannot be
            exported; no file is left then.
    """
    path, given = existing_folder(path), single_tensor(example)
    if path.suffix != ".pt2":
        raise SkipwayError(f"{path}: the rule is the suffix .pt2, which torch.export requires")
    with eval_mode(model), torch.no_grad():
        try:
            program = torch.export.export(
                model, (at_least_two(given),), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            torch.export.save(program, path, extra_files=dict(extra or {}))
            written = torch.export.load(path).module()
        except Exception as error:  # tracing raises whatever the network makes it raise
            path.unlink(missing_ok=True)
            raise SkipwayError(f"this {type(model).__name__} cannot be exported: {error}") from error
        return max(float((written(images) - model(images)).abs().max()) for images in random_batches(given))


def existing_folder(path: str | Path) -> Path:
    """Return the path; refuse one in a folder that does not exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise SkipwayError(f"{path}: there is no folder {path.parent}; make it first")
    return path


def at_least_two(example: Tensor) -> Tensor:
    """Repeat a batch of one: exporters take its size for a constant."""
    return torch.cat([example, example]) if example.shape[0] == 1 else example


def random_batches(example: Tensor) -> Iterator[Tensor]:
    """Yield random inputs of the example's shape and type, of one sample and of three."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 3):
        images = torch.randn(size, *example.shape[1:], generator=generator, dtype=example.dtype)
        yield images.to(example.device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within the context; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def write_onnx_file(model: nn.Module, path: Path, example: Tensor) -> None:
    """Trace the model and write the file."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # torch's exporter warns about its own code. It decomposes fused attention into operators whose output has other
        # strides than the traced one, so that a later view fails: the plain form is traced instead
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            model,
            (at_least_two(example),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["outputs"],
            verbose=False,
        )
    assert program is not None
    program.save(path)


def verify_onnx(model: nn.Module, path: Path, example: Tensor, tolerance: float | None) -> float:
    """Return the largest difference between the file in onnxruntime and the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if isinstance(size := session.get_inputs()[0].shape[0], int):
        raise SkipwayError(
            f"this {type(model).__name__} fixes its batch size at {size}: it reads the size as a plain number, "
            "by len(x) or int(x.shape[0]); use x.shape[0]"
        )
    worst = largest = 0.0
    for images in random_batches(example):
        expected = model(images).cpu()
        (found,) = session.run(None, {"images": images.cpu().numpy()})
        worst = max(worst, float((torch.from_numpy(found) - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if tolerance is not None and not worst <= tolerance * largest:
        raise SkipwayError(
            f"{path} in onnxruntime differs from the model by {worst:.2g}, where the largest output is {largest:.2g}; "
            f"tolerance={tolerance:g} allows {tolerance * largest:.2g}"
        )
    return worst
