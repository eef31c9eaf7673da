"""Backends that run a network in inference: torch's operators, its compiler, onnxruntime, OpenVINO."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import MissingExtraError, SkipwayError
from skipway.hardware.allocator import keep_memory
from skipway.inference.inputs import describe_call
from skipway.inference.onnx import CAST, export_onnx
from skipway.kernels.dispatch import PackedKernelMode
from skipway.registry import Registry
from skipway.surgery.acceleration import accelerate, is_routed
from skipway.surgery.side_effects import copy_state
from skipway.tracing.containers import tensors_in

__all__ = ["BACKENDS", "PRECISIONS", "Backend", "Run", "call_with", "compile_frozen"]

Run = Callable[..., Any]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of the products by name."""


@dataclass(frozen=True)
class Backend:
    """A runtime for networks in eval mode whose norms are folded.

    Args:
        build: takes a network, which it may change, an example and a precision; returns a function called like the
            network, with inputs of the example's shapes, whose outputs may have the type of the products.
        needs: packages required in addition to torch.
        extra: extra of Skipway that installs them.
        precisions: supported ones.
        devices: supported types of device; all, where none is named.
        any_call: whether it takes and returns what any network does, caches and mappings too, and not one tensor only.
    """

    build: Callable[[nn.Module, Any, str], Run]
    needs: tuple[str, ...] = ()
    extra: str = ""
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    devices: tuple[str, ...] = ()
    any_call: bool = False

    def obstacle(self, example: Any, precision: str) -> SkipwayError | None:
        """Return why the backend cannot be used for this input here; None where it can."""
        missing = next((package for package in self.needs if find_spec(package) is None), None)
        if missing is not None:
            return MissingExtraError(missing, self.extra, "this backend")
        if precision not in self.precisions:
            return SkipwayError(f"precision={precision!r}: this backend offers {', '.join(self.precisions)}")
        kind = first_tensor(example).device.type
        if self.devices and kind not in self.devices:
            return SkipwayError(f"the model is on {kind}: this backend runs on {', '.join(self.devices)}")
        if not self.any_call and not isinstance(example, Tensor):
            return SkipwayError(f"this backend takes one tensor, and the example has {describe_call(example)}")
        return None


def prepare_model(model: nn.Module, precision: str) -> nn.Module:
    """Cast the model, in place, to a precision and to channels-last; in float32 it keeps the type that it has."""
    model = model if precision == "float32" else model.to(dtype=PRECISIONS[precision])
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def prepare_input(x: Any, precision: str) -> Any:
    """Cast an input as `prepare_model` casts the model, if it is a tensor; caches have to stay the same objects."""
    if not isinstance(x, Tensor):
        return x
    x = x.to(PRECISIONS[precision]) if precision != "float32" and x.is_floating_point() else x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def call_prepared(model: Callable[..., Any], precision: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a prepared model."""
    given = {name: prepare_input(value, precision) for name, value in kwargs.items()}
    return model(*(prepare_input(value, precision) for value in args), **given)


def first_tensor(example: Any) -> Tensor:
    """The first tensor of an example."""
    return next(tensors_in(example))


def call_with(function: Callable[..., Any], example: Any) -> Any:
    """Call a function with an example; what it writes into of the example's objects, caches for example, is a copy."""
    if isinstance(example, Mapping):
        return function(**copy_state(dict(example)))
    return function(*copy_state(example)) if isinstance(example, tuple) else function(example)


def compile_frozen(model: nn.Module, example: Any, precision: str) -> Run:
    """Return the model compiled for inputs like the example, its weights folded and packed as constants.

    Freezing is passed as an option of the compiler, too: without it, a second model of a class would run the code that
    was compiled, not frozen, for the first.
    """
    from torch._inductor import config

    forward = torch.compile(model, dynamic=False, options={"freezing": True})
    with config.patch(freezing=True), torch.no_grad():
        call_with(lambda *args, **kwargs: call_prepared(forward, precision, args, kwargs), example)
    return forward


def build_eager(model: nn.Module, example: Any, precision: str) -> Run:
    """torch's own operators, channels-last, with kernels and packed weights; freed memory is kept for the next call."""
    model = prepare_model(model, precision)
    x = first_tensor(example)
    rows = x.shape[0] * (x[0, 0].numel() // 64 if x.ndim == 4 else 1) if x.is_floating_point() else x.numel()
    packed = PackedKernelMode(model, max(rows, 1))

    def run(*args: Any, **kwargs: Any) -> Any:
        with keep_memory(release=False), packed:
            return call_prepared(model, precision, args, kwargs)

    return run


def build_inductor(model: nn.Module, example: Any, precision: str) -> Run:
    """torch's compiler with frozen weights; on a GPU with Skipway's kernels."""
    model = prepare_model(model, precision)
    if first_tensor(example).is_cuda and not any(map(is_routed, model.modules())):
        accelerate(model)
    compiled = compile_frozen(model, example, precision)

    def run(*args: Any, **kwargs: Any) -> Any:
        with keep_memory(release=False):
            return call_prepared(compiled, precision, args, kwargs)

    return run


def build_onnxruntime(model: nn.Module, example: Tensor, precision: str) -> Run:
    """onnxruntime on the CPU, through an export to ONNX."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, example, path, tolerance=None, sides="fixed", remark=lambda sentence: None)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        given = x.float() if x.dtype in CAST else x
        return torch.from_numpy(session.run(None, {name: given.contiguous().numpy()})[0])

    return run


def build_openvino(model: nn.Module, example: Tensor, precision: str) -> Run:
    """OpenVINO on the CPU, through its own conversion of traced modules."""
    import openvino

    core = openvino.Core()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about every Python branch
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
"""Backends by name, those that build fastest first."""
BACKENDS.add("eager", Backend(build_eager, any_call=True))
BACKENDS.add("openvino", Backend(build_openvino, ("openvino",), "openvino", devices=("cpu",)))
BACKENDS.add(
    "onnxruntime", Backend(build_onnxruntime, ("onnx", "onnxscript", "onnxruntime"), "onnx", ("float32",), ("cpu",))
)
BACKENDS.add("inductor", Backend(build_inductor, any_call=True))
