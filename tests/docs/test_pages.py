"""README and documentation: links and anchors resolve, commands exist with their options, code runs."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from skipway.cli.app import app
from skipway.diagnosis import outlook
from skipway.install_lines import library_line
from skipway.schemes.scheme import all_schemes, parse_scheme
from skipway.zoo import import_library

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "benchmarks", "examples")
    for path in (ROOT.glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md"))
)
# dated entries, which name commands and modules as they were
HISTORY = {"docs/log.md", "CHANGELOG.md"}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?:    |\t).*\n?)+", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PYTHON = re.compile(r"(<!-- not run: .+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?<![\w./-])skipway ([a-z]+)")
# the guide's chapters have their own test; cards hold doctests, which run where they are written
RUN = [page for page in PAGES if page.startswith(("README", "docs/")) and page.count("/") < 2] + ["docs/ru/index.md"]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an installed package has no documentation")


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each.lower())) for each in headings]
    return {each.strip().replace(" ", "-") for each in plain}


def commands(text: str) -> list[str]:
    """The command lines of a page that begin with `skipway`, without prompts and comments."""
    fenced = [body for language, body in FENCED.findall(text) if language in ("", "bash", "sh", "console")]
    indented = INDENTED.findall(FENCED.sub("", text))
    lines = [line.strip().removeprefix("$ ") for block in (*fenced, *indented) for line in block.splitlines()]
    return [line for line in lines if line.startswith("skipway ")]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page):
    missing = []
    for target in LINK.findall(FENCED.sub("", read(page))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        known = there.exists() and (not anchor or there.suffix != ".md" or anchor in anchors(there.read_text("utf-8")))
        missing += [] if known else [target]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_commands_exist(page):
    """`skipway NAME` in a line of code or in backticks; prose may say what Skipway does."""
    text = read(page)
    code = [*commands(text), *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))]
    named = {name for each in code for name in NAMED.findall(each)}
    assert named - {name for name in app if not name.startswith("-")} == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY and commands(read(page))])
def test_command_lines_are_understood(page):
    for line in commands(read(page)):
        words = shlex.split(line, comments=True)[1:]
        if "--help-all" not in words:
            app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", [page for page in RUN if PYTHON.search(read(page))])
def test_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in one namespace, but those marked with `<!-- not run: reason -->`. A diagnosis ends its
    trial steps at the first checkpoint, as no page rests on what it finds.
    """
    monkeypatch.setattr(outlook, "CHECKPOINTS", outlook.CHECKPOINTS[:1])
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, (mark, block) in enumerate(PYTHON.findall(read(page)), 1):
        for library in re.findall(r"^import (timm|torchvision|transformers)$", block, re.MULTILINE):
            if find_spec(library) is None:
                pytest.skip(f"{library} is not installed: {library_line(library)}")
            import_library(library)  # beside a torchvision of another build, too
        if not mark:
            exec(compile(block, f"{page}, block {number}", "exec"), namespace)


QUOTED = re.compile(r"""(scheme=)?(["'])([a-z0-9]+(?:\([^(){}\n]*\))?(?: \+ [a-z0-9]+(?:\([^(){}\n]*\))?)*)\2""")


def scheme_specs(text: str) -> list[str]:
    """What is given as a scheme, and other strings that begin with a scheme's name."""
    return [spec for given, _, spec in QUOTED.findall(text) if given or re.split(r"\W", spec)[0] in all_schemes()]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_schemes_are_constructed(page):
    """Every spec string in a text, in tables too, is one that the code takes."""
    for spec in scheme_specs(read(page)):
        parse_scheme(spec)


def test_scheme_specs_are_found():
    assert scheme_specs(read("docs/coming-from.md")) == [
        "stochasticdepth(0.1)",
        "layerscale + stochasticdepth",
        "layerscale",
        "hyperconnections(2)",
    ]


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 120


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "zensical.toml").read_text("utf-8")
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert [page for page in pages if f'"{page}"' not in navigation] == []


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_site_with_a_dead_link_is_not_built(tmp_path):
    steps = script("pages")
    (tmp_path / "guide").mkdir()
    (tmp_path / "other page.html").touch()
    links = ("../other%20page.html#end", "https://example.org/x", "#here", "/absolute.html", "gone.html")
    (tmp_path / "guide" / "one.html").write_text("".join(f'<a href="{link}">x</a>' for link in links))
    # the first is none where the site is a folder of a server
    assert steps.dead_links(tmp_path) == ["guide/one.html: /absolute.html", "guide/one.html: gone.html"]


def test_clicks_are_links_in_the_text_and_not_in_menus(tmp_path):
    (tmp_path / "guide").mkdir()
    (tmp_path / "index.html").write_text(
        '<main><nav><a href="far.html">x</a></nav><article><a href="guide/a.html#b">x</a></article></main>'
    )
    (tmp_path / "guide" / "a.html").write_text(
        '<main><a class="c" href="../far.html">x</a><a href="a.html">x</a></main>'
    )
    (tmp_path / "far.html").touch()
    (tmp_path / "alone.html").touch()
    row = "| [{0}]({0}.md) | {1} | 1: theirs |"
    given = "\n".join(row.format(name, 7) for name in ("guide/a", "far", "alone"))
    expected = "\n".join(row.format(name, number) for name, number in (("guide/a", 1), ("far", 2), ("alone", "–")))
    assert script("clicks").counted(tmp_path, given) == expected
