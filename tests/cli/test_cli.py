"""The command line as people and scripts meet it: help, errors and exit statuses, Ctrl-C, plain and live output."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import skipway
from skipway.checkpoint.files import read_tensors
from skipway.checkpoint.store import Checkpoints
from skipway.cli import BEGAN, main
from skipway.cli.app import TRAIN_HEADINGS
from skipway.cli.interrupts import StopSignal
from skipway.cli.progress import LineReporter, LiveReporter
from skipway.cli.train import continuation
from skipway.errors import SkipwayError
from skipway.presets import PRESETS
from skipway.recipe import Recipe, ResolvedRecipe, parse_duration
from skipway.training import step, train
from skipway.training.reporter import StepReport
from skipway.training.resume import resume_recipe

QUICK = [
    "--depth",
    "8",
    "--width",
    "4",
    "--epochs",
    "1",
    "--batch-size",
    "256",
    "--device",
    "cpu",
    "--precision",
    "float32",
]
COMMAND = [sys.executable, "-m", "skipway.cli"]
REPORT = StepReport(
    epoch=2, epochs=3, step=4, steps=5, loss=0.5, accuracy=0.75, unit="image", per_second=1234.0, seconds_left=65.0
)
ROW = {
    "epoch": 2,
    "train_loss": 0.5,
    "train_accuracy": 0.9,
    "validation_loss": None,
    "validation_accuracy": 0.8,
    "images_per_second": 1234.0,
    "seconds": 65.0,
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def loaded_by(*arguments: str) -> tuple[int, set[str], str]:
    """Exit status, the heavy modules that a command loads, and its output."""
    code = (
        "import sys; from skipway.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'PIL', 'sklearn', 'safetensors'} & set(sys.modules);"
        "print('LOADED', *heavy); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    text, _, names = done.stdout.rpartition("LOADED")
    return done.returncode, set(names.split()), text + done.stderr


def test_help_loads_nothing_heavy():
    status, loaded, text = loaded_by("--help")
    assert (status, loaded) == (0, set())
    assert all(command in text for command in ("train", "models", "schemes"))
    status, loaded, _ = loaded_by("--version")
    assert (status, loaded) == (0, set())


def test_a_wrong_option_loads_nothing_heavy_and_suggests():
    status, loaded, text = loaded_by("train", "--epoch", "3")
    assert (status, loaded) == (2, set())
    assert "Did you mean --epochs?\nTry: skipway train --epochs 3\nSee: skipway train --help\n" in text
    assert "Traceback" not in text


def test_help_of_train_fits_on_a_screen_and_names_every_field(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 80
    assert main(["train", "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert len(everything) > len(text)
    for entry in dataclasses.fields(Recipe):
        option = entry.name.replace("_", "-")
        shown = everything if entry.metadata.get("advanced") else text
        assert f"--{option} " in shown or f"--[no-]{option} " in shown
    for heading in TRAIN_HEADINGS.values():
        assert f"\n{heading}\n" in text


@pytest.mark.parametrize("command", ["predict", "evaluate", "study", "diagnose", "rescheme"])
def test_every_option_stands_under_the_heading_of_its_group(command, capsys):
    assert main([command, "--help"]) == 0
    section, found = "", {}
    for line in capsys.readouterr().out.splitlines():
        if line and not line.startswith(" "):
            section = line
        elif option := re.match(r"  (--[a-z-]+)", line):
            found[option[1]] = section
    assert found["--json" if command not in ("rescheme",) else "--out"] in ("Output", "Run")
    if "--device" in found:
        assert found["--device"] in ("Hardware", "Machine")
    if "--batch-size" in found:
        assert found["--batch-size"] in ("Prediction", "Evaluation")


def test_no_command_and_an_unknown_one(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^  skipway (diagnose|train)", shown, re.MULTILINE)) == 3
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["trian", "photos", "--lr", "0.1"]) == 2
    assert capsys.readouterr().err.splitlines()[1] == "Try: skipway train photos --lr 0.1"
    assert main(["--version"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()  # names of processors may take more than a line
    assert first == f"skipway {skipway.__version__}"
    # as its package says, which an index publishes without `+cu130`
    assert f"torch {version('torch')}" in second


def pictures(root: Path, classes: tuple[str, ...] = ("dark", "light"), each: int = 6) -> Path:
    noise = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = noise.integers(0, 100, (8, 8, 3), dtype=np.uint8) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


USAGE = [
    (["--model", "resnet21"], 2, r"unknown model 'resnet21'; did you mean|depth 21"),
    (["--scheme", "fixupp"], 2, "unknown scheme 'fixupp'; did you mean 'fixup'"),
    (["--depth", "21"], 2, "--depth 21"),
    (["--width", "0"], 2, "--width 0: the rule is width >= 1"),
    (["--lr", "-1"], 2, "--lr -1.0: the rule is lr > 0"),
    (["--lr", "fast"], 2, 'unable to convert "fast" into float'),
    (["--optimizer", "sdg"], 2, "unknown optimizer 'sdg'; did you mean 'sgd'"),
    (["--device", "gpu7"], 2, "device 'gpu7' cannot be used"),
    (["--resume"], 2, "--resume needs the folder of the run"),
    (["--preset", "fast", "--resume"], 2, "--resume needs the folder of the run"),
    (["--out", "x", "--resume", "--overwrite"], 2, "give one of the two"),
    (["--out", "x", "--resume", "--config", "y"], 2, "give one of the two"),
    (["--preset", "fast", "--config", "y"], 2, "--preset and --config: .* give one of the two"),
    (["book.txt", "--preset", "fast"], 2, "--preset fast: it is for images, and book.txt holds text; leave it out"),
    (["--preset", "fast", "--start", "pretrained"], 2, "for random weights, not for --start pretrained; leave one of"),
    (["--preset", "fsat"], 2, "unknown preset 'fsat'; did you mean 'fast'"),
    (["--config", "nowhere.json"], 4, "nowhere.json does not exist"),
    (["nowhere"], 3, "data folder nowhere does not exist"),
    (["empty"], 3, "no images in empty"),
    (
        ["loose"],
        3,
        r"no images in loose lie in class folders, and 1 image outside: .*/cat/1\.jpg.*predict RUN loose",
    ),
    (["emtpy"], 3, r"data folder emtpy does not exist; did you mean empty\?"),
    (["single"], 3, "only one class, 'alone'"),
    (["--start", "missing.safetensors"], 4, "missing.safetensors"),
]


@pytest.mark.parametrize(
    ("options", "status", "message"), USAGE, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_bad_input_is_named_with_its_exit_status(capsys, options, status, message):
    Path("empty").mkdir()
    pictures(Path("single"), classes=("alone",))
    pictures(Path("."), classes=("loose",), each=1)
    Path("book.txt").write_text("Once upon a time. " * 99, encoding="utf-8")
    assert main(["train", *QUICK, *options]) == status
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.err.startswith("skipway: ")
    assert not Path("runs").exists()


def test_divergence_has_its_own_exit_status(capsys):
    assert main(["train", *QUICK, "--lr", "1e30", "--warmup", "0", "--out", "run"]) == 5
    assert "The last good checkpoint is in run/checkpoints" in capsys.readouterr().err


def test_output_to_a_file_is_plain_lines(capsys):
    assert main(["train", *QUICK, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert len(re.findall(r"^epoch \d/2 ", out, re.MULTILINE)) == 2
    assert re.search(r"^accuracy  \d+\.\d % of 359 test images \(95 % interval ", out, re.MULTILINE)
    summary = out[out.index("\naccuracy") :].strip().splitlines()
    assert len(summary) <= 12
    assert "longer    skipway train --out runs/digits-1 --resume --epochs 4" in summary
    assert main(["train", *QUICK, "--quiet"]) == 0
    assert re.fullmatch(r"[01]\.\d{4} runs/digits-2\n", capsys.readouterr().out)


def test_damaged_images_are_named_and_skipped_or_fatal(capsys):
    pictures(Path("data"))
    Path("data/dark/3.png").write_bytes(b"<html>")
    assert main(["train", "data", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "damaged   1 image left out:" in out
    assert "data/dark/3.png" not in out, "names are relative to the folder"
    assert "dark/3.png: not an image but HTML" in out
    assert main(["train", "data", *QUICK, "--unreadable", "stop"]) == 3
    assert "dark/3.png" in capsys.readouterr().err


def test_a_run_is_refused_continued_repeated_and_replaced(capsys):
    assert main(["train", *QUICK, "--out", "run", "--seed", "3", "--quiet"]) == 0
    assert main(["train", *QUICK, "--out", "run"]) == 2
    assert "continue it with --resume, replace it with --overwrite" in capsys.readouterr().err
    # what is not given comes from the run; what is given and decides the result is refused
    assert main(["train", "--out", "run", "--resume", "--epochs", "2", "--quiet"]) == 0
    assert main(["train", "--out", "run", "--resume", "--seed", "0"]) == 2
    assert "cannot change seed from 3 to 0" in capsys.readouterr().err
    assert main(["train", "--config", "run", "--out", "again", "--epochs", "1", "--quiet"]) == 0
    stored = json.loads(Path("again/config.json").read_text())["recipe"]
    assert (stored["seed"], stored["width"], stored["epochs"]) == (3, 4, 1)
    assert main(["train", "--config", "run/config.json", "--out", "again", "--overwrite", "--quiet"]) == 0
    weights = [read_tensors(Path(name, "last.safetensors"))[0] for name in ("run", "again")]
    assert weights[0].keys() == weights[1].keys()


def filled(monkeypatch, **stored) -> Callable[..., Recipe]:
    """What `skipway train --config`, or `--resume`, makes of some options beside a run of a recipe."""
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"recipe": ResolvedRecipe.of(Recipe(**stored)).to_json()}))
    recipes = []

    def train_network(recipe, *given, **options):
        recipes.append(recipe)
        raise SkipwayError("far enough")

    monkeypatch.setattr("skipway.training.loop.train", train_network)

    def fill(*options: str) -> Recipe:
        assert main(["train", *options]) == 2
        return recipes[-1]

    return fill


def test_what_was_chosen_for_an_option_does_not_outlive_it(monkeypatch):
    """A run stores what it chose by its schedule, its optimizer and its length, with what it was given."""
    fill = filled(monkeypatch, schedule="onecycle", seed=3, lr=0.1, weight_decay=5e-4, steps=40)
    same = fill("--config", "run")
    assert (same.schedule, same.warmup, same.steps, same.epochs, same.seed) == ("onecycle", 0.0, 40, None, 3)
    other = fill("--config", "run", "--schedule", "cosine", "--optimizer", "adamw", "--time", "1m")
    assert (other.schedule, other.warmup, other.steps, other.epochs, other.seed) == ("cosine", None, None, None, 3)
    assert (other.lr, other.weight_decay) == (None, None)
    assert fill("--config", "run", "--schedule", "cosine", "--warmup", "0.2").warmup == 0.2
    assert fill("--config", "run", "--epochs", "7").steps is None


DERIVED = {
    "size": 32, "channels": 3, "crop": "pad", "flip": True, "crop_share": 1.0, "resample": "bicubic", "grow_from": 16,
    "grey16": "range", "fit": "crop", "mean": "0.5", "std": "0.25", "model": "resnet8", "start": "random", "seed": 3,
    "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "layer_decay": 1.0, "freeze": "none",
}  # fmt: skip
WEIGHTS_STATE = {"mean", "std", "resample", "crop_share"}


@pytest.mark.parametrize(
    ("options", "chosen_anew"),
    [
        (["--start", "pretrained"], {*WEIGHTS_STATE, "grey16", "fit", "lr", "layer_decay", "freeze"}),
        (["--model", "timm:convnext_atto"], WEIGHTS_STATE),
        (["--batch-size", "512"], {"lr"}),
        (["--size", "224"], {"crop", "crop_share", "grow_from"}),
        (["--fit", "pad"], {"mean", "std", "crop_share"}),
        (["other"], {"mean", "std", "channels", "flip"}),
        (["--seed", "4"], set()),
    ],
)
def test_what_a_run_derived_follows_what_it_was_derived_from(monkeypatch, capsys, options, chosen_anew):
    """The rest stays, whoever resumes the run keeps all, and an option that is given again is kept, too."""
    fill = filled(monkeypatch, **DERIVED)
    pictures(Path("other"))
    recipe = fill("--config", "run", *options)
    open_fields = {name for name in DERIVED if getattr(recipe, name) in (None, "auto")}
    assert open_fields == chosen_anew
    out = " ".join(capsys.readouterr().out.split())
    assert ("not taken from run, since they were chosen beside other options than" in out) == bool(open_fields)
    assert ("--lr 0.1" in out) == ("lr" in open_fields)
    assert fill("--config", "run", *options, "--mean", "0.4").mean == "0.4"


@pytest.mark.parametrize(
    "options",
    [
        ["photos/"],
        ["--batch-size", "128"],
        ["--start", "random"],
        ["--model", "resnet8"],
        ["--size", "32"],
        ["--optimizer", "sgd", "--lr", "0.10"],
    ],
)
def test_an_option_that_repeats_the_value_of_a_run_changes_nothing(monkeypatch, capsys, options):
    pictures(Path("photos"))
    stored = {**DERIVED, "data": Path("photos").resolve()}
    recipe = filled(monkeypatch, **stored)("--config", "run", *options, "--seed", "4")
    assert ResolvedRecipe.of(Recipe(**stored)).changes(recipe).keys() - {"data"} == {"seed"}
    assert "not taken from" not in capsys.readouterr().out


def test_what_is_dropped_is_named_to_the_digit_and_by_kind(monkeypatch, capsys):
    stored = {"mean": "0.4913996898", "std": "0.25", "weights_names": "timm", "weights_entry": "ema"}
    fill = filled(monkeypatch, **stored, start="a.pth")
    recipe = fill("--config", "run", "--start", "b.pth")
    assert (recipe.weights_names, recipe.weights_entry) == ("skipway", None)
    out = " ".join(capsys.readouterr().out.split())
    assert "--mean 0.4913996898 --std 0.25 --weights-names timm --weights-entry ema" in out
    shutil.rmtree("run")
    fill = filled(monkeypatch, model="gpt-micro", tokenizer="chars", start="a")
    assert fill("--config", "run", "--start", "b").tokenizer is None
    out = " ".join(capsys.readouterr().out.split())
    assert "than these: --tokenizer chars" in out
    assert not any(option in out for option in ("--fit", "--grey16"))


@pytest.mark.parametrize(
    "options", [["--size", "32"], ["--batch-size", "128"], ["--start", "random"], ["--model", "resnet8"]]
)
def test_the_same_command_resumes_with_all_that_was_derived(monkeypatch, options):
    recipe = filled(monkeypatch, **DERIVED)("--out", "run", "--resume", *options)
    config = json.loads(Path("run/config.json").read_text())
    assert resume_recipe(config, Path("run/config.json"), recipe).to_json() == config["recipe"]


def test_the_rate_of_text_follows_the_network(monkeypatch):
    """It falls with the width; that of images does not depend on the network."""
    text = filled(monkeypatch, model="gpt-micro", tokenizer="bytes", lr=1e-3)
    assert text("--config", "run", "--model", "gpt-small").lr is None
    assert text("--config", "run", "--seed", "1").lr == 1e-3


def test_folds_count_their_time_from_the_start_of_the_command(monkeypatch):
    counted = []

    def cross_validate(*given, began, **options):
        counted.append(began)
        raise SkipwayError("far enough")

    monkeypatch.setattr("skipway.training.cross_validation.cross_validate", cross_validate)
    before = time.monotonic()
    assert main(["train", "--folds", "2", "--time", "1m", "--out", "cv"]) == 2
    assert counted == [BEGAN[0]]
    assert counted[0] >= before


@pytest.mark.parametrize(
    ("stored", "idle"), [({"time": "3s"}, "--epochs"), ({"time": "3s"}, "--steps"), ({"steps": 50}, "--epochs")]
)
def test_a_run_is_not_made_longer_by_what_does_not_set_its_length(monkeypatch, stored, idle):
    recipe = filled(monkeypatch, **stored)("--out", "run", "--resume", idle, "90")
    with pytest.raises(SkipwayError, match=f"{idle.strip('-')}=90: the length of this run follows from"):
        resume_recipe(json.loads(Path("run/config.json").read_text()), Path("run/config.json"), recipe)


def test_a_preset_supplies_what_the_command_omits(capsys):
    """And the run, which has its values, goes on by the identical command, whatever the preset says by then."""
    pytest.importorskip("pytorch_optimizer")
    values = PRESETS["fast"].values
    small = ["train", "--preset", "fast", "--width", "8", "--size", "16", "--batch-size", "600", "--device", "cpu"]
    command = [*small, "--seed", "1", "--out", "run", "--epochs", "1", "--resume", "--quiet"]
    assert main(command) == 0
    stored = json.loads(Path("run/config.json").read_text())["recipe"]
    given = {"width": 8, "size": 16, "batch_size": 600, "seed": 1, "epochs": 1, "grow_from": None}
    expected = {**values, **given}
    assert {name: stored[name] for name in expected} == expected
    assert main(command) == 0


def test_a_run_that_changed_hands_is_refused(capsys):
    assert main(["train", *QUICK, "--out", "run", "--quiet"]) == 0
    for path in Path("run/checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    assert main(["train", "--out", "run", "--resume", "--epochs", "2"]) == 4
    assert "none of 2 checkpoints can be used" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process there")
def test_an_interrupted_run_can_be_continued(capsys):
    """Other signals and their statuses are in tests/training/test_faults.py."""
    options = ["train", *QUICK, "--epochs", "900", "--out", "run"]
    process = subprocess.Popen(
        [*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    guard = threading.Timer(60, process.kill)
    guard.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:2] == ["epoch", "2/900"]:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    guard.cancel()
    assert process.returncode == 130, err
    assert "continue  skipway train --out run --resume" in out
    assert "Traceback" not in err
    position = Checkpoints(Path("run/checkpoints")).newest()[0].state["progress"]
    assert position["epoch"] >= 2
    epochs = str(position["epoch"] + 1)
    assert main(["train", "--out", "run", "--resume", "--epochs", epochs, "--quiet"]) == 0


def test_a_second_interruption_ends_at_once(capsys):
    # a process that was started in the background may have come with SIGINT ignored
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignal() as stopping:
        handle = signal.getsignal(signal.SIGINT)
        assert callable(handle)
        with pytest.raises(KeyboardInterrupt):  # called, and not raised: a worker of pytest's may be interrupted, too
            handle(signal.SIGINT, None)
        assert not stopping.requested()
        signal.raise_signal(signal.SIGINT)
        assert stopping.requested()
        assert stopping.exit_status == 130
        with pytest.raises(KeyboardInterrupt):
            handle(signal.SIGINT, None)
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler


def test_the_live_screen_keeps_one_line_per_epoch(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    with LiveReporter(Console(file=file, force_terminal=True, width=80, color_system="standard")) as reporter:
        reporter.message("data", "word " * 20)
        reporter.step(REPORT)
        reporter.epoch(ROW, 30)
    text = file.getvalue()
    assert "step 4/5  loss 0.500  75.0 %  1,234 img/s  1 min 05 s left" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "epoch  2/30  train loss 0.500  90.0 %  val loss   nan  80.0 %  1,234 img/s  1 min 05 s" in plain
    assert max(len(line) for line in plain.splitlines() if "word" in line) <= 80
    assert "\x1b[1;36m" in text


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    with LiveReporter(Console(file=file, force_terminal=True, width=100)) as reporter:
        reporter.message("data", "text")
        reporter.step(REPORT)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", file.getvalue())


def test_a_file_gets_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = io.StringIO()
    reporter = LineReporter(Console(file=file, width=20))
    for second in range(100):
        now[0] = float(second)
        reporter.step(REPORT)
        reporter.activity("reading", second, 100)
    assert file.getvalue().count("epoch 2/3  step 4/5") == 3
    assert all(len(line) > 20 for line in file.getvalue().splitlines()), "no line is folded"


def test_a_file_is_not_silent_while_nothing_is_reported(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = io.StringIO()
    reporter = LineReporter(Console(file=file, width=200))
    reporter.activity("listing")
    for second in range(100):
        now[0] = float(second)
        reporter.beat()
    assert file.getvalue().splitlines() == [
        "listing   for 31.0 s",
        "listing   for 1 min 02 s",
        "listing   for 1 min 33 s",
    ]


def test_a_terminal_counts_the_seconds_while_a_network_sleeps(monkeypatch, tmp_path):
    """A forward pass of 0.3 s, where seconds are shown after 0.05 s: the thread writes while the step goes on."""
    monkeypatch.setattr("skipway.cli.progress.SECONDS_BETWEEN_BEATS", 0.02)
    monkeypatch.setattr("skipway.cli.progress.SILENCE", 0.05)
    monkeypatch.setattr("skipway.training.step.clip_gradients", sleep_once(0.3, step.clip_gradients))
    file = io.StringIO()
    recipe = Recipe(model="resnet20", depth=8, width=4, epochs=1, batch_size=512, health=0.0)
    with LiveReporter(Console(file=file, force_terminal=True, width=100)) as reporter:
        train(recipe, tmp_path / "run", reporter=reporter)
    assert re.search(r"first step .*for 0\.[1-3] s", file.getvalue())


def sleep_once(seconds, function):
    """The function, which sleeps at its first call."""
    calls = []

    def slow(*args):
        if not calls:
            time.sleep(seconds)
        calls.append(args)
        return function(*args)

    return slow


def test_models_and_schemes_are_listed(capsys):
    assert main(["models"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["model", "family", "parameters", "description"]
    assert ["resnet50", "resnet", "25,557,032"] in [row[:3] for row in rows]
    assert main(["models", "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [tuple(each.values()) for each in objects] == [tuple(row) for row in rows[1:]]
    assert main(["schemes"]) == 0
    assert "fixup\t" in capsys.readouterr().out
    assert main(["schemes", "--json"]) == 0
    assert "fixup" in [json.loads(line)["scheme"] for line in capsys.readouterr().out.splitlines()]
    assert main(["schemes", "fixup"]) == 0
    assert capsys.readouterr().out.startswith("# Fixup\n")
    assert main(["schemes", "fixupp"]) == 2
    assert "did you mean 'fixup'" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("head") is None, reason="needs head")
def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m skipway.cli models | head -n 1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("model\t")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["trian"], 2)])
def test_a_rank_of_torchrun_ends_with_its_status(arguments, status):
    """It ends without taking the interpreter down; what was registered for the exit is called, output is written."""
    code = "import atexit, sys; atexit.register(print, 'called'); from skipway.__main__ import end, main; end(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "TORCHELASTIC_RUN_ID": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert done.stdout.endswith("called\n")
    assert bool(done.stderr) == bool(status)


@pytest.mark.parametrize(("budget", "doubled"), [(604_800.0, 1_209_600), (0.2, 1), (90.0, 180)])
def test_the_command_for_a_longer_run_can_be_run(budget, doubled):
    recipe = SimpleNamespace(budget=budget, freeze_plan=SimpleNamespace(takes_steps=True))
    _, command = continuation(SimpleNamespace(recipe=recipe, epoch=1), "run")
    assert parse_duration(command.rpartition(" ")[2]) == doubled
