"""The file that a network is made by, Python code or a config: its place, its name elsewhere, what it imports."""

from __future__ import annotations

import ast
from pathlib import Path

from skipway.errors import SkipwayError
from skipway.zoo import config_file, source_of

__all__ = ["CONFIG", "code_file", "local_imports", "network_file", "portable_file", "portable_name", "with_file"]

CONFIG = "network.json"
"""Name of a config of transformers beside published weights, whose own config is `config.json`."""


def code_file(name: str) -> Path | None:
    """The file in the name of a network; None for networks of libraries, and for what names none.

    >>> code_file("nets/mine.py:make"), code_file("timm:resnet18")
    (PosixPath('nets/mine.py'), None)
    """
    try:
        source, text = source_of(name)
    except SkipwayError:
        return None
    if source.library is not None:
        return None
    return Path(text if text.endswith(".py") else text.rpartition(":")[0])


def network_file(name: str) -> Path | None:
    """The file of this machine in the name of a network: its code, or its config of transformers."""
    source, text = source_of(name)
    return config_file(text) if source.library == "huggingface" else code_file(name)


def with_file(name: str, file: Path) -> str:
    """The name of the same network whose file is at another place.

    >>> with_file("nets/mine.py:make", Path("other.py")), with_file("hf:vit", Path("vit/config.json"))
    ('other.py:make', 'hf:vit/config.json')
    """
    code = code_file(name)
    return f"hf:{file}" if code is None else f"{file}{name[len(str(code)) :]}"


def portable_file(name: str) -> Path | None:
    """The file of a network as it is called beside published weights; None for networks of libraries."""
    code = code_file(name)
    if code is not None:
        return Path(code.name)
    return None if network_file(name) is None else Path(CONFIG)


def portable_name(name: str) -> str:
    """The name of a network for others: that of a file without its folders.

    >>> portable_name("/home/me/nets/mine.py:make"), portable_name("hf:/home/me/vit"), portable_name("timm:resnet18")
    ('mine.py:make', 'hf:network.json', 'timm:resnet18')
    """
    file = portable_file(name)
    return name if file is None else with_file(name, file)


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
