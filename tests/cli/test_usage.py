"""The first minutes: help that fits, errors that end with the next command, `skipway doctor`, and what is counted."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import skipway
from skipway.cli import main
from skipway.cli.app import app
from skipway.hardware.checkup import Checkup, Speeds
from skipway.install_lines import EXTRAS, library_line

COMMANDS = [name for name in app if not name.startswith("-")]
MKL = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "9", "MKL_NUM_THREADS": "2"}
FINE = Checkup(
    processor="a CPU",
    cores=4,
    physical=4,
    machine=4,
    load=0.5,
    instructions="AVX512",
    precisions=(),
    memory=16 * 1024**3,
    shared=8 * 1024**3,
    devices=(),
    driver=False,
    build="cpu",
    blas="mkl, oneDNN",
    threads=4,
    settings={"OMP_WAIT_POLICY": "PASSIVE"},
    compiler="/usr/bin/g++",
    headers=True,
    speeds=Speeds(product=400, one_thread=110, bfloat16=800, copy=20, call=1),
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_the_help_of_every_command_fits_80_columns(command, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, flag] if command else [flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert len(lines) > 3


@pytest.mark.parametrize("command", COMMANDS)
def test_a_typo_in_any_command_or_option_is_corrected(command, capsys):
    typo = command[:-1]
    assert main([typo, "--flag"]) == 2
    said = capsys.readouterr().err
    assert f"unknown command '{typo}'; did you mean '{command}'" in said
    assert f"Try: skipway {command} --flag\nSee: skipway {command} --help\n" in said
    assert main([command, "x", "--jsno" if command != "train" else "--epoch"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"See: skipway {command} --help"


def test_arguments_too_many_are_named(capsys):
    assert main(["train", "my", "photos"]) == 2
    assert "too many arguments: 'photos'; a value follows the name of its option" in capsys.readouterr().err


def test_an_unknown_option_of_the_program_is_corrected(capsys):
    assert main(["--versoin"]) == 2
    assert "did you mean '--version'?\nTry: skipway --version\n" in capsys.readouterr().err


def test_wrong_values_end_with_the_help_of_the_command(capsys):
    assert main(["train", "--lr", "-1"]) == 2
    assert capsys.readouterr().err == "skipway: --lr -1.0: the rule is lr > 0\nSee: skipway train --help\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"threads": 1, "settings": {"OMP_NUM_THREADS": "1"}}, "1 of 4 cores, since OMP_NUM_THREADS=1"),
        ({"threads": 3}, "torch computes with 3 of 4 cores: OMP_NUM_THREADS=4"),
        ({"threads": 2, "settings": MKL}, "2 of 4 cores, since MKL_NUM_THREADS=2: MKL_NUM_THREADS=4"),
        ({"cores": 8}, None),  # two of them share a physical core, and torch starts one thread for both
        ({"cores": 8, "threads": 8}, None),
        ({"threads": 16}, "16 threads wait for each other on 4 cores: OMP_NUM_THREADS=4"),
        ({"threads": 16, "settings": MKL}, "on 4 cores, since MKL_NUM_THREADS=2: MKL_NUM_THREADS=4"),
        ({"speeds": dataclasses.replace(FINE.speeds, product=100)}, "4 threads are no faster than one"),
        ({"speeds": dataclasses.replace(FINE.speeds, bfloat16=100)}, "bfloat16 is 4.0 times slower than float32"),
        ({"settings": {}}, "OMP_WAIT_POLICY=PASSIVE"),
        ({"load": 9.0}, "9.0 processes share the 4 cores of this machine"),
        ({"load": 20.0, "machine": 64}, None),  # a container of 4 cores among others
        ({"blas": "open"}, "no oneDNN"),
        ({"driver": True}, "install the build for CUDA"),
        ({"build": "CUDA 12.8"}, "built for CUDA 12.8 and sees no GPU"),
        ({"compiler": ""}, "no C++ compiler"),
        ({"headers": False}, "headers of Python"),
        ({"memory": 10**9}, "1.0 GB of memory are left"),
        ({"shared": 64 * 10**6}, "64 MB of shared memory"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_slow_is_said_with_its_cause(change, said):
    causes = list(dataclasses.replace(FINE, **change).causes())
    assert len(causes) == (said is not None)
    assert said is None or said in causes[0]


def test_doctor_measures_this_machine_and_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("skipway.cli.doctor.version_of", lambda package: None)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] < 2
    assert all(speed > 0 for speed in found["machine"]["speeds"].values())
    lines = {each["name"]: each["line"] for each in found["packages"]}
    assert lines["matplotlib"] == "pip install 'skipway[plot]'"
    assert lines["timm"] == library_line("timm")
    monkeypatch.setattr("skipway.hardware.checkup.check_machine", lambda: FINE)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"skipway {skipway.__version__}" in shown
    assert "nothing was found that is slow here" in shown
    assert "load 0.5 on 4 cores\n" in shown
    assert re.search(r"^missing     matplotlib, for .*\n +pip install 'skipway\[plot\]'$", shown, re.MULTILINE)


def test_extras_of_messages_are_extras_of_doctor():
    """Every `MissingExtraError` names an extra that `skipway doctor` explains."""
    sources = "".join(path.read_text("utf-8") for path in Path(skipway.__file__).parent.rglob("*.py"))
    named = set(re.findall(r'MissingExtraError\(\s*[^,]+,\s*"(\w+)"', sources))
    assert {"plot", "onnx", "digits"} <= named <= set(EXTRAS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_options(shell):
    script = app.generate_completion(shell=shell)
    assert set(COMMANDS) <= set(re.findall(r"[a-z]+", script))
    assert "batch-size" in script
