"""Whether the network's confidence can be taken at its word."""

from __future__ import annotations

from collections.abc import Iterator

from skipway.inference.metrics import BINS, calibration, percent
from skipway.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, figure, foot, grid
from skipway.report.run.answers import Answers

__all__ = ["sureness_section"]


def sureness_section(found: Answers) -> Iterator[str]:
    """The reliability diagram, how many images stand behind each of its bins, and the expected calibration error."""
    measured = calibration(found.confidence, found.taken == found.labels)
    if not measured.bins:
        yield '<p class="soft">No confidence is finite.</p>'
        return
    across = Axis(0.0, 1.0, LEFT, WIDTH - RIGHT)
    shares = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    images = Axis(0.0, 1.05 * max(each.images for each in measured.bins), HEIGHT - BOTTOM, TOP)
    reliability = [*grid(shares, True), *foot(across, "confidence", ())]
    counts = [*grid(images, False), *foot(across, "confidence", ())]
    for each in measured.bins:
        x, width = across.at(each.low) + 1, across.at(each.high) - across.at(each.low) - 2
        told = (
            f"confidence {percent(each.low)} to {percent(each.high)}: {each.images:,} images, "
            f"mean confidence {percent(each.confidence)}, {percent(each.accuracy)} right"
        )
        for inside, axis, value in ((reliability, shares, each.accuracy), (counts, images, float(each.images))):
            y = axis.at(value)
            inside.append(
                f'<rect class="bar a" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{told}</title></rect>'
            )
        reliability.append(
            f'<circle class="dot b" cx="{across.at(each.confidence):.1f}" cy="{shares.at(each.accuracy):.1f}" r="3.5">'
            f"<title>{told}</title></circle>"
        )
    corners = f"M{LEFT} {HEIGHT - BOTTOM}L{WIDTH - RIGHT} {TOP}"
    reliability.append(f'<path class="line faint" d="{corners}"/>')
    keys = [("a", "share that is right"), ("b", "mean confidence"), ("faint", "as sure as right")]
    yield '<div class="charts">'
    yield figure("Reliability", "Share of right answers by confidence", reliability, keys=keys)
    yield figure("Images by confidence", "Number of test images by confidence", counts, keys=[("a", "images")])
    yield "</div>"
    sure = float(found.confidence[found.confidence.isfinite()].mean())
    right = float((found.taken == found.labels).double().mean())
    word = "over" if sure > right else "under"
    yield (
        f"<p>Expected calibration error {percent(measured.error)} in {BINS} bins; on average {percent(sure)} sure and "
        f"{percent(right)} right: {word}confident by {100 * abs(sure - right):.1f} points.</p>"
    )
