"""The files around the package agree with each other: one version, one list of checks, an sdist with all its tests."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import skipway as sw
from skipway.install_lines import EXTRAS

ROOT = Path(__file__).parents[1]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_version_is_written_once():
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/skipway/_version.py"
    texts = [ROOT / name for name in ("pyproject.toml", "CITATION.cff", "zensical.toml", "src/skipway/__init__.py")]
    assert [path.name for path in texts if f'"{sw.__version__}"' in path.read_text("utf-8")] == []


def test_pre_commit_runs_what_scripts_check_runs():
    hooks = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"), re.MULTILINE)
    script = (ROOT / "scripts/check").read_text("utf-8")
    *_, commands = script.split("\nfi\n")
    assert hooks
    assert hooks == commands.strip().splitlines()


def test_the_hosted_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    assert re.findall(r"run: (.+)", workflow) == ["bash .ci/run"]


def test_a_package_index_shows_no_link_that_leads_nowhere():
    """Without a home there is none, and with one all begin there."""
    hook = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    pytest.importorskip("hatchling")
    module = importlib.util.module_from_spec(hook)
    hook.loader.exec_module(module)
    text = (ROOT / "README.md").read_text("utf-8")
    plain = module.readme_for_index(text, PROJECT["project"].get("urls", {}).get("Source"))
    homely = module.readme_for_index(text, "https://example.org/files/")
    targets = [re.findall(r"\]\(([^)\s]+)\)", each) for each in (text, plain, homely)]
    assert "docs/diagnosis.png" in targets[0]
    assert all(target.startswith("https://") for each in targets[1:] for target in each)
    assert "https://example.org/files/docs/diagnosis.png" in targets[2]
    assert len(targets[2]) == len(targets[0])


def test_every_pinned_version_is_allowed_by_the_project():
    """And everything that the project asks for is pinned."""
    requirements = pytest.importorskip("packaging.requirements")
    pins = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = requirements.Requirement(line)
            pins[pin.name.replace("_", "-").lower()] = next(iter(pin.specifier)).version
    asked = [*PROJECT["project"]["dependencies"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        asked += [each for each in extra if not each.startswith("skipway[")]
    for each in map(requirements.Requirement, asked):
        name = each.name.replace("_", "-").lower()
        if name in pins:
            assert each.specifier.contains(pins[name]), each
    own = {requirements.Requirement(each).name for each in PROJECT["project"]["dependencies"]}
    assert own <= set(pins), "a dependency of the package is not pinned"


EXPLAINED = re.findall(r"^\| `([a-z0-9]+)` \| ", (ROOT / "docs/install.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("extra", PROJECT["project"]["optional-dependencies"])
def test_an_extra_is_explained_and_keeps_torch(extra):
    """In docs/install.md and by `skipway doctor`; nothing that it requires, however far down, pins torch."""
    assert extra in EXPLAINED
    assert extra in EXTRAS or extra in ("dev", "docs")
    asked = PROJECT["project"]["optional-dependencies"][extra]
    waiting, seen = [re.split(r"[<>=!\[; ]", each)[0] for each in asked], set()
    while waiting:
        name = waiting.pop()
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines if name not in seen and name != "skipway" else ():
            assert not re.match(r"torch\s*\(?(==|~=|<)", line), f"{name} requires {line}"
            waiting += [] if "extra ==" in line else [re.split(r"[<>=!~()\[; ]", line)[0]]
        seen.add(name)
    assert seen or not any(map(installed, asked))


def installed(requirement: str) -> bool:
    try:
        return bool(metadata.version(re.split(r"[<>=!\[; ]", requirement)[0]))
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> set[str]:
    """The names of the files in a source distribution built here, without the folder that they are in."""
    pytest.importorskip("hatchling")
    place = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = place.glob("*.tar.gz")
    assert archive.name == f"skipway-{sw.__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "docs", "examples", "scripts", ".github", ".ci"])
def test_the_sdist_holds_a_folder_whole(sdist, folder):
    """`scripts/sdist` runs the tests in it."""
    own = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", ".ruff_cache"} & set(path.parts)
    }
    assert own
    assert own - sdist == set()


def test_the_sdist_holds_what_is_read_at_the_top(sdist):
    names = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "NOTICE", "CITATION.cff", "constraints.txt"}
    assert names | {"pyproject.toml", "zensical.toml", ".pre-commit-config.yaml", ".gitignore"} <= sdist


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    """Templates and the marker of types among it; no benchmarks, no tests."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        found = {name for name in opened.namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "skipway"
    own = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert found == {f"skipway/{path.relative_to(package).as_posix()}" for path in own}
