"""How many links it takes from the start of the built site to the page that answers: `docs/side-by-side.md`.

python scripts/clicks.py          # compares Skipway's numbers in the table with build/site; status 1 if one differs
python scripts/clicks.py write    # writes them
"""

from __future__ import annotations

import re
import sys
from collections import deque
from html import unescape
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
PAGE, SITE = ROOT / "docs" / "side-by-side.md", ROOT / "build" / "site"
ROW = re.compile(r"^(\| [^|]*(?:\]\(|<!-- )([\w/-]+)\.md(?:\)| -->) \| )(\d+|–)( \|)", re.MULTILINE)
"""A row whose first cell names the page that answers, in a link or, of pages that only the site has, in a comment, and
whose second is the number of clicks to it."""
TEXTS = [re.compile(rf"<{element}\b.*?</{element}>", re.DOTALL) for element in ("article", "main")]
LINK = re.compile(r'<a\s[^>]*?href="([^"#:?]+)["#]')


def clicks(site: Path, start: str = "index.html") -> dict[Path, int]:
    """The least number of links in the text of pages, menus and search aside, from the start to each page of a site."""
    first = (site / start).resolve()
    found, waiting = {first: 0}, deque([first])
    while waiting:
        page = waiting.popleft()
        content = page.read_text("utf-8")
        texts = filter(None, (each.search(content) for each in TEXTS))
        for link in LINK.findall(next(texts, [content])[0]):
            target = (page.parent / unquote(unescape(link))).resolve()
            if target.suffix == ".html" and target.is_file() and target not in found:
                found[target] = found[page] + 1
                waiting.append(target)
    return found


def counted(site: Path, page: str) -> str:
    """The text of the page with the table, with the numbers of a site."""
    known = clicks(site)

    def row(match: re.Match[str]) -> str:
        number = known.get((site / f"{match[2]}.html").resolve())
        return f"{match[1]}{'–' if number is None else number}{match[4]}"

    return ROW.sub(row, page)


if __name__ == "__main__":
    before = PAGE.read_text("utf-8")
    after = counted(SITE, before)
    if sys.argv[1:] == ["write"]:
        PAGE.write_text(after, "utf-8")
    elif after != before:
        sys.exit(f"{PAGE.relative_to(ROOT)}: python scripts/clicks.py write")
