"""Steps of `scripts/docs` around the site builder: studies into chapters, formulas and linked files into the site."""

from __future__ import annotations

import os
import re
import shutil
import sys
from html import unescape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDIES, SITE = ROOT / "docs" / "studies", ROOT / "build" / "site"
RUSSIAN = {
    "holds": "выполняется",
    "does not hold": "не выполняется",
    "holds only when": "выполняется при условии",
    "open": "открыто",
}
HEADS = {"guide": "| claim | answer |\n|---|---|", "ru": "| утверждение | ответ |\n|---|---|"}
PAGE = {"guide": "figures and numbers", "ru": "графики и числа"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
OUTWARD = re.compile(r'href="(\.\./[^"#:]+)"')
SECTION = r"(?<=<!-- study: {name} -->\n)(.*?)(?=^<!-- |\Z)"


def claims() -> None:
    """Update the answers in `docs/*/09-what-held.md` from the tables of the studies.

    An English row takes the words of the study. A Russian row keeps its wording; a claim without a row gets one in
    English, to be translated by hand.
    """
    from skipway.studies import studies
    from skipway.studies.page import measured_rows
    from skipway.studies.runner import read_rows

    for folder in ("guide", "ru"):
        chapter = ROOT / "docs" / folder / "09-what-held.md"
        text = chapter.read_text("utf-8")
        for name, study in studies().items():
            section = re.search(SECTION.format(name=name), text, re.MULTILINE | re.DOTALL)
            if section is None:
                text += f"\n<!-- study: {name} -->\n### {study.title}\n\n`skipway study {name}`\n\n{HEADS[folder]}\n"
                section = re.search(SECTION.format(name=name), text, re.MULTILINE | re.DOTALL)
                assert section is not None
            rows = measured_rows(read_rows(STUDIES, study))
            verdicts = study.conclude(rows)
            lines = section[1].split("\n")
            head = next(place for place, line in enumerate(lines) if line.startswith("|---"))
            places = [place for place, line in enumerate(lines) if line.startswith("| ") and place > head]
            for number, verdict in enumerate(verdicts):
                answer = verdict.answer if rows else "open"
                word = answer if folder == "guide" else RUSSIAN[answer]
                condition = verdict.text.split(". ")[0] if answer == "holds only when" else ""
                if number < len(places):
                    claim, said = lines[places[number]].strip("| ").split(" | ")
                    claim = verdict.claim.replace("|", "/") if folder == "guide" else claim
                    own = said.partition(": ")[2]
                    # a translation holds as long as its numbers are those of the original
                    if (
                        folder == "ru"
                        and condition
                        and own
                        and re.findall(r"\d+", own) == re.findall(r"\d+", condition)
                    ):
                        condition = own
                    place = places[number]
                else:
                    claim, place = verdict.claim, head + 1 + number
                    lines.insert(place, "")
                lines[place] = f"| {claim} | {word}{': ' * bool(condition)}{condition} |"
            for place in reversed(places[len(verdicts) :]):
                del lines[place]
            command = next(place for place, line in enumerate(lines) if line.startswith("`skipway study"))
            lines[command] = f"`skipway study {name}`"
            if (STUDIES / f"{name}.html").exists():
                lines[command] += f" · [{PAGE[folder]}](../studies/{name}.html)"
            text = text[: section.start()] + "\n".join(lines) + text[section.end() :]
        chapter.write_text(text, "utf-8")


def figures() -> None:
    """After every `<!-- figure: NAME | CAPTION -->` of a chapter, show the picture of that name, if there is one."""
    mark = re.compile(r"^(<!-- figure: ([\w-]+) \| (.+) -->)\n(?:!\[.*\]\(.*\)\n)?", re.MULTILINE)

    def shown(match: re.Match[str]) -> str:
        there = (STUDIES / f"{match[2]}.svg").exists()
        return f"{match[1]}\n" + f"![{match[3]}](../studies/{match[2]}.svg)\n" * there

    for folder in ("guide", "ru"):
        for chapter in sorted((ROOT / "docs" / folder).glob("*.md")):
            chapter.write_text(mark.sub(shown, chapter.read_text("utf-8")), "utf-8")


def finish() -> None:
    """Complete the built pages: formulas as MathML, which browsers draw themselves; the language of Russian pages; and
    files outside docs/ that a page links to, copied to `repository/` in the site.
    """
    from latex2mathml.converter import convert

    def drawn(match: re.Match[str]) -> str:
        shown = convert(unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")
        return f'<div class="formula">{shown}</div>' if match[1] == "div" else shown

    for page in SITE.rglob("*.html"):
        if page.parent.name == "studies":
            continue
        text = FORMULA.sub(drawn, page.read_text("utf-8"))
        if page.parent.name == "ru":
            text = text.replace('<html lang="en"', '<html lang="ru"', 1)
        page.write_text(OUTWARD.sub(lambda match, page=page: copied(match, page), text), "utf-8")


def copied(match: re.Match[str], page: Path) -> str:
    """The link of a built page to a file of the repository, led to a copy in the site; any other link as it is."""
    link = (ROOT / "docs" / page.relative_to(SITE).parent / match[1]).resolve()
    # the builder takes a link to X.md for one to X.html, and README.md for a folder's index
    candidates = (link, link.with_suffix(".md"), link.with_name("README.md"))
    file = next((each for each in candidates if each.is_file()), None)
    if file is None or not file.is_relative_to(ROOT) or file.is_relative_to(ROOT / "docs"):
        return match[0]
    copy = SITE / "repository" / file.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)
    return f'href="{os.path.relpath(copy, page.parent)}"'


if __name__ == "__main__":
    {"claims": claims, "figures": figures, "finish": finish}[sys.argv[1]]()
