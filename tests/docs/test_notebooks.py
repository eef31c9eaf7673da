"""The notebooks run, in order and offline, with small numbers in place of those of their first cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
SMALL = {
    "1-why-depth-fails": "EPOCHS, DEPTHS = 1, (2, 3)",
    "2-diagnose-and-mend": "BLOCKS, STEPS = 3, 10",
    "3-photos-to-classifier": "IMAGES, EPOCHS = 10, 1",
    "4-one-stream-is-not-enough": "BLOCKS, STREAMS = 2, 2",
}
pytestmark = pytest.mark.skipif(not NOTEBOOKS.is_dir(), reason="an installed package has no notebooks")


def code_of(name: str) -> list[str]:
    content = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))
    assert content["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in content["cells"]), "saved without outputs"
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, capsys):
    chosen, *cells = code_of(name)
    assert chosen.partition(" = ")[0] == SMALL[name].partition(" = ")[0]
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate([SMALL[name], *cells]):
        exec(compile(cell, f"{name}, code cell {number}", "exec"), namespace)
    assert capsys.readouterr().out
