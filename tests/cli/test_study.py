"""`skipway study` and `skipway report`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from skipway.cli import main
from skipway.cli.study import parse_integers, split_specs
from skipway.errors import SkipwayError
from skipway.studies import runner
from skipway.studies.study import studies

TINY = ["study", "propagation", "--depths", "3,4", "--schemes", "Fixup", "--seeds", "0", "--jobs", "1"]


def test_the_list_has_every_study(capsys):
    assert main(["study", "--list"]) == 0
    assert [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(studies())


def test_a_study_lists_its_grid(capsys):
    assert main(["study", "degradation", "--list"]) == 0
    text = capsys.readouterr().out
    assert "depth\t8, 20, 56, 110\n" in text
    assert "scheme\t'plain', 'identity'\n" in text


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells are measured in this process, where none of its own is what is tested."""
    measure = runner.measure_cells
    monkeypatch.setattr(runner, "measure_cells", lambda *given, **options: measure(*given, **{**options, "jobs": 0}))


@pytest.mark.usefixtures("in_this_process")
def test_a_scheme_without_a_claim_is_told(tmp_path, capsys):
    given = [*TINY, "--out", str(tmp_path)]
    given[given.index("Fixup")] = "Fixup,rezero"
    assert main(given) == 0
    assert "propagation has no claim about 'rezero'" in capsys.readouterr().err


def test_a_study_runs_is_not_run_again_and_reports(tmp_path, capsys):
    out = tmp_path / "s"
    assert main([*TINY, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "[2/2]" in text
    assert "OPEN" in text
    assert "A reduced grid: " in text
    score = re.search(r"^\d+ of 8 claims .*\.$", text, re.MULTILINE)[0]
    assert f"<strong>{score}</strong>" in (out / "propagation.html").read_text("utf-8"), "the page says the same"
    assert main([*TINY, "--out", str(out)]) == 0
    assert "2 cells, 2 of them already measured" in capsys.readouterr().out
    key = re.search(r"^propagation,([0-9a-f]{12}),", (out / "propagation.csv").read_text(), re.MULTILINE)[1]
    assert main(["study", "propagation", "--cell", key, "--out", str(out)]) == 0
    assert re.search(r"forward_theory +0", capsys.readouterr().out)
    assert main(["report", str(out)]) == 0
    assert (out / "index.html").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_cell_that_fails_is_told_and_the_others_are_measured(tmp_path, capsys):
    given = [*TINY, "--out", str(tmp_path)]
    given[given.index("Fixup")] = "Fixup,mudd"  # refuses chains of MLPs alone
    assert main(given) == 1
    text = capsys.readouterr().out
    assert "2 cells failed; the first: kind='mlp'" in text


@pytest.mark.usefixtures("in_this_process")
def test_shares_are_merged_by_report(tmp_path, capsys):
    for index in range(2):
        assert main([*TINY, "--out", str(tmp_path), "--array", f"{index}/2"]) == 0
    assert not (tmp_path / "propagation.csv").exists()
    assert main(["report", str(tmp_path)]) == 0
    assert len((tmp_path / "propagation.csv").read_text().splitlines()) == 3


def test_an_interruption_keeps_what_is_measured_and_leaves_no_process(tmp_path):
    given = [*TINY, "--out", str(tmp_path)]
    given[given.index("3,4")] = "3-400"
    code = f"import sys; from skipway.cli import main; sys.exit(main({given!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not process.stdout.readline().startswith("[2/"):
            assert process.poll() is None
        for _ in range(4):
            os.killpg(process.pid, signal.SIGINT)
            try:
                _, error = process.communicate(timeout=30)
                break
            except subprocess.TimeoutExpired:  # Python loses an interruption that comes while a finaliser runs
                continue
        else:
            process.kill()
            pytest.fail("four interruptions changed nothing")
    assert process.returncode == 130, error
    assert "the same command resumes from there" in error
    assert "Traceback" not in error
    assert len((tmp_path / "propagation.csv").read_text().splitlines()) >= 3
    # multiprocessing's own tracker ends a moment after
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["study"], "which study"),
        (["study", "propagatoin"], "did you mean 'propagation'"),
        (["study", "propagation", "--depths", "x"], "comma-separated integers"),
        (["study", "propagation", "--array", "9/8"], "INDEX/COUNT"),
        (["study", "propagation", "--jobs", "0"], "jobs >= 1"),
        (["study", "skipinit", "--depths", "20"], "near it are 16 and 22"),
        (["study", "skipinit", "--schemes", "nosuch"], "unknown scheme 'nosuch'"),
        (["study", "all", "--depths", "8"], "depth 8: "),
        (["study", "all", "--cell", "ab"], "belongs to one study"),
        (["report", "nowhere"], "is not a folder"),
    ],
)
def test_wrong_usage_is_told(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_lists_are_read():
    assert parse_integers("seeds", "3, 5-7") == (3, 5, 6, 7)
    assert split_specs("plain,skipinit(init=0.0, norm='remove')") == ["plain", "skipinit(init=0.0, norm='remove')"]
    with pytest.raises(SkipwayError):
        parse_integers("seeds", "1-")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "4-0", "ranges from the smaller to the larger: 0-4"),
        ("--depths", "4-3", "3-4"),
        ("--seeds", "0-99999999999", "at most 10,000"),
        ("--seeds", str(2**64), "at most 64 bits"),
        ("--schemes", " , ", "at least one scheme"),
    ],
)
def test_choices_of_nothing_are_no_full_grid(option, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, option, value]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_torch():
    code = "import sys; from skipway.cli import main; main(['study', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
