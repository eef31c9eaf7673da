"""The guide's code runs, both languages show the same, and the claims' answers are those of the studies' tables."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

from skipway.studies import studies
from skipway.studies.page import measured_rows
from skipway.studies.runner import read_rows

DOCS = Path(__file__).parents[2] / "docs"
ENGLISH, RUSSIAN = DOCS / "guide", DOCS / "ru"
CHAPTERS = sorted(path.name for path in ENGLISH.glob("[0-9]*.md"))
LESSONS = [f"{folder}/{name}" for folder in ("guide", "ru") for name in CHAPTERS]
PAGES = ["index.md", "ru/index.md", *LESSONS]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
MARK = re.compile(r"<!-- figure: ([\w-]+) \| (.+) -->")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")
ANSWERS = {
    "holds": "выполняется",
    "does not hold": "не выполняется",
    "holds only when": "выполняется при условии",
    "open": "открыто",
}

pytestmark = pytest.mark.skipif(not CHAPTERS, reason="the guide is not part of an installed package")


def blocks(path: Path) -> list[str]:
    """The Python code of a chapter."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def without_comments(code: str) -> list[tuple[int, str]]:
    """The tokens of some code, its comments apart."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [(token.type, token.string) for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]


def answers(path: Path) -> dict[str, list[str]]:
    """What the last chapter says of every study: the second column of the table behind its mark."""
    found: dict[str, list[str]] = {}
    _, *sections = path.read_text("utf-8").split("<!-- study: ")
    for section in sections:
        name, _, rest = section.partition(" -->")
        cells = [line.strip("| ").split(" | ") for line in rest.splitlines() if line.startswith("| ")]
        found[name] = [answer.partition(": ")[0] for _, answer in cells[1:]]
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_code_of_a_chapter_runs(chapter, monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    namespace: dict[str, object] = {"__name__": "__main__"}
    code = blocks(ENGLISH / chapter)
    assert code
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{chapter}, block {number}", "exec"), namespace)
    assert capsys.readouterr().out


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_russian_chapter_has_the_same_code_and_figures(chapter):
    english, russian = ENGLISH / chapter, RUSSIAN / chapter
    assert list(map(without_comments, blocks(english))) == list(map(without_comments, blocks(russian)))
    figures = [[target for _, target in FIGURE.findall(path.read_text("utf-8"))] for path in (english, russian)]
    assert figures[0] == figures[1]


def test_both_languages_have_the_same_chapters():
    assert sorted(path.name for path in RUSSIAN.glob("[0-9]*.md")) == CHAPTERS


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_points_to_is_there(page):
    text = BLOCK.sub("", (DOCS / page).read_text("utf-8"))
    targets = [target for _, target in FIGURE.findall(text)] + LINK.findall(text)
    near = [target for target in targets if "://" not in target]
    assert [target for target in near if not (DOCS / page).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("page", LESSONS)
def test_a_page_shows_its_figures_that_were_drawn(page):
    text = (DOCS / page).read_text("utf-8")
    named = [name for name, _ in MARK.findall(text) if (DOCS / "studies" / f"{name}.svg").exists()]
    assert [Path(target).stem for _, target in FIGURE.findall(text)] == named, "run scripts/docs --studies"


@pytest.mark.parametrize("name", studies())
def test_the_table_of_claims_is_that_of_the_studies(name):
    study = studies()[name]
    rows = measured_rows(read_rows(DOCS / "studies", study))
    english, russian = (answers(folder / "09-what-held.md") for folder in (ENGLISH, RUSSIAN))
    said = [verdict.answer for verdict in study.conclude(rows)] if rows else ["open"] * len(study.conclude([]))
    assert english.get(name) == said, "run scripts/docs --studies"
    assert russian.get(name) == [ANSWERS[answer] for answer in said], "run scripts/docs --studies"
