"""The house: every file imports its own package and strictly lower floors; the public names are pinned."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import skipway as sw

SOURCE = Path(sw.__file__).parent
FLOORS = [
    {"errors", "_version"},
    {"hardware", "install_lines", "json_values", "validation", "registry"},
    {"nn"},
    {"tracing", "kernels"},
    {"schemes"},
    {"models", "optim", "probes"},
    {"weights"},
    {"zoo", "checkpoint"},
    {"data", "surgery"},
    {"recipe", "presets", "diagnosis", "monitoring"},
    {"inference", "depth_transfer", "argument_names"},
    {"report"},
    {"training"},
    {"studies"},
    {"cli"},
    {"classifier", "__main__"},
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
            found |= {alias.name if alias.name in FLOOR else "__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("skipway."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {[*parts, "__init__"][1] for parts in names if parts[0] == "skipway"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    own = room(path)
    assert "__init__" not in imports(path), f"{path} imports the package root"
    for other in imports(path) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{path} on floor {FLOOR[own]} imports {other} on floor {FLOOR[other]}"


def test_no_circle_of_imports():
    """Files that import each other when they load, through a package's `__init__` or directly."""
    modules = {module_name(path): path for path in SOURCE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {each if each in modules else node.module for each in names} & set(modules)
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & set(modules)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_says_what_it_offers(path):
    tree = ast.parse(path.read_text())
    named = [n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(n)]
    assert named, f"{path} has no __all__"


# Words --------------------------------------------------------------------------------------------------------------

NOUNS_OF_THE_FIELD = {"distributed", "fully_connected", "monitoring", "preprocessing", "speed", "tracing", "training"}


def definitions(kinds: tuple[type, ...]) -> dict[str, set[Path]]:
    """The files that define each top-level name."""
    found: dict[str, set[Path]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                found.setdefault(node.name, set()).add(path)
    return found


def test_no_two_classes_share_a_name():
    twice = {name: paths for name, paths in definitions((ast.ClassDef,)).items() if len(paths) > 1}
    assert not twice


def test_a_function_name_stands_in_two_files_at_most():
    """Twice is a command and the function behind it, or the two halves of an interface."""
    often = {name: paths for name, paths in definitions((ast.FunctionDef,)).items() if len(paths) > 2}
    assert not often


def test_no_module_is_named_by_a_participle():
    schemes = {path.stem for path in (SOURCE / "schemes").iterdir()}
    stems = {path.stem for path in FILES} - schemes - NOUNS_OF_THE_FIELD
    assert not {stem for stem in stems if stem.endswith(("ing", "ed"))}


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


PUBLIC = """
AttentionResiduals BasicBlock Bottleneck CaiT CaiTConfig Chain CheckpointError Comparison Connection ConvNeXt
ConvNeXtConfig DataError DeepNorm DenseFormer DepthMixing DepthScaled DepthTransfer Diagnosis DivergedError
DualResidual DyT Finding
Fixup FracConnections GatedStreams GPT GPTConfig GTrXL Highway HybridNorm HyperConnections Identity Keel Kit LAuReL
LayerNormScaling LayerScale LoopCheckpoints MHC MissingExtraError MixNorm MUDD NormFree Operation OptimizedModel
Orthogonal Outcome PeriNorm Placement Plain PreActivation ProRes Recipe Residual ResNet ResNetConfig ReZero Scheme
SiameseNorm Site SkipInit SkipwayError StochasticDepth StreamHealth Swin SwinConfig TrainedClassifier Treatment UMuP
ValueResiduals ViT ViTConfig WatchedConnection X0Residual ZeroInit __version__ accelerate build chain checkpoint
checkpointed data deepen depth_mixing depth_transfer diagnose diagnosis features fit fold_gains from_pretrained fuse
generate hardware inference influence initialise_ kernels lesion load load_optimized models monitor monitoring nn optim
optimize param_groups probes projection quantize remove_norm report rescheme reversible schemes set_step shorten
skip_compute stage_features stream_health studies surgery tracing train training transfer weights zoo
"""


def test_public_names_are_pinned():
    assert set(sw.__all__) == set(PUBLIC.split())
    assert dir(sw) == sw.__all__
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
    """Nor what takes torch longer to import than a network to build."""
    heavy = "('torchvision', 'timm', 'torch._dynamo', 'sympy')"
    build = "import sys, skipway.models, skipway.weights; skipway.models.build('resnet8')"
    code = f"{build}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
