"""What is taken for what: confusion matrix, confused pairs, scores and sizes of the classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from skipway.inference.metrics import class_scores, confused_pairs, percent
from skipway.report.charts import Series, bars, chart, cut, figure
from skipway.report.sheet import size_cell, word_cell

__all__ = ["class_table", "confusion_section", "sizes_section"]

# classes whose matrix can still be read, pairs that are listed, classes in the table, bars in a picture
MOST_IN_MATRIX, PAIRS, FEW_PAIRS, MOST_ROWS, MOST_BARS = 30, 30, 10, 1000, 40
SIDE, LEAST_CELL = 440, 15
# a cell of this side has room for a count, and of that for its share as well
ROOM, MORE_ROOM = 22, 38
NAME_LETTERS = 14


def confusion_section(confusion: Tensor, names: Sequence[str]) -> Iterator[str]:
    """The matrix up to 30 classes, and the most frequent mistakes."""
    if len(names) <= MOST_IN_MATRIX:
        yield matrix(confusion, names)
    pairs = confused_pairs(confusion, PAIRS if len(names) > MOST_IN_MATRIX else FEW_PAIRS)
    if not pairs:
        yield "<p>No mistakes.</p>"
        return
    images = confusion.sum(1).tolist()
    yield "<h3>Most frequent mistakes</h3>"
    yield '<div class="scroll"><table class="names"><thead><tr>'
    yield heads([("true class", False), ("taken for", False), ("images", True), ("of the class", True)])
    yield "</tr></thead><tbody>"
    for true, taken, count in pairs:
        share = count / max(1, images[true])
        words = "".join(word_cell(escape(name), name) for name in (names[true], names[taken]))
        yield f"<tr>{words}{size_cell(count, f'{count:,}')}{size_cell(share, percent(share))}</tr>"
    yield "</tbody></table></div>"


def heads(titles: Sequence[tuple[str, bool]]) -> str:
    """Headings that sort, of words or of numbers."""
    kinds = [(title, ' class="number"' if number else "") for title, number in titles]
    return "".join(f'<th{kind}><button type="button">{title}</button></th>' for title, kind in kinds)


def matrix(confusion: Tensor, names: Sequence[str]) -> str:
    """Rows are the true classes, columns what they are taken for; darker is a larger share of the row."""
    letters = min(NAME_LETTERS, max(len(name) for name in names))
    left = 16 + 6.8 * letters
    cell = max(LEAST_CELL, (SIDE - left) / len(names))
    top = 24 + 6.8 * letters + 8
    inside = [f'<text class="title" x="{left:.0f}" y="13">taken for</text>']
    rows, images = confusion.tolist(), confusion.sum(1).tolist()
    for place, name in enumerate(names):
        middle = (place + 0.5) * cell + 4
        word, whole = escape(cut(name, letters)), escape(name)
        inside.append(
            f'<text x="{left - 6:.1f}" y="{top + middle:.1f}" text-anchor="end">{word}<title>{whole}</title></text>'
        )
        x = left + middle
        inside.append(
            f'<text transform="translate({x:.1f} {top - 6:.1f}) rotate(-90)">{word}<title>{whole}</title></text>'
        )
    for true, row in enumerate(rows):
        for taken, count in enumerate(row):
            share = count / max(1, images[true])
            kind = "hit" if true == taken else "miss"
            x, y = left + taken * cell, top + true * cell
            told = escape(f"{names[true]} taken for {names[taken]}: {count:,} of {images[true]:,}, {percent(share)}")
            inside.append(
                f'<rect class="cell {kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                f'fill-opacity="{0.04 if count == 0 else 0.12 + 0.88 * share:.2f}"><title>{told}</title></rect>'
            )
            if count and cell >= ROOM:
                inside.append(number_in(x + cell / 2, y + cell / 2, count, share, cell))
    note = "Rows: the true class. Columns: what the network took it for. Darker: a larger share of the row."
    size = (left + len(names) * cell, top + len(names) * cell + 2)
    wide = figure("Confusion matrix", "Confusion matrix of the test images", inside, size=size, note=note)
    return wide.replace('class="chart"', 'class="chart whole"', 1)


def number_in(x: float, y: float, count: int, share: float, cell: float) -> str:
    """The count in a cell, with its share below where there is room."""
    kind = "on" if share > 0.5 else "in"
    if cell < MORE_ROOM:
        return f'<text class="{kind}" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{count}</text>'
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{count:,}'
        f'<tspan class="small" x="{x:.1f}" dy="13">{100 * share:.0f} %</tspan></text>'
    )


def class_table(confusion: Tensor, names: Sequence[str]) -> Iterator[str]:
    """Recall, precision, F1 and images of each class, the worst first."""
    scores = class_scores(confusion)
    order = torch.where(scores.images > 0, scores.f1, 2.0).sort(stable=True).indices.tolist()
    titles = [("class", False), ("recall", True), ("precision", True), ("F1", True), ("images", True)]
    yield '<div class="scroll tall"><table class="names"><thead><tr>'
    yield heads(titles)
    yield "</tr></thead><tbody>"
    columns = zip(scores.recall.tolist(), scores.precision.tolist(), scores.f1.tolist(), strict=True)
    values, images = list(columns), scores.images.long().tolist()
    for place in order[:MOST_ROWS]:
        shares = "".join(size_cell(share, percent(share)) for share in values[place])
        word = word_cell(escape(names[place]), names[place])
        yield f"<tr>{word}{shares}{size_cell(images[place], f'{images[place]:,}')}</tr>"
    yield "</tbody></table></div>"
    if len(order) > MOST_ROWS:
        yield f'<p class="soft">The {MOST_ROWS:,} worst of {len(order):,} classes.</p>'
    yield (
        f"<p>Mean over the classes: recall {percent(scores.balanced_accuracy)} (balanced accuracy), "
        f"F1 {percent(scores.macro_f1)}.</p>"
    )


def sizes_section(labels: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """A chart of the number of images of each class in each split.

    Args:
        labels: class numbers (N,) of the images of each split; splits without an image are left out.
        names: of the classes.
    """
    present = {split: numbers for split, numbers in labels.items() if len(numbers)}
    counts = [torch.bincount(numbers, minlength=len(names)).tolist() for numbers in present.values()]
    kinds = list(zip("acb" if len(present) > 2 else "ab", present, strict=False))
    if len(names) <= MOST_BARS:
        rows = [(name, tuple(map(float, each))) for name, *each in zip(names, *counts, strict=True)]
        return bars("Images of each class", rows, kinds)
    order = sorted(range(len(names)), key=lambda place: -counts[0][place])
    series = [
        Series(kind, what, [(float(rank), float(column[place])) for rank, place in enumerate(order, 1)])
        for (kind, what), column in zip(kinds, counts, strict=True)
    ]
    told = [f"{cut(names[place], 40)}, {counts[0][place]:,}" for place in (order[0], order[-1])]
    note = f"Largest: {told[0]}. Smallest: {told[1]}."
    return chart("Images of each class", series, across="classes, the largest first", note=note)
