"""The house: every file imports its own package and strictly lower floors; the public names are pinned."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import skipway as sw

SOURCE = Path(sw.__file__).parent
FLOORS = [
    {"errors", "_version"},
    {"hardware", "validation", "registry"},
    {"nn"},
    {"tracing", "kernels"},
    {"schemes"},
    {"models", "optim", "probes"},
    {"weights"},
    {"zoo", "checkpoint"},
    {"data", "surgery"},
    {"recipe", "diagnosis", "monitor"},
    {"inference"},
    {"report"},
    {"training"},
    {"studies"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(
    path for path in SOURCE.rglob("*.py") if path not in (SOURCE / "__init__.py", SOURCE / "cli/__main__.py")
)


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Rooms that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "skipway":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("skipway."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("skipway.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    own = room(path)
    for other in imports(path) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{path} on floor {FLOOR[own]} imports {other} on floor {FLOOR[other]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_says_what_it_offers(path):
    tree = ast.parse(path.read_text())
    named = [n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(n)]
    assert named, f"{path} has no __all__"


def test_no_drawers_for_odds_and_ends():
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in FILES}


def test_no_family_knows_a_schemes_name():
    """But the published default of a config or of a variant."""
    names = {name for name in sw.schemes.all_schemes() if name not in ("identity", "plain", "preactivation")}
    for path in (SOURCE / "models").rglob("*.py"):
        tree = ast.parse(path.read_text())
        used = {n.id.lower() for n in ast.walk(tree) if isinstance(n, ast.Name)}
        used |= {n.attr.lower() for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not used & names, path


def test_public_names_are_pinned():
    assert sw.__all__ == [
        *("BasicBlock", "Bottleneck", "Chain", "CheckpointError", "Connection", "DataError", "DeepNorm"),
        *("DepthScaled", "Diagnosis", "DivergedError", "Fixup", "Identity", "Kit", "LayerScale"),
        *("MissingExtraError", "NormFree", "Placement", "Plain", "PreActivation", "ReZero", "ResNet"),
        *("ResNetConfig", "Residual", "Scheme", "Site", "SkipInit", "SkipwayError", "StochasticDepth"),
        *("ZeroInit", "__version__", "accelerate", "build", "chain", "deepen", "diagnose", "features", "fold"),
        *("from_pretrained", "initialise_"),
        *("lesion", "load", "optimize", "param_groups", "projection", "remove_norm", "rescheme", "shorten"),
        "stage_features",
    ]
    for name in sw.__all__:
        assert getattr(sw, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sw.nonsense


def test_import_skipway_is_light():
    """It imports nothing heavy by itself: not torch, not numpy, not PIL."""
    code = "import sys, skipway; print([m for m in ('torch', 'numpy', 'PIL', 'rich', 'cyclopts') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_torchvision_and_timm_are_never_imported():
    heavy = "('torchvision', 'timm', 'torch._dynamo')"
    code = f"import sys, skipway.models, skipway.weights; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
