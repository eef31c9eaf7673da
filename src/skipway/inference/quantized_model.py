"""`quantize(model, calibration)`: a network in 8-bit integers where it keeps its answers and is faster so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.inference.answer_check import collect_images
from skipway.inference.backend_selection import BackendResult, quickest
from skipway.inference.backends import INT8, ORIGINAL
from skipway.inference.optimized_model import OptimizedModel, optimize
from skipway.inference.quantization import CALIBRATION_IMAGES, require_nncf
from skipway.inference.run_images import RunImages
from skipway.tracing.example import Example

__all__ = ["quantize"]

BATCH = 16
"""Images of the example, where none is given."""


def quantize(
    model: nn.Module,
    calibration: Any,
    *,
    check: Any = None,
    limit: float = 0.005,
    example: Example | None = None,
    goal: str = "throughput",
    backends: Sequence[str] | None = None,
    seconds: float = 60.0,
    patience: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> OptimizedModel:
    """Return a new network for inference whose products are in 8-bit integers if it keeps its answers and is fastest,
    else the fastest one in bfloat16 or float32, with the reason; the model stays as it is.

    Weights and inputs of layers become x ≈ s (q - z), q an integer of 8 bits; s and z come from the weights of each
    output channel, and from the least and largest inputs that calibration images give (Jacob et al. 2018,
    arXiv:1712.05877), by NNCF on OpenVINO. In networks with attention, found by their softmax, wide channels are evened
    out first (SmoothQuant, arXiv:2211.10438). If top-1 on held-out images falls by more than `limit`, layers go back to
    float until it does not, those first whose return mends most answers. The network is then a candidate of
    `skipway.optimize` beside all others, and what is chosen is checked on these images as it runs.

    Args:
        model: a classifier of images in float32 on the CPU that takes one tensor (N, …) and returns scores (N, K).
        calibration: images like those to come, as the model takes them, without labels: a tensor, of which 300 at equal
            distances are used; an iterable of batches, such as a shuffled `DataLoader`, of which the first 300 are; or
            the folder of a run of `skipway train`, whose training images are drawn from.
        check: held-out images with their classes, (images, labels) or an iterable of such batches, all of which are
            held in memory; by default the validation images of the run, where `calibration` is one. Some thousand are
            needed to see half a point; a remark says where they are too few. For agreement with the model instead of
            accuracy, give its own answers as labels.
        limit: largest fall of top-1 on these images, a share of them from 0 to 0.1 (0.005: half a point), or 1 for any.
        example: see `optimize`; by default the first 16 images.
        goal: see `optimize`.
        backends: see `optimize`.
        seconds: time of the search after the quantisation, which takes two passes over the held-out images.
        patience: seconds, within the quantisation, for finding the layers that go back to float where too many answers
            change: part of a pass for each layer, and a whole one for each of these. By default as long as `seconds`.
            Where they are not found there is no int8, and the remark says so.
        progress: see `optimize`.

    Returns:
        what `optimize` returns. `.precision` is "int8" or what is faster; `.float_layers` names the layers that stay in
        float, `.answer` has the accuracy before and after with an interval, `.remark` says why it is not int8, and
        `print` shows all of it. Nothing is remembered from one call to another.

    Raises:
        MissingExtraError: nncf or openvino is not installed.
        SkipwayError: no image, no labels, labels that the model has no class for, values that are not finite, shapes
            that differ, a limit that is no share, or a model that does no better than guessing on the images.

    >>> import skipway as sw
    >>> fast = sw.quantize(sw.from_pretrained("runs/first"), "runs/first")  # doctest: +SKIP
    >>> fast.precision, len(fast.float_layers)  # doctest: +SKIP
    ('int8', 0)
    """
    require_nncf()
    if isinstance(calibration, str | Path):
        run = RunImages(calibration)
        check = run.held_out() if check is None else check
        calibration = run.calibration(CALIBRATION_IMAGES)
    if check is None:
        raise SkipwayError(
            "check=None: the rule is held-out images with their classes, (images, labels) or a DataLoader of them; for "
            "agreement with the model itself, its own answers, model(images).argmax(1), are the labels"
        )
    images = collect_images(calibration, CALIBRATION_IMAGES)
    fast = optimize(
        model,
        images[:BATCH] if example is None else example,
        goal=goal,
        precisions="any",
        backends=backends,
        seconds=seconds,
        patience=patience,
        calibration=images,
        check=check,
        limit=limit,
        progress=progress,
        cache=False,
    )
    fast.remark = "; ".join(filter(None, (fast.remark, explain_precision(fast))))
    return fast


def explain_precision(fast: OptimizedModel) -> str:
    """Why a choice is int8, or is not, with images per second."""
    size = fast.axes.size if fast.axes is not None else len(fast.example) if isinstance(fast.example, Tensor) else 1

    def rate(result: BackendResult) -> str:
        return f"{size / result.seconds:,.0f} images/s" if math.isfinite(result.seconds) else "not timed"

    tried = [each for each in fast.report if each.precision == INT8]
    others = [each for each in fast.report if each.precision != INT8 and not each.note]
    other = quickest(others)
    name = "the original" if other.backend == ORIGINAL else str(other.choice)
    agreeing = [each for each in tried if not each.note]
    if fast.precision == INT8:
        chosen = next(each for each in tried if each.choice == fast.choice)
        return f"int8 keeps the answers: {rate(chosen)} against {rate(other)} of {name}, the fastest in float"
    if agreeing:
        best = rate(quickest(agreeing))
        return f"not int8, which keeps the answers but is no faster here: {best} against {rate(other)} of {name}"
    return f"not int8: {tried[0].note if tried else 'openvino is not among the backends'}"
