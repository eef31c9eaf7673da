"""Steps of `scripts/docs` around the site builder: studies into chapters, formulas and linked files into the site."""

from __future__ import annotations

import os
import re
import shutil
import sys
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote

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
LOCAL = re.compile(r'(?:href|src)="([^"#:?][^"#:?]*)["#?]')
TABLE, ROW = re.compile(r"<table>.*?</table>", re.DOTALL), re.compile(r"<tr>(.*?)</tr>", re.DOTALL)
CELL = re.compile(r"<t([hd])([^>]*)>(.*?)</t\1>", re.DOTALL)
CODE = re.compile(r"(?<!<span></span>)<code>((?:(?!</code>).)*)</code>", re.DOTALL)
SHELL = re.compile(r'<div class="language-(?:text|bash) highlight"><pre><span></span><code>(.*?)</code>', re.DOTALL)
COMMAND = re.compile(r"(?:skipway|python3?|pip|bash|git|torchrun|yolo|#) ?")
HYPHENED = re.compile(r"(?<![^\s(])[^\s<>]*[-\[][^\s<>]*")
WHOLE = 24
"""Letters of the longest word of code that is not broken at its hyphens and brackets."""
RUSSIAN_PARTS = {
    "On this page": "На этой странице",
    "Previous": "Назад",
    "Next": "Далее",
    "Back to top": "К началу",
    "Skip to content": "К содержанию",
}
ONLY_SITE = re.compile(r"<!-- site: (.*?) -->", re.DOTALL)
TELEPHONE = {2: 110}
"""Letters of a row that a telephone shows beside each other, by columns; 45 of more than two columns."""
TRAIL = re.compile(r'<nav class="trail"[^>]*>')
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
    """Complete the built pages: formulas as MathML, which browsers draw themselves; the language of Russian pages; what
    only the site says (`<!-- site: … -->`); commands and options that wrap between words; powers in tables of claims
    and schemes; wide tables such that a telephone can stack them; files outside docs/ that a page links to, copied to
    `repository/` in the site; from the studies' pages, which Skipway makes itself, a link to the start of the site; and
    the page that servers show for an address that is not there. A link of the site to a file that it lacks ends the
    build.
    """
    from latex2mathml.converter import convert

    def drawn(match: re.Match[str]) -> str:
        formula = unescape(match[2]).strip()
        if match[1] == "span":
            return convert(formula, display="inline")
        parts = [convert(part.strip(), display="block") for part in formula.split(r"\qquad")]
        return f'<div class="formula">{" ".join(parts)}</div>'

    for page in SITE.rglob("*.html"):
        text = page.read_text("utf-8")
        if page.parent.name == "studies":
            page.write_text(TRAIL.sub(r'\g<0><a href="../index.html">Skipway</a> › ', text), "utf-8")
            continue
        text = ONLY_SITE.sub(r"\1", TABLE.sub(stackable, FORMULA.sub(drawn, text)))
        text = CODE.sub(lambda match: f"<code>{unbroken(match[1])}</code>", SHELL.sub(commands, text))
        if page.stem == "09-what-held" or page.parent.name == "schemes":
            text = CELL.sub(lambda match: f"<t{match[1]}{match[2]}>{powers(match[3])}</t{match[1]}>", text)
        if page.parent.name == "ru":
            text = text.replace('<html lang="en"', '<html lang="ru"', 1)
            for english, russian in RUSSIAN_PARTS.items():
                text = re.sub(rf'(?<=[>"])(\s*){english}(?=\s*[<":])', rf"\g<1>{russian}", text)
        page.write_text(OUTWARD.sub(lambda match, page=page: copied(match, page), text), "utf-8")
    shutil.copyfile(Path(__file__).with_name("404.html"), SITE / "404.html")
    if dead := dead_links(SITE):
        sys.exit("\n".join(["dead links:", *dead]))


def stackable(table: re.Match[str]) -> str:
    """A table whose rows a narrow screen shows below each other (docs/site.css), where it is too wide for one."""
    rows = [
        [re.sub("<[^>]*>", "", unescape(text)) for _, _, text in CELL.findall(row)] for row in ROW.findall(table[0])
    ]
    if len(rows[0]) < 2 or max(sum(map(len, row)) for row in rows) <= TELEPHONE.get(len(rows[0]), 45):
        return table[0]

    def labelled(row: re.Match[str]) -> str:
        names = iter(rows[0])

        def cell(found: re.Match[str]) -> str:
            kind, given, text = found.groups()
            kind = kind if text.strip() else "d"  # a heading without words is none
            role = "columnheader" if kind == "h" else "cell"
            return f'<t{kind} role="{role}" data-label="{escape(next(names, "").strip())}"{given}>{text}</t{kind}>'

        return f'<tr role="row">{CELL.sub(cell, row[1])}</tr>'

    # boxes other than those of tables take the roles away, which are therefore said; a class would take the style away
    return ROW.sub(labelled, table[0]).replace("<table>", '<table data-stacked role="table">', 1)


def commands(block: re.Match[str]) -> str:
    """A block of commands line by line, so that a narrow screen wraps them; other text and output as they are."""
    lines = block[1].rstrip("\n").split("\n")
    if not all(
        COMMAND.match(re.sub("<[^>]*>", "", line)) and line.count("<span") == line.count("</span") for line in lines
    ):
        return block[0]
    marked = "".join(f'<span class="command">{unbroken(line)}\n</span>' for line in lines)
    head = block[0][: block.start(1) - block.start()]
    return f"{head.replace('language-text', 'language-bash')}{marked}</code>"


def unbroken(code: str) -> str:
    """Code with its short words that contain a hyphen or bracket, such as options, marked not to be broken there."""

    def word(match: re.Match[str]) -> str:
        return f'<span class="word">{match[0]}</span>' if len(unescape(match[0])) <= WHOLE else match[0]

    parts = re.split("(<[^>]*>)", code)
    return "".join(part if place % 2 else HYPHENED.sub(word, part) for place, part in enumerate(parts))


def powers(cell: str) -> str:
    """A cell of a table with its powers and indices as such; its code and tags as they are."""
    from skipway.schemes.cards import raised

    parts = re.split("(<code>.*?</code>|<[^>]*>)", cell)
    return "".join(part if place % 2 else raised(part) for place, part in enumerate(parts))


def dead_links(site: Path) -> list[str]:
    """Links of a site to files that it does not have, each with its page, and those that begin at the root of a server,
    where a site in a folder is not; other sites are not asked.
    """
    pages = [page for page in sorted(site.rglob("*.html")) if "repository" not in page.relative_to(site).parts]
    return [
        f"{page.relative_to(site)}: {link}"
        for page in pages
        for link in dict.fromkeys(LOCAL.findall(page.read_text("utf-8")))
        if link.startswith("/") or not (page.parent / unquote(unescape(link))).exists()
    ]


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
