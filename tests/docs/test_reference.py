"""The references that are made when the site is built hold every command, option and public name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import skipway as sw
from skipway.cli.app import app

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "scripts").is_dir(), reason="an installed package has no scripts")


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_and_option_is_in_the_reference(reference):
    page = reference.commands_page()
    commands = [name for name in app if not name.startswith("-")]
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == commands
    sections = dict(zip(commands, page.split("\n## ")[1:], strict=True))
    for command in commands:
        shown = sections[command].replace("--[no-]", "--")
        arguments = app[command].assemble_argument_collection()
        for name in {name for each in arguments for name in each.names if name.startswith("--")}:
            assert re.search(rf"--{name.removeprefix('--no-').removeprefix('--')}\b", shown), f"{command} {name}"
    assert "130 after Ctrl-C" in page


def test_every_public_name_is_in_the_reference_with_its_arguments(reference):
    page = reference.reference_page()
    names = {name for name in dir(sw) if callable(getattr(sw, name))}
    assert set(re.findall(r"^### (.+)$", page, re.MULTILINE)) == names
    section = page.partition("### diagnose\n")[2].partition("\n### ")[0]
    called, _, arguments = section.partition("**Arguments**")
    assert "sw.diagnose(\n    model,\n    example,\n    targets=None,\n    *,\n    loss=None" in called
    assert "* `targets`: " in arguments
    assert "```pycon\n>>> " in page
    assert "runs/&lt;data>-&lt;number>" in page  # not taken for tags


def test_the_site_has_both_pages(reference):
    navigation = (ROOT / "zensical.toml").read_text("utf-8")
    assert all(f'"{page}"' in navigation for page in reference.PAGES)
