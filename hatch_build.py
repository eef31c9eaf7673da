"""Build hook: the README for a package index, where links and pictures relative to the repository lead nowhere.

With a home in `[project.urls]` (`Source`), links and pictures become absolute ones below it. Without, a link becomes
its text with the name of the file that it leads to in the source distribution, and a picture its description.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


class IndexReadme(MetadataHookInterface):
    """Sets the field `readme`."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text("utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": readme_for_index(text, source)}


def readme_for_index(text: str, source: str | None) -> str:
    """The README with links that work on a package index.

    Args:
        text: of README.md.
        source: address of the repository's files, or None.

    >>> readme_for_index("![a curve](docs/a.png) [More](docs/b.md), [docs/c.md](docs/c.md)", None)
    '*Picture: a curve.* More (docs/b.md), docs/c.md'
    >>> readme_for_index("[More](docs/b.md)", "https://example.org/skipway")
    '[More](https://example.org/skipway/docs/b.md)'
    """

    def replaced(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        if source is not None:
            return f"{mark}[{words}]({source.rstrip('/')}/{target})"
        if mark:
            return f"*Picture: {words}.*"
        return words if words == target else f"{words} ({target})"

    return LINK.sub(replaced, text)
