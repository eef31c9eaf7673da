"""The examples' commands, as bash puts them together, are ones that our command line takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from skipway.cli.app import app
from skipway.recipe import Recipe
from skipway.schemes import parse_scheme

SLURM = Path(__file__).parents[2] / "examples" / "slurm"
pytestmark = [
    pytest.mark.skipif(not SLURM.is_dir(), reason="the examples are not part of an installed package"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]
# stands for Slurm's programs: writes down what it was asked to run
STUB = '#!/usr/bin/env bash\nprintf \'%s\\0\' "$@" > "$RECORD"\n'


def given(script: str, place: Path, arguments: tuple[str, ...] = (), **variables: str) -> list[str]:
    """What a script asks srun to run."""
    programs = place / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("srun", "scancel"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    (programs / "scontrol").write_text("#!/usr/bin/env bash\necho node1\necho node2\n")
    (programs / "scontrol").chmod(0o755)
    record = place / "record"
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "RECORD": str(record), **variables}
    ran = subprocess.run(
        ["bash", str(SLURM / script), *arguments],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return record.read_text().split("\0")[:-1]


def parsed(words: list[str]) -> tuple[Recipe, Path]:
    """The recipe and the run folder of `train ...`, read by our command line and not run."""
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert bound.arguments["resume"] is True
    return bound.arguments["recipe"], bound.arguments["out"]


def test_the_training_on_several_nodes(tmp_path):
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    words = given("train.sbatch", tmp_path, ("my photos", "runs/a"), **variables, SLURM_GPUS_ON_NODE="4")
    assert words[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "4"]
    assert words[words.index("--rdzv-endpoint") + 1] == "node1:29500"
    assert "SIGUSR1" in words[words.index("--signals-to-handle") + 1]
    at = words.index("-m")
    assert words[at + 1] == "skipway"
    recipe, out = parsed(words[at + 2 :])
    assert (recipe.data, out) == (Path("my photos"), Path("runs/a"))
    assert recipe.batch_size % 8 == 0, "two nodes of four GPUs share it"


def test_torchrun_takes_its_options(tmp_path):
    parser = pytest.importorskip("torch.distributed.run").get_args_parser()
    variables = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    found = parser.parse_args(given("train.sbatch", tmp_path, **variables)[1:])
    assert found.module
    assert found.training_script == "skipway"


def test_every_run_of_the_sweep(tmp_path):
    header = (SLURM / "sweep.sbatch").read_text()
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", header).groups())
    found, folders = set(), set()
    for number in range(first, last + 1):
        variables = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_JOB_ID": "9"}
        words = given("sweep.sbatch", tmp_path, **variables)
        assert words[0] == "skipway"
        recipe, out = parsed(words[1:])
        parse_scheme(recipe.scheme)
        found.add((recipe.scheme, recipe.depth, recipe.seed))
        folders.add(out)
        assert not set(str(out)) & set(" ()")
    assert len(found) == len(folders) == last - first + 1 == 4 * 3 * 3


@pytest.mark.parametrize("script", ["train.sbatch", "sweep.sbatch"])
@pytest.mark.parametrize(("ends_with", "requeued"), [(138, True), (0, False)])
def test_a_job_at_its_limit_requeues_itself_unless_it_is_done(tmp_path, script, ends_with, requeued):
    """The batch shell is sent USR1; the step, told by scancel, saves and ends a little later."""
    said, step, batch = (tmp_path / name for name in ("said", "step", "batch"))
    programs = tmp_path / "programs"
    programs.mkdir()
    stubs = {
        "srun": f"trap 'sleep 0.3; exit {ends_with}' USR1; echo $$ > {step}; for i in {{1..200}}; do sleep 0.05; done",
        "scancel": f'echo scancel "$@" >> {said}; kill -USR1 $(cat {step})',
        "scontrol": f'if [ "$1" = show ]; then echo node1; else echo scontrol "$@" >> {said}; fi',
    }
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    batch.write_text(f"while [ ! -s {step} ]; do sleep 0.02; done; kill -USR1 $1")
    slurm = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"}
    process = subprocess.Popen(
        ["bash", str(SLURM / script)],
        env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **slurm, **array},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    subprocess.run(["bash", str(batch), str(process.pid)], timeout=20, check=True)
    process.communicate(timeout=20)
    assert process.returncode == ends_with
    job = "7" if script == "train.sbatch" else "7_0"
    expected = [f"scancel --signal=USR1 {job}", *([f"scontrol requeue {job}"] if requeued else [])]
    assert said.read_text().splitlines() == expected
