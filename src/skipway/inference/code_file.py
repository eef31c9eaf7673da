"""The Python file that a network is made by, where it is one: its place, its name elsewhere, what it imports."""

from __future__ import annotations

import ast
from pathlib import Path

from skipway.zoo import source_of

__all__ = ["code_file", "local_imports", "portable_name"]


def code_file(name: str) -> Path | None:
    """The file in the name of a network; None for networks of libraries.

    >>> code_file("nets/mine.py:make"), code_file("timm:resnet18")
    (PosixPath('nets/mine.py'), None)
    """
    source, text = source_of(name)
    if source.library is not None:
        return None
    return Path(text if text.endswith(".py") else text.rpartition(":")[0])


def portable_name(name: str) -> str:
    """The name of a network for others: that of a file without its folders.

    >>> portable_name("/home/me/nets/mine.py:make"), portable_name("timm:resnet18")
    ('mine.py:make', 'timm:resnet18')
    """
    file = code_file(name)
    return name if file is None else file.name + name[len(str(file)) :]


def local_imports(file: Path) -> list[str]:
    """The modules that a file imports from its own folder, at any place in it.

    Raises:
        SyntaxError: the file is not Python.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(node.module or each.name).partition(".")[0] for each in node.names}
    folder = file.parent
    return sorted(name for name in names if (folder / f"{name}.py").is_file() or (folder / name).is_dir())
