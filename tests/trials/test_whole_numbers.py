"""Kind: a number that an option cannot take is rounded without a word.

| trial | input | right value |
|---|---|---|
| B16 | `--epochs 1.5`, and every other option of whole numbers, in every command | refused, with the option |
| | `Recipe(epochs=1.5)` | refused |
"""

from __future__ import annotations

import pytest

import skipway as sw
from skipway.cli import main
from skipway.errors import SkipwayError


@pytest.mark.parametrize("value", ["1.5", "2.0", ".5", "1.", "5e-1"])
@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--depth", "--size", "--seed", "--workers", "--folds"])
def test_fractions_are_refused(tmp_path, capsys, option, value):
    assert main(["train", "--out", str(tmp_path / "run"), option, value]) == 2
    assert f"{option} {value}: the rule is a whole number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [("evaluate", "run", "--batch-size", "1.5"), ("diagnose", "resnet20", "--classes", "2.5")]
)
def test_other_commands(capsys, arguments):
    assert main(arguments) == 2
    assert f"{arguments[-2]} {arguments[-1]}: the rule is a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["epochs", "batch_size", "depth", "size", "accumulate"])
@pytest.mark.parametrize("value", [1.5, 2.0, True, "3"])
def test_fractions_in_python(name, value):
    with pytest.raises(SkipwayError, match=f"{name}=.*: the rule is a whole number"):
        sw.Recipe(**{name: value})
