"""Calibration of a network's confidence: reliability by confidence, and the number of images at each."""

from __future__ import annotations

from skipway.inference.evaluation import wilson_interval
from skipway.inference.metrics import BINS, calibration, percent
from skipway.report.chart import Bars, Figure, Point, Series
from skipway.report.run.predictions import Predictions

__all__ = ["calibration_charts"]


def calibration_charts(predictions: Predictions) -> tuple[list[Figure | Bars], str]:
    """Return the reliability diagram, the images by confidence, and a text with the expected calibration error."""
    measured = calibration(predictions.confidence, predictions.predicted == predictions.labels)
    if not measured.bins:
        return [], "No confidence is finite."
    points, names = [], []
    for each in measured.bins:
        low, high = wilson_interval(round(each.accuracy * each.images), each.images)
        name = f"confidence {percent(each.low)} to {percent(each.high)}, {each.images:,} images"
        points.append(Point(each.confidence, each.accuracy, low, high, name=name))
        names.append(f"{100 * each.low:.0f} to {100 * each.high:.0f} %")
    reliability = Figure(
        title="Reliability",
        x_label="confidence",
        y_label="accuracy by confidence, with 95 % intervals",
        series=(
            Series("accuracy", tuple(points)),
            Series.of("perfect calibration", [(0.0, 0.0), (1.0, 1.0)], "theory"),
        ),
        percent=True,
        percent_x=True,
        span=(0.0, 1.0),
    )
    images = Bars(
        title="Test images by confidence",
        categories=tuple(names),
        series=(("images", tuple(float(each.images) for each in measured.bins)),),
    )
    confidence = float(predictions.confidence[predictions.confidence.isfinite()].mean())
    accuracy = float((predictions.predicted == predictions.labels).double().mean())
    word = "over" if confidence > accuracy else "under"
    return [reliability, images], (
        f"Expected calibration error {percent(measured.error)} in {BINS} bins. Mean confidence {percent(confidence)}, "
        f"accuracy {percent(accuracy)}: {word}confident by {100 * abs(confidence - accuracy):.1f} points."
    )
