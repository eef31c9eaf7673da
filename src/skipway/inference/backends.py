"""What runs a network in inference: torch's operators, its compiler, onnxruntime, OpenVINO."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import MissingExtraError, SkipwayError
from skipway.hardware.allocator import keep_memory
from skipway.inference.onnx import export_onnx
from skipway.kernels.dispatch import PackedKernelMode
from skipway.registry import Registry
from skipway.surgery.acceleration import accelerate, is_routed

__all__ = ["BACKENDS", "PRECISIONS", "Backend", "frozen"]

Run = Callable[[Tensor], Tensor]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What products are computed in."""


@dataclass(frozen=True)
class Backend:
    """One way to run a network that is in eval and folded.

    Args:
        build: a network, an example input and a precision → what takes inputs of the example's shape.
        needs: packages beside torch.
        extra: the extra of Skipway that installs them.
        precisions: those that it offers.
        devices: the types of device that it runs on; any, where none is named.
    """

    build: Callable[[nn.Module, Tensor, str], Run]
    needs: tuple[str, ...] = ()
    extra: str = ""
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    devices: tuple[str, ...] = ()

    def obstacle(self, example: Tensor, precision: str) -> SkipwayError | None:
        """Why it cannot be used here; None where it can."""
        missing = next((package for package in self.needs if find_spec(package) is None), None)
        if missing is not None:
            return MissingExtraError(missing, self.extra, "this backend")
        if precision not in self.precisions:
            return SkipwayError(f"precision={precision!r}: this backend offers {', '.join(self.precisions)}")
        if self.devices and example.device.type not in self.devices:
            return SkipwayError(
                f"the model is on {example.device.type}: this backend runs on {', '.join(self.devices)}"
            )
        return None


def laid_out(model: nn.Module, precision: str) -> nn.Module:
    """The model in a precision, its maps channels-last, in place; in float32 it keeps the type that it has."""
    model = model if precision == "float32" else model.to(dtype=PRECISIONS[precision])
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def entering(x: Tensor, precision: str) -> Tensor:
    """An input as a model that is `laid_out` takes it."""
    x = x if precision == "float32" else x.to(PRECISIONS[precision])
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def frozen(model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """Compiled for inputs like the example with the weights as constants, which are folded and packed.

    It is an option of the compiler as well: without one of its own, a second model of a class would be run by what was
    compiled, unfrozen, for the first.
    """
    from torch._inductor import config

    forward = torch.compile(model, dynamic=False, options={"freezing": True})
    with config.patch(freezing=True), torch.no_grad():
        forward(example)
    return forward


def eager(model: nn.Module, example: Tensor, precision: str) -> Run:
    """torch's own operators, channels-last, with kernels, packed weights, and freed memory kept during the call."""
    model = laid_out(model, precision)
    rows = example.shape[0] * (example[0, 0].numel() // 64 if example.ndim == 4 else 1)
    packed = PackedKernelMode(model, max(rows, 1))

    def run(x: Tensor) -> Tensor:
        with keep_memory(release=False), packed:
            return model(entering(x, precision)).to(x.dtype)

    return run


def inductor(model: nn.Module, example: Tensor, precision: str) -> Run:
    """torch's compiler with weights as constants, folded and packed for the machine; on a GPU with our kernels."""
    model = laid_out(model, precision)
    if example.is_cuda and not any(map(is_routed, model.modules())):
        accelerate(model)
    compiled = frozen(model, entering(example, precision))

    def run(x: Tensor) -> Tensor:
        with keep_memory(release=False):
            return compiled(entering(x, precision)).to(x.dtype)

    return run


def onnxruntime(model: nn.Module, example: Tensor, precision: str) -> Run:
    """onnxruntime on the CPU, through an export to ONNX."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, example, tolerance=None)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])

    return run


def openvino(model: nn.Module, example: Tensor, precision: str) -> Run:
    """OpenVINO on the CPU, through its own reader of torch's traces."""
    import openvino

    core = openvino.Core()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer tells of every Python branch
        converted = openvino.convert_model(model, example_input=example, input=[tuple(example.shape)])
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(converted, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        tensor: Any = openvino.Tensor(x.contiguous().numpy(), shared_memory=True)
        return torch.from_numpy(request.infer([tensor])[0].copy())

    return run


BACKENDS: Registry[Backend] = Registry("backend")
"""Backends by name, those that are ready at once first."""
BACKENDS.add("eager", Backend(eager))
BACKENDS.add("openvino", Backend(openvino, ("openvino",), "openvino", devices=("cpu",)))
BACKENDS.add("onnxruntime", Backend(onnxruntime, ("onnx", "onnxscript", "onnxruntime"), "onnx", ("float32",), ("cpu",)))
BACKENDS.add("inductor", Backend(inductor))
