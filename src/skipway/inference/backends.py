"""Backends that run a network in inference: torch's operators, its compiler, onnxruntime, OpenVINO; `Choice` of one."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skipway.errors import MissingExtraError, SkipwayError
from skipway.hardware.allocator import keep_memory
from skipway.inference.fused_graph import fuse_graph
from skipway.inference.inputs import describe_call
from skipway.inference.onnx import CAST, export_onnx
from skipway.inference.plain_operators import PlainOperators
from skipway.kernels.dispatch import PackedKernelMode
from skipway.registry import Registry
from skipway.surgery.acceleration import accelerate, is_routed
from skipway.surgery.side_effects import copy_state
from skipway.tracing.containers import map_tensors, tensors_in

if TYPE_CHECKING:
    from skipway.inference.quantization import QuantizedNetwork

__all__ = [
    "BACKENDS",
    "CONVERTED",
    "INT8",
    "LAYOUTS",
    "ORIGINAL",
    "PRECISIONS",
    "Backend",
    "Choice",
    "Run",
    "call_with",
    "compile_frozen",
    "compile_openvino",
    "convert_openvino_for",
    "first_tensor",
    "send_no_statistics",
]

Run = Callable[..., Any]
T = TypeVar("T")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of the products by name."""
INT8 = "int8"
"""Name of the precision of a network that has been quantised."""
LEAST, MOST = -(2**31), 2**31 - 1
"""Integers that OpenVINO computes with on a CPU."""
DOUBLE = (torch.float64, torch.complex128)
"""Types that openvino and onnxruntime compute in float32."""
NO_STATISTICS = {"CI": "true", "NNCF_CI": "1"}
"""Variables of the environment in whose presence OpenVINO and NNCF send no statistics of their use."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
"""Orders of images and their weights in memory by name."""
ORIGINAL = "original"
"""Name of the model itself among the backends."""


@dataclass(frozen=True)
class Choice:
    """One way of running a network in inference; its text leaves out what is usual.

    Args:
        backend: name in `BACKENDS`, or "original" for the model itself.
        precision: of the products: "float32", in which a network keeps the type that it has, or one that is coarser;
            "int8" of a network that has been quantised.
        pieces: number of equal parts that a batch of the example's size is cut into.
        streams: pieces that are computed at a time, each on its share of the threads.
        layout: of images in memory, a name in `LAYOUTS`.

    >>> print(Choice("openvino", "bfloat16", pieces=4, streams=2))
    openvino bfloat16, 4 pieces, 2 streams
    """

    backend: str
    precision: str = "float32"
    pieces: int = 1
    streams: int = 1
    layout: str = "contiguous"

    def __str__(self) -> str:
        parts = [f"{self.backend} {self.precision}"]
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.pieces > 1:
            parts.append(f"{self.pieces} pieces")
        if self.streams > 1:
            parts.append(f"{self.streams} streams")
        return ", ".join(parts)


@dataclass(frozen=True)
class Backend:
    """A runtime for networks in eval mode whose norms are folded.

    Args:
        build: takes a network, which it may change, an example and a choice; returns a function called like the
            network, with inputs of the example's shapes, whose outputs may have the type of the products. Several
            threads may call it at once. A choice with pieces comes with an example of one piece, on a thread of a
            stream, where `torch.get_num_threads()` is the stream's share.
        needs: packages required in addition to torch.
        extra: extra of Skipway that installs them.
        precisions: supported ones.
        devices: supported types of device; all, where none is named.
        any_call: whether it takes and returns what any network does, mappings too. The others take one tensor and
            return one, which comes back in the containers that the network returns it in.
        runs_python: whether calls run the network's Python, which may write into its arguments and call hooks.
        any_size: whether it runs tensors of other sizes than the example's as fast.
        keeps_path: whether it keeps the path through the code, and the values read there, that the example led to.
        layouts: names in `LAYOUTS` that are worth trying for images; the first one for everything else.
        frozen: whether weights or buffers are constants in what it builds, or `build` calls the network: no state that
            calls change is kept.
        packs: whether it makes constants of the weights of every `torch.nn.Linear`, and of nothing else.
        alters: whether `build` changes the network; if not, it is called with the same one every time.
        slow: whether it builds for so long that it is tried when everything else has been, and pieces at the end.
        patience: seconds that building takes for 100 modules with weights, roughly; a search goes by what it took
            instead once it has built one.
        build_quantized: builds like `build`, for the precision "int8", from a network that has been quantised.
    """

    build: Callable[[nn.Module, Any, Choice], Run]
    needs: tuple[str, ...] = ()
    extra: str = ""
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    devices: tuple[str, ...] = ()
    any_call: bool = False
    runs_python: bool = False
    any_size: bool = False
    keeps_path: bool = False
    layouts: tuple[str, ...] = ("contiguous",)
    frozen: bool = False
    packs: bool = False
    alters: bool = True
    slow: bool = False
    patience: float = 0.0
    build_quantized: Callable[[QuantizedNetwork, Any, Choice], Run] | None = None

    def obstacle(
        self, example: Any, choice: Choice, quantized: bool = False, others: Iterable[Tensor] = ()
    ) -> SkipwayError | None:
        """Return why the backend cannot be used for this input here, and for what else the network holds or returns;
        None where it can.
        """
        precision = choice.precision
        missing = next((package for package in self.needs if find_spec(package) is None), None)
        if missing is not None:
            return MissingExtraError(missing, self.extra, "this backend")
        offered = (*self.precisions, *[INT8] * (self.build_quantized is not None))
        if precision not in offered:
            return SkipwayError(f"precision={precision!r}: this backend offers {', '.join(offered)}")
        if precision == INT8 and not quantized:
            return SkipwayError(
                "precision='int8': the rule is calibration=, images like those to come, and check=, held-out images "
                "with their classes"
            )
        kind = first_tensor(example).device.type
        if self.devices and kind not in self.devices:
            return SkipwayError(f"the model is on {kind}: this backend runs on {', '.join(self.devices)}")
        if not self.any_call and not isinstance(example, Tensor):
            return SkipwayError(f"this backend takes one tensor, and the example has {describe_call(example)}")
        wide = next((each.dtype for each in (*tensors_in(example), *others) if each.dtype in DOUBLE), None)
        if not self.any_call and wide is not None:
            return SkipwayError(
                f"the model or its example is in {str(wide).removeprefix('torch.')}: this backend computes in float32 "
                "at most; give it model.float() and an example in float32, if that is enough"
            )
        return None


def prepare_model(model: nn.Module, choice: Choice) -> nn.Module:
    """Cast the model, in place, to a precision and a layout of images; in float32 it keeps the type that it has."""
    model = model if choice.precision == "float32" else model.to(dtype=PRECISIONS[choice.precision])
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:  # channels-last is a layout of images alone, and volumes may be beside them
            tensor.data = tensor.data.contiguous(memory_format=LAYOUTS[choice.layout])
    return model


def prepare_input(x: Any, choice: Choice) -> Any:
    """Cast an input as `prepare_model` casts the model, if it is a tensor; caches have to stay the same objects."""
    if not isinstance(x, Tensor):
        return x
    x = x.to(PRECISIONS[choice.precision]) if choice.precision != "float32" and x.is_floating_point() else x
    return x.contiguous(memory_format=LAYOUTS[choice.layout]) if x.ndim == 4 else x


def call_prepared(model: Callable[..., Any], choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a prepared model."""
    given = {name: prepare_input(value, choice) for name, value in kwargs.items()}
    return model(*(prepare_input(value, choice) for value in args), **given)


def first_tensor(example: Any) -> Tensor:
    """The first tensor of an example."""
    return next(tensors_in(example))


def call_with(function: Callable[..., Any], example: Any) -> Any:
    """Call a function with an example; what it writes into of the example's objects, caches for example, is a copy."""
    if isinstance(example, Mapping):
        return function(**copy_state(dict(example)))
    return function(*copy_state(example)) if isinstance(example, tuple) else function(example)


def compile_frozen(model: nn.Module, example: Any, choice: Choice) -> Run:
    """Return the model compiled for inputs like the example, its weights folded and packed as constants.

    Freezing is passed as an option of the compiler, too: without it, a second model of a class would run the code that
    was compiled, not frozen, for the first.
    """
    from torch._inductor import config

    forward = torch.compile(model, dynamic=False, options={"freezing": True})
    with config.patch(freezing=True), torch.no_grad():
        call_with(lambda *args, **kwargs: call_prepared(forward, choice, args, kwargs), example)
    return forward


def build_torch(model: nn.Module, example: Any, choice: Choice) -> Run:
    """torch's own operators, as they are."""
    return partial(run_prepared, prepare_model(model, choice), choice)


def run_prepared(model: Callable[..., Any], choice: Choice, /, *args: Any, **kwargs: Any) -> Any:
    """Call a prepared model, with freed memory kept for the next call."""
    with keep_memory(release=False):
        return call_prepared(model, choice, args, kwargs)


def build_eager(model: nn.Module, example: Any, choice: Choice) -> Run:
    """torch's operators with Skipway's kernels and packed weights; freed memory is kept for the next call."""
    model = prepare_model(model, choice)
    x = first_tensor(example)
    rows = x.shape[0] * (x[0, 0].numel() // 64 if x.ndim == 4 else 1) if x.is_floating_point() else x.numel()
    packed = PackedKernelMode(model, max(rows, 1))

    def run(*args: Any, **kwargs: Any) -> Any:
        with packed:
            return run_prepared(model, choice, *args, **kwargs)

    return run


def build_fused(model: nn.Module, example: Any, choice: Choice) -> Run:
    """The graph of the network's operators with what follows a product computed within it, see `fuse_graph`."""

    def as_chosen(function: Run, /, *args: Any, **kwargs: Any) -> Any:  # operators are chosen for types and layouts
        given, named = map_tensors(partial(without_gaps, choice), (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return run_prepared(function, choice, *given, **named)

    graph = call_with(partial(as_chosen, partial(fuse_graph, prepare_model(model, choice))), example)
    return partial(as_chosen, graph)


def without_gaps(choice: Choice, x: Tensor) -> Tensor:
    """A tensor in the layout of a choice."""
    return x.contiguous(memory_format=LAYOUTS[choice.layout] if x.ndim == 4 else torch.contiguous_format)


def build_inductor(model: nn.Module, example: Any, choice: Choice) -> Run:
    """torch's compiler with frozen weights; on a GPU with Skipway's kernels."""
    model = prepare_model(model, choice)
    if first_tensor(example).is_cuda and not any(map(is_routed, model.modules())):
        accelerate(model)
    return partial(run_prepared, compile_frozen(model, example, choice), choice)


def build_compiled(model: nn.Module, example: Any, choice: Choice) -> Run:
    """torch's compiler as it is."""
    return partial(run_prepared, torch.compile(prepare_model(model, choice), dynamic=False), choice)


def build_onnxruntime(model: nn.Module, example: Tensor, choice: Choice) -> Run:
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


def build_openvino(model: nn.Module, example: Tensor, choice: Choice) -> Run:
    """OpenVINO on the CPU, through its own conversion of traced modules; a request for each thread that calls."""
    return compile_openvino(convert_openvino(model, example), choice)


CONVERTED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Networks as OpenVINO has them: converting takes longer than compiling."""


def convert_openvino(model: nn.Module, example: Tensor) -> Any:
    """Convert a network for the shape of an example, from an earlier conversion for another shape where that goes: a
    network that makes a constant of its batch, Swin's masks for one, is converted once more with that side left open.
    """
    known = CONVERTED.get(model)
    if known is None:
        CONVERTED[model] = convert_openvino_for(model, example, example.shape)
        return CONVERTED[model].clone()
    before = [side.get_length() if side.is_static else -1 for side in known.inputs[0].partial_shape]
    changed = [side if side == other else -1 for side, other in zip(example.shape, before, strict=True)]
    with suppress(RuntimeError):  # a shape that the network made a constant of
        return reshape_openvino(known, example)
    with suppress(RuntimeError):
        general = convert_openvino_for(model, example, changed)
        reshaped = reshape_openvino(general, example)
        CONVERTED[model] = general
        return reshaped
    return convert_openvino_for(model, example, example.shape)


def reshape_openvino(converted: Any, example: Tensor) -> Any:
    """A copy of a converted network for the shape of an example.

    Raises:
        RuntimeError: the shape is not the network's.
    """
    copy = converted.clone()
    copy.reshape(list(example.shape))
    return copy


def convert_openvino_for(model: nn.Module, example: Tensor, shape: Sequence[int]) -> Any:
    """Convert a network, its operators replaced by `PlainOperators`, for images of a shape, -1 for a side that is left
    open. A side stays closed where the network makes a constant of it.
    """
    import openvino
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    with warnings.catch_warnings(), send_no_statistics():
        warnings.simplefilter("ignore")  # the tracer warns about every Python branch
        try:
            with PlainOperators():
                return openvino.convert_model(model, example_input=example, input=[tuple(shape)])
        except RuntimeError:  # traced twice, the graphs differ: torchvision's Swin
            sides = {axis: torch.export.Dim.AUTO for axis, side in enumerate(shape) if side == -1}
            # a side of 1 is always made a constant of
            sample = example.repeat(
                [2 if axis in sides and side == 1 else 1 for axis, side in enumerate(example.shape)]
            )
            program = torch.export.export(model, (sample,), dynamic_shapes=(sides,), strict=False)
            (given,) = program.graph_signature.user_inputs
            (found,) = (node.meta["val"].shape for node in program.graph.nodes if node.name == given)
            converted = openvino.convert_model(program)  # with sides open that the program has made constants of
            converted.reshape([int(side) if is_concrete_int(side) else -1 for side in found])
            return converted


@contextmanager
def send_no_statistics() -> Iterator[None]:
    """Context in which OpenVINO and NNCF do not report to their makers that they are used."""
    before = {name: os.environ.get(name) for name in NO_STATISTICS}
    os.environ.update(NO_STATISTICS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def build_openvino_quantized(quantized: QuantizedNetwork, example: Tensor, choice: Choice) -> Run:
    """OpenVINO on the CPU, in 8-bit integers but for what the network has in float."""
    return compile_openvino(quantized.network(tuple(example.shape)), choice, quantized.rest)


def compile_openvino(converted: Any, choice: Choice, precision: str | None = None) -> Run:
    """A function that runs a converted model in the streams of a choice; what is in float, in that of the choice or in
    another of OpenVINO's precisions.
    """
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision or {"float32": "f32"}.get(choice.precision, "bf16"),
        "PERFORMANCE_HINT": "LATENCY" if choice.streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": choice.streams,
        "INFERENCE_NUM_THREADS": torch.get_num_threads() * choice.streams,
    }

    def compile_network() -> tuple[Any, list[Any]]:
        return openvino.Core().compile_model(converted, "CPU", settings), []

    here = in_each_process(compile_network)

    def run(x: Tensor) -> Tensor:
        if x.dtype == torch.int64 and x.numel() and not LEAST <= int(x.min()) <= int(x.max()) <= MOST:
            raise SkipwayError(
                f"integers from {int(x.min())} to {int(x.max())}: OpenVINO has 32 bits for them; optimize the model "
                "with other backends=, or give it smaller ones"
            )
        compiled, requests = here()
        try:
            request = requests.pop()  # popping and appending are atomic
        except IndexError:
            request = compiled.create_infer_request()
        given = x.contiguous()
        tensor: Any = openvino.Tensor(given.numpy(), shared_memory=True)
        try:
            request.start_async([tensor])  # on threads of the engine's: those of torch's streams are slower by a tenth
        finally:
            request.wait()  # also after Ctrl-C: the engine reads the memory of x until it is done
        output = torch.from_numpy(request.get_output_tensor(0).data.copy())
        requests.append(request)
        return output

    return run


def in_each_process(make: Callable[[], T]) -> Callable[[], T]:
    """A function that returns what was made in this process. In a forked process, which has none of the threads of its
    parent, it is made again.
    """
    made = {os.getpid(): make()}

    def here() -> T:
        process = os.getpid()
        if process not in made:
            made[process] = make()
        return made[process]

    return here


BACKENDS: Registry[Backend] = Registry("backend")
"""Backends by name, in the order in which they are tried: those that are expected to be the fastest first."""
BOTH = ("contiguous", "channels-last")
LAST = ("channels-last",)
BACKENDS.add(
    "openvino",
    Backend(
        build_openvino,
        ("openvino",),
        "openvino",
        devices=("cpu",),
        keeps_path=True,
        frozen=True,
        alters=False,
        patience=20.0,
        build_quantized=build_openvino_quantized,
    ),
)
BACKENDS.add(
    "fused",
    Backend(build_fused, devices=("cpu",), any_call=True, keeps_path=True, layouts=LAST, frozen=True, patience=4.0),
)
BACKENDS.add("eager", Backend(build_eager, any_call=True, runs_python=True, any_size=True, layouts=LAST, packs=True))
BACKENDS.add("torch", Backend(build_torch, any_call=True, runs_python=True, any_size=True, layouts=BOTH))
BACKENDS.add(
    "inductor",
    Backend(build_inductor, any_call=True, runs_python=True, layouts=LAST, frozen=True, slow=True, patience=25.0),
)
BACKENDS.add(
    "onnxruntime",
    Backend(
        build_onnxruntime,
        ("onnx", "onnxscript", "onnxruntime"),
        "onnx",
        ("float32",),
        ("cpu",),
        frozen=True,
        slow=True,
        patience=30.0,
    ),
)
BACKENDS.add("compiled", Backend(build_compiled, any_call=True, runs_python=True, slow=True, patience=30.0))
