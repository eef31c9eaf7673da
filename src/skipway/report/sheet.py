"""One page of HTML that loads nothing: its frame, style and script, and the lists and cells that pages share."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable
from html import escape

__all__ = ["SORTING", "definitions", "document", "linked", "listed", "size_cell", "word_cell"]

LINK = re.compile(r"https?://[^\s<>\"'()]+[^\s<>\"'().,;:]")

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1f21; --soft: #5c6166; --line: #dfe3e6; --card: #f7f8f9;
  --stream: #0072b2; --branch: #c65300; --second: #a8528a; --third: #2a7f9e;
  --distinct: #00805f; --fatal: #b2182b; --serious: #8a5a00; --note: #5c6166;
  --good: #00664b; --good-paper: #e4f4ee; --fair: #7a4f00; --fair-paper: #fdf1d8; --bad: #a01427;
  --bad-paper: #fbe6e8; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181a; --ink: #e7e9ea; --soft: #a0a6ab; --line: #33383c;
  --card: #1e2124; --stream: #56b4e9; --branch: #f0975a; --second: #e39cc9; --third: #8ad4ef;
  --distinct: #3cc79c; --fatal: #ff8b94; --serious: #f2c14e;
  --note: #a0a6ab; --good: #7fdcbd; --good-paper: #10312a; --fair: #f6cd77; --fair-paper: #37290c; --bad: #ffa3aa;
  --bad-paper: #3d1418; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; } a { color: var(--stream); overflow-wrap: anywhere; }
.asked, .soft, footer { color: var(--soft); } p { margin: .3rem 0; } ul { margin: .3rem 0; padding-left: 1.3rem; }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .5rem 0; } dl div { display: flex; gap: .4rem; }
dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: 700; }
th button:focus-visible { outline: 2px solid var(--stream); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
svg .title { fill: var(--ink); font-weight: 600; } svg .grid { stroke: var(--line); }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .6rem; font-size: .85rem; }
"""

# sorts a table's rows by the column whose heading is pressed, and the other way when it is pressed again
SORTING = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const cell = button.parentElement, body = cell.closest("table").tBodies[0], column = cell.cellIndex;
  const down = cell.ariaSort === "ascending", key = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
  cell.ariaSort = down ? "descending" : "ascending";
  body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b))));
});
"""


def document(title: str, parts: Iterable[str], *, style: str = "", script: str = "") -> str:
    """A whole page. Its policy lets a browser run and apply what is written here alone, and fetch nothing.

    Args:
        title: of the window, as text.
        parts: of the body, as HTML.
        style: rules beside those that all pages share.
        script: beside the one that sorts tables.

    >>> "default-src 'none'" in document("a & b", ["<p>c</p>"])
    True
    """
    rules, code = STYLE + style, SORTING + script
    policy = f"default-src 'none'; img-src data:; style-src '{fingerprint(rules)}'; script-src '{fingerprint(code)}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{rules}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{code}</script>\n</body>\n</html>\n"
    )


def fingerprint(text: str) -> str:
    """What a policy names a style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def listed(entries: Iterable[object], kind: str = "") -> str:
    """Entries as a list."""
    named = f' class="{kind}"' if kind else ""
    return f"<ul{named}>{''.join(f'<li>{escape(str(entry))}</li>' for entry in entries)}</ul>"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their numbers."""
    inside = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{inside}</dl>" if inside else ""


def linked(text: str) -> str:
    """Text with its web addresses as links.

    >>> linked("a & b, https://arxiv.org/abs/1502.01852.")
    'a &amp; b, <a href="https://arxiv.org/abs/1502.01852" rel="noreferrer">https://arxiv.org/abs/1502.01852</a>.'
    """
    done, parts = 0, []
    for match in LINK.finditer(text):
        address = escape(match.group())
        parts += [escape(text[done : match.start()]), f'<a href="{address}" rel="noreferrer">{address}</a>']
        done = match.end()
    return "".join([*parts, escape(text[done:])])


def size_cell(value: float, text: str) -> str:
    """A cell with a number, and what it is sorted by; what was not measured comes first, infinity last."""
    key = -1.0 if math.isnan(value) else min(value, 1e308)
    return f'<td class="number" data-value="{key:.6g}">{escape(text)}</td>'


def word_cell(inside: str, key: str) -> str:
    """A cell with words, and what it is sorted by."""
    return f'<td data-value="{escape(key)}">{inside}</td>'
