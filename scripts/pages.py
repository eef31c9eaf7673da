"""What `scripts/docs` does around the site builder: the studies into the chapters, formulas into the built pages."""

from __future__ import annotations

import re
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
SECTION = r"(?<=<!-- study: {name} -->\n)(.*?)(?=^<!-- |\Z)"


def claims() -> None:
    """Bring the answers of `docs/*/09-what-held.md` up to what the studies' tables say.

    In English a row says what the study says. In Russian its wording stays; a claim that has no row yet gets one in
    English, to be put into good words by hand.
    """
    from skipway.studies import studies
    from skipway.studies.page import sound
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
            rows = sound(read_rows(STUDIES, study))
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
    """Behind every `<!-- figure: NAME | CAPTION -->` of a chapter, show the studies' picture of that name, if any."""
    mark = re.compile(r"^(<!-- figure: ([\w-]+) \| (.+) -->)\n(?:!\[.*\]\(.*\)\n)?", re.MULTILINE)

    def shown(match: re.Match[str]) -> str:
        there = (STUDIES / f"{match[2]}.svg").exists()
        return f"{match[1]}\n" + f"![{match[3]}](../studies/{match[2]}.svg)\n" * there

    for folder in ("guide", "ru"):
        for chapter in sorted((ROOT / "docs" / folder).glob("*.md")):
            chapter.write_text(mark.sub(shown, chapter.read_text("utf-8")), "utf-8")


def finish() -> None:
    """Formulas as MathML, which browsers draw themselves, and the right language on every Russian page."""
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
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    {"claims": claims, "figures": figures, "finish": finish}[sys.argv[1]]()
