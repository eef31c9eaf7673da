"""Peers' networks in OpenVINO and ONNX Runtime, as a careful user of either runs them without Skipway.

In 8-bit integers, OpenVINO's networks are quantised by NNCF with its defaults, its settings for transformers where the
network attends.

OpenVINO twice: a whole batch under its latency hint, which is its default; and pieces of a batch through its own queue
of requests under its throughput hint, which chooses streams and threads by itself (what its `benchmark_app` does), in
the best of several sizes of pieces. ONNX Runtime as its documentation starts a session, which is in float32.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from benchmarks.race.pieces import PEER, Searched, search_choices
from skipway.errors import SkipwayError
from skipway.inference.backends import Choice, convert_openvino

__all__ = [
    "CALIBRATION",
    "INT8",
    "Logits",
    "calibrated",
    "logits_of",
    "run_onnxruntime",
    "run_openvino",
    "run_openvino_queue",
]

SIZES = (1, 2, 4, 8)
INT8 = "int8"
HINTS = {"float32": "f32", "bfloat16": "bf16", INT8: "bf16"}
CALIBRATION: ContextVar[Tensor | None] = ContextVar("calibration images", default=None)


QUANTISED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Networks in integers, for the shape that they were quantised for."""


@contextmanager
def calibrated(images: Tensor) -> Iterator[None]:
    """Within it, ranges of integers are measured on these images; else on those that a network is timed with."""
    token = CALIBRATION.set(images)
    try:
        yield
    finally:
        CALIBRATION.reset(token)


class Logits(nn.Module):
    """A network that returns its logits and nothing else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images))


def logits_of(out: Any) -> Tensor:
    """Return the logits, which transformers wraps into an object."""
    return getattr(out, "logits", out)


def converted_for(network: nn.Module, images: Tensor, precision: str) -> Any:
    """OpenVINO's network for the shape of some images, in integers where they are asked for.

    Raises:
        SkipwayError: nothing of it was quantised.
    """
    if precision != INT8:
        return convert_openvino(network, images)
    if network in QUANTISED:
        with suppress(RuntimeError):  # a shape that the network made a constant of
            converted = QUANTISED[network].clone()
            converted.reshape(list(images.shape))
            return converted
    import nncf

    given = CALIBRATION.get()
    samples = images if given is None else given
    attends = any("attention" in type(module).__name__.lower() for module in network.modules())
    batches = [batch.numpy() for batch in samples.split(len(images)) if len(batch) == len(images)]
    kind = nncf.ModelType.TRANSFORMER if attends else None
    with redirect_stdout(io.StringIO()):
        converted = nncf.quantize(
            convert_openvino(network, images), nncf.Dataset(batches), model_type=kind, subset_size=len(batches)
        )
    if not any(operator.get_type_name() == "FakeQuantize" for operator in converted.get_ops()):
        raise SkipwayError("precision='int8': NNCF quantised nothing of this network")
    QUANTISED[network] = converted
    return converted.clone()


def compile_for(converted: Any, precision: str, hint: str) -> Any:
    """OpenVINO's network compiled for the CPU under a hint; streams and threads are its own choice."""
    import openvino

    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": HINTS[precision]}
    return openvino.Core().compile_model(converted, "CPU", settings)


def run_openvino(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Callable[..., Any]:
    """OpenVINO under its latency hint, a batch at a time."""
    import openvino

    compiled = compile_for(converted_for(Logits(model), images, precision), precision, "LATENCY")
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        tensor: Any = openvino.Tensor(x.contiguous().numpy(), shared_memory=True)
        return torch.from_numpy(request.infer([tensor])[0].copy())

    return run


def run_openvino_queue(model: nn.Module, images: Tensor, precision: str, known: Choice | None = None) -> Searched:
    """OpenVINO under its throughput hint: pieces of a batch through a queue of as many requests as it finds best."""
    network, batch = Logits(model), len(images)

    def build(choice: Choice) -> tuple[Callable[[Tensor], Any], Choice]:
        converted = converted_for(network, images[: batch // choice.pieces], precision)
        compiled = compile_for(converted, precision, "THROUGHPUT")
        return OpenVINOQueue(compiled, batch // choice.pieces), replace(
            choice, streams=compiled.get_property("NUM_STREAMS")
        )

    cuts = [Choice(PEER, precision, pieces=batch // size) for size in SIZES if size < batch and batch % size == 0]
    # the network as it was traced has the size of the batch; pieces are reshaped from it
    converted_for(network, images, precision)
    return search_choices([*cuts, Choice(PEER, precision)], build, images, known)


class OpenVINOQueue:
    """Pieces of a batch through a queue of requests.

    Args:
        compiled: OpenVINO's network for a piece.
        size: samples of a piece.
    """

    def __init__(self, compiled: Any, size: int) -> None:
        import openvino

        self.size, self.outputs = size, dict[int, Tensor]()
        self.queue = openvino.AsyncInferQueue(compiled)
        self.queue.set_callback(self.take)

    def take(self, request: Any, place: int) -> None:
        """Keep the output of a piece."""
        self.outputs[place] = torch.from_numpy(request.get_output_tensor(0).data.copy())

    def __call__(self, images: Tensor) -> Tensor:
        import openvino

        pieces = images.contiguous().split(self.size)
        for place, piece in enumerate(pieces):
            tensor: Any = openvino.Tensor(piece.numpy(), shared_memory=True)
            self.queue.start_async([tensor], place)
        self.queue.wait_all()
        return torch.cat([self.outputs.pop(place) for place in range(len(pieces))])


def run_onnxruntime(
    model: nn.Module, images: Tensor, precision: str, known: Choice | None = None
) -> Callable[..., Any]:
    """ONNX Runtime with the session's defaults, but for the number of threads, which is torch's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        torch.onnx.export(Logits(model), (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])
