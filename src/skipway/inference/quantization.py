"""Post-training quantisation to 8-bit integers by NNCF on OpenVINO: the network of any batch size, and what it keeps.

Weights become integers with a scale per output channel, inputs of layers integers with one scale, which is measured on
calibration images (Jacob et al. 2018, arXiv:1712.05877). Networks with attention are quantised by NNCF's settings for
transformers, where wide channels of the inputs of products are evened out first (SmoothQuant: Xiao et al. 2023,
arXiv:2211.10438). Where the accuracy falls, layers go back to float, those first whose return mends
most answers (`nncf.quantize_with_accuracy_control`).
"""

from __future__ import annotations

import io
import logging
import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import MissingExtraError, SkipwayError
from skipway.hardware.device import choose_precision
from skipway.hardware.processor import cpu_precisions
from skipway.inference.answer_check import AnswerChange, AnswerCheck
from skipway.inference.backends import BACKENDS, INT8, Backend, Choice, convert_openvino_for, send_no_statistics
from skipway.inference.batch_pieces import BatchAxes, build_run
from skipway.inference.timer import error_line

__all__ = ["CALIBRATION_IMAGES", "QuantizedNetwork", "has_attention", "quantize_checked", "require_nncf"]

CALIBRATION_IMAGES = 300
"""Images that ranges are measured on, NNCF's default."""
RANKING_IMAGES = 128
"""Held-out images that layers are ranked by: the batches whose answers changed most."""
FIRST_PASSES = 3
"""Calls before layers are sent back: with one batch, with all held-out images in float, and in integers."""
TIE = 1e-6
"""Weight of the probability of the right class beside a right answer: it ranks layers that mend as many answers."""
LAYERS = ("Convolution", "GroupConvolution", "MatMul")
"""OpenVINO's operators that have weights and are quantised."""
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Convert", "Split", "VariadicSplit", "Slice", "StridedSlice")
"""Operators that move numbers and compute none."""
SCALES = ("Convert", "Multiply", "Subtract", "FakeQuantize", *MOVES)
"""Operators between integer weights and the layer that takes them."""


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network in 8-bit integers for batches of any size, as OpenVINO stores it.

    Args:
        xml: its operators.
        weights: its constants.
        layers: names of the layers with weights, as in the network that was quantised.
        float_layers: those of them that stay in float.
        rest: precision of what is not in integers, "bf16" or "f32", OpenVINO's names.
        example: a batch that it was verified on.
        outputs: what it gives for it; None before it is verified.
        answer: what it changes on the held-out images; None before it is verified.
        fits_any: whether its weights are so small that sums of two products overflow on no processor, see `saturates`.
    """

    xml: bytes
    weights: bytes
    layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    rest: str
    example: Tensor
    outputs: Tensor | None = None
    answer: AnswerChange | None = None
    fits_any: bool = False

    def network(self, shape: tuple[int, ...] | None = None) -> Any:
        """The `openvino.Model`, for one shape of the input or, without, for batches of any size."""
        import openvino

        network = openvino.Core().read_model(self.xml, self.weights)
        if shape is not None:
            network.reshape(list(shape))
        return network

    def on(self, backend: Backend) -> Backend:
        """A backend that builds this network in place of the one that it is given."""
        build = backend.build_quantized
        assert build is not None
        return replace(backend, build=lambda model, example, choice: build(self, example, choice))


def quantize_checked(
    model: nn.Module,
    example: Any,
    axes: BatchAxes | None,
    calibration: Tensor,
    check: AnswerCheck,
    tell: Callable[[str], None],
    patience: float = math.inf,
) -> QuantizedNetwork:
    """Quantise a network as `quantize_network` does, build it for the example, and check its answers as it then runs.

    What stays in float is in bfloat16 where the processor has that and the answers are kept, else in float32.

    Args:
        model: a network in eval mode.
        example: an input.
        axes: of the samples.
        calibration: images that ranges are measured on.
        check: held-out images; those that the original classifies correctly are known.
        tell: called with a line about each step.
        patience: see `quantize_network`.

    Raises:
        SkipwayError: the network cannot be quantised, not within the time, or not without losing more of its
            answers than the limit.
    """
    choice, backend = Choice("openvino", INT8), BACKENDS["openvino"]
    problem = backend.obstacle(example, choice, quantized=True)
    if problem is not None:
        raise problem
    if axes is None or axes.inputs != (0,) or axes.outputs != (0,):
        raise SkipwayError("precision='int8': the rule is samples along the first axis, independent of each other")
    native = choose_precision("auto", example.device)[0] == "bfloat16"
    change = None
    try:
        found = quantize_network(model, example, calibration, check, tell, patience)
        for rest in ("bf16", "f32") if native else ("f32",):
            found = replace(found, rest=rest)
            run = build_run(found.on(backend), model, example, choice, axes)
            change = check.change(run)
            if change.kept:
                return replace(found, outputs=run(found.example), answer=change)
    except SkipwayError:
        raise
    except Exception as error:  # NNCF and OpenVINO raise whatever they like
        raise SkipwayError(f"precision='int8': failed: {error_line(error)}") from error
    assert change is not None
    raise SkipwayError(change.refusal)


def quantize_network(
    model: nn.Module,
    example: Tensor,
    calibration: Tensor,
    check: AnswerCheck,
    tell: Callable[[str], None],
    patience: float = math.inf,
) -> QuantizedNetwork:
    """Quantise a network in eval mode, with as many layers in float as its answers need, as far as NNCF can tell.

    Args:
        model: a network that takes one float32 tensor (N, …) and returns scores of classes (N, K); it stays as it is.
        example: an input.
        calibration: images (N, …) that ranges are measured on.
        check: held-out images.
        tell: called with a line about each step.
        patience: seconds for the search for layers that go back to float, which begins once all are quantised.

    Raises:
        SkipwayError: the network cannot be converted or quantised, or the search found no end in the time.
    """
    nncf = import_nncf()
    if example.dtype != torch.float32:
        kind = str(example.dtype).removeprefix("torch.")
        raise SkipwayError(f"precision='int8': the rule is a model and images in float32, and they are in {kind}")
    network = convert_any_batch(model, example)
    names = weighted_layers(network)
    if not names:
        raise SkipwayError("precision='int8': the network has no convolution or matrix product with weights")
    attends = has_attention(network)
    kind = "a network with attention" if attends else "a network without attention"
    tell(f"int8: {kind}, {len(names)} layers, ranges of {len(calibration)} images")
    shown, passes, until = sys.stdout, 0, math.inf

    def say(line: str) -> None:
        with redirect_stdout(shown):
            tell(line)

    def validate(compiled: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, list[float]]:
        nonlocal passes, until
        passes += 1
        if passes == FIRST_PASSES + 1:
            until = time.monotonic() + patience
        elif time.monotonic() > until:
            raise SkipwayError(
                f"precision='int8': with all layers in integers too many answers change, and which of them to return "
                f"to float was not known after {patience:g} s; patience={max(60.0, 10 * patience):g} gives it more time"
            )
        say(f"int8: held-out images, pass {passes}")
        scores = [batch_scores(torch.from_numpy(compiled([x.numpy()])[0]), labels) for x, labels in batches]
        found = torch.cat(scores)
        return float(found.mean()), [float(each.mean()) for each in scores]

    with quiet():
        quantized = nncf.quantize_with_accuracy_control(
            network,
            calibration_dataset=nncf.Dataset([image[None].numpy() for image in calibration]),
            validation_dataset=nncf.Dataset(check.batches(), lambda batch: batch[0].numpy()),
            validation_fn=validate,
            max_drop=check.limit + TIE,  # probabilities alone may fall by as much
            drop_type=nncf.DropType.ABSOLUTE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER if attends else None,
            advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if saturates() else nncf.OverflowFix.DISABLE
            ),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=max(1, RANKING_IMAGES // check.batch), num_ranking_workers=1
            ),
        )
    kept = set(weighted_layers(quantized, integers=True))
    if not kept:
        raise SkipwayError("precision='int8': no layer keeps the answers in int8: all of them went back to float")
    left = tuple(name for name in names if name not in kept)
    probe = check.batches()[0][0].clone()  # and not a view of all images, which a file would hold
    return QuantizedNetwork(*as_bytes(quantized), names, left, "f32", probe, fits_any=saturates())


def batch_scores(outputs: Tensor, labels: Tensor) -> Tensor:
    """How well images are classified: 1 for a right answer, and for what is left a little of its probability, (N,).

    NNCF ranks layers by the mean, and by it judges whether the answers are kept. Where it ranks them by differences of
    outputs instead, it returns those first to float that matter least (3.4).

    >>> batch_scores(torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([1, 0])).round(decimals=4).tolist()
    [1.0, 0.0]
    """
    outputs = outputs[: len(labels)].double()
    likely = outputs.softmax(1).gather(1, labels[:, None])[:, 0]
    return (outputs.argmax(1) == labels).double() + TIE * likely


def saturates() -> bool:
    """Whether sums of two products of 8-bit integers overflow on this processor: x86 without VNNI adds them up in 16
    bits; so may any x86 where the system does not say what it has. Weights then have 7 bits.
    """
    return saturates_on(cpu_precisions())


def saturates_on(units: Iterable[str]) -> bool:
    """Whether they overflow on a processor of this kind with these units."""
    return platform.machine() in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni"} & set(units)


def require_nncf() -> None:
    """Raise where NNCF or OpenVINO is not installed.

    Raises:
        MissingExtraError: one of them is not.
    """
    for package in ("nncf", "openvino"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "int8", "int8")


def import_nncf() -> Any:
    """Import NNCF, which then sends no statistics of its use."""
    with send_no_statistics():
        import nncf

    return nncf


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which NNCF shows no bars and logs errors alone: what happens is told by the caller."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), send_no_statistics():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def convert_any_batch(model: nn.Module, example: Tensor) -> Any:
    """Convert a network for batches of any size.

    Raises:
        SkipwayError: it fixes the size of its batches.
    """
    network = convert_openvino_for(model, example, (-1, *example.shape[1:]))
    if len(network.outputs) != 1 or network.output(0).partial_shape[0].is_static:
        raise SkipwayError(
            "precision='int8': the network fixes the size of its batches: it reads the size as a plain number, by "
            "len(x) or int(x.shape[0]); use x.shape[0]"
        )
    for port, name in ((network.input(0), "images"), (network.output(0), "outputs")):
        port.get_tensor().set_names({name})
    return network


def as_bytes(network: Any) -> tuple[bytes, bytes]:
    """Operators and constants of a network, in OpenVINO's format."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(network, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def layer_name(operator: Any) -> str:
    """The module that an operator comes from, or the operator's own name.

    >>> from types import SimpleNamespace
    >>> layer_name(SimpleNamespace(get_friendly_name=lambda: "__module.stem.conv/aten::_convolution/Convolution"))
    'stem.conv'
    """
    name = operator.get_friendly_name()
    return name.partition("/")[0].removeprefix("__module.") if name.startswith("__module.") else name


def sources_of(operator: Any, port: int, through: tuple[str, ...]) -> Iterator[Any]:
    """The operators that an input of an operator comes from, on the way through some kinds of operators, those too."""
    node = operator.input_value(port).get_node()
    yield node
    if node.get_type_name() in through:
        yield from sources_of(node, 0, through)


def weighted_layers(network: Any, integers: bool = False) -> tuple[str, ...]:
    """Names of the layers with weights, in order, of all or of those alone that compute in integers."""
    names: dict[str, None] = {}
    for operator in network.get_ordered_ops():
        if operator.get_type_name() not in LAYERS:
            continue
        for port in (0, 1):
            way = list(sources_of(operator, port, SCALES))
            if way[-1].get_type_name() != "Constant":
                continue
            small = way[-1].get_element_type().to_string() in ("i8", "u8")
            if not integers or small or any(each.get_type_name() == "FakeQuantize" for each in way):
                names[layer_name(operator)] = None
    return tuple(names)


def has_attention(network: Any) -> bool:
    """Whether a converted network attends: it multiplies the output of a softmax with something that it computed."""
    for operator in network.get_ordered_ops():
        if operator.get_type_name() == "ScaledDotProductAttention":
            return True
        if operator.get_type_name() == "MatMul":
            ways = [list(sources_of(operator, port, MOVES)) for port in (0, 1)]
            softmax = any(way[-1].get_type_name() == "Softmax" for way in ways)
            if softmax and not any(way[-1].get_type_name() == "Constant" for way in ways):
                return True
    return False
