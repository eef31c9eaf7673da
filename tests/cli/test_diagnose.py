"""`skipway diagnose` as people and scripts meet it: where models come from, what is printed, how it ends."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import skipway as sw
from skipway.cli import main
from skipway.cli.diagnose import OptimizerName, Question, makes_mended_network, prepared
from skipway.cli.diagnosis_batch import DigitBatches, FolderBatches, TextBatches, class_names
from skipway.diagnosis.remedies import Damp, NormFirst
from skipway.diagnosis.settings import OPTIMIZERS
from skipway.errors import CheckpointError, SkipwayError
from skipway.report.files import ENDINGS
from skipway.weights import read_weights
from skipway.zoo import FIRST_LAYER, ModelRequest, input_shape_of, load_model

FILE = """
import torch
from torch import nn
import neighbour

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

def paired():
    return nn.Linear(5, 3), (torch.randn(9, 5), torch.randint(3, (9,)))

def easy():
    x = torch.randn(128, 12)
    return make(), (x, x[:, :4].argmax(1))

def dead():
    model = make()
    with torch.no_grad():
        model[3].weight.fill_(float("nan"))
    return model

def needs(depth):
    return nn.Linear(depth, depth)

def fails():
    return 1 / 0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x)

net = Net()
text = "no model"

def picky():
    return nn.Sequential(nn.Flatten(0), nn.Linear(12, 4))

def deep():
    layers = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(24))
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), *layers, nn.Linear(8, 4))

def one_class():
    return make(), (torch.randn(64, 12), torch.zeros(64, dtype=torch.long))

def post():
    layer = nn.TransformerEncoderLayer(12, 2, 8, 0.0)
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 12)), layer, nn.Flatten())
"""
QUICK = ["--samples", "8", "--device", "cpu", "--steps", "100"]
MINE = ["mine.py:make", "--input", "3,2,2", *QUICK]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("skipway.diagnosis.progress.PLAIN_INTERVAL", math.inf)  # machines differ in speed
    Path("mine.py").write_text(FILE)
    Path("neighbour.py").write_text("")
    Path("torn.py").write_text("def make(:\n")


def status_of(diagnosis: dict) -> int:
    """The exit status that a diagnosis, as JSON, has to lead to."""
    return {"trains": 0, "will not train": 1, "undecided": 4}[diagnosis["verdict"]]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["diagnose", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def status_named_in(text: str) -> int:
    """The exit status of the verdict that a table states."""
    words = {
        "The network trains (": 0,
        "The network will not train (": 1,
        "Whether the network trains is undecided (": 4,
    }
    return next(status for start, status in words.items() if start in text)


def test_help_loads_no_torch_and_fits():
    code = (
        "import sys; from skipway.cli import main; main(['diagnose', '--help']);"
        "print('LOADED', *{'torch', 'numpy', 'matplotlib', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, loaded = done.stdout.rpartition("LOADED")
    assert loaded.strip() == ""
    assert len(text.splitlines()) <= 55
    assert max(map(len, text.splitlines())) <= 80
    titles = [line for line in text.splitlines() if re.fullmatch(r"[A-Z]\w+", line)]
    assert titles[:5] == ["Arguments", "Model", "Batch", "Training", "Diagnosis"]


def test_the_table_goes_to_a_pipe_as_plain_text(capsys):
    status, out, err = run(capsys, *MINE, "--lr", "0.01")
    assert (status, err) == (status_named_in(out), "")
    assert "\x1b" not in out
    assert out.startswith(
        "batch     8 random normal samples of 3x2x2 with random labels; use --batch FOLDER for real ones\n"
    )
    assert "Sequential · no residual connection · 2 layers · sgd at 0.01" in out


def test_a_terminal_gets_colours(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["diagnose", *MINE]) in (0, 1, 4)
    assert "\x1b[1;3" in screen.getvalue()


def test_the_exit_status_tells_a_net_that_will_not_train(capsys):
    assert run(capsys, "mine.py:dead", "--input", "3,2,2", "--quiet", *QUICK) == (
        1,
        "The network will not train (odds 0 %).\n",
        "",
    )
    status, out, _ = run(capsys, "mine.py:easy", "--optimizer", "adamw", "--lr", "0.03", "--quiet", "--device", "cpu")
    assert status == 0
    assert re.fullmatch(r"The network trains \(odds .* %\)\.\n", out)


@pytest.mark.parametrize(
    ("model", "layers"), [("mine.py:make", 2), ("mine.py:paired", 1), ("mine.py:Net", 1), ("mine.py:net", 1)]
)
def test_what_makes_a_model_in_a_file(capsys, model, layers):
    before = list(sys.path)
    shape = ["--input", "3,2,2"] if model == "mine.py:make" else []
    status, out, err = run(capsys, model, *shape, "--json", *QUICK)
    content = json.loads(out)
    assert (status, err) == (status_of(content), "")
    assert len(content["measurement"]["layers"]) == layers
    assert sys.path == before


def test_names_of_ours_take_every_option(capsys):
    options = ["--depth", "8", "--scheme", "zeroinit", "--classes", "4", "--input", "1,8,8", "--optimizer", "adamw"]
    options += ["--lr", "0.001", "--weight-decay", "0.1", "--warmup", "5", "--steps", "50", "--eval-mode", "--thorough"]
    options += ["--schedule", "cosine", "--certainty", "0.9", "--allowance", "0.1"]
    status, out, err = run(capsys, "resnet", *options, *QUICK[:4], "--json")
    content = json.loads(out)
    assert (status, err) == (status_of(content), "")
    assert len(content["connections"]) == 3
    assert content["settings"] == "adamw at 0.001, warm-up over 5 steps, schedule cosine"
    assert content["batch"].startswith("8 random normal samples of 1x8x8")


ERRORS = [
    (["resnet21"], 2, "unknown model 'resnet21'; did you mean|--depth 21"),
    (["resnet20", "--scheme", "fixupp"], 2, "did you mean 'fixup'"),
    (["resnet20", "--optimizer", "sdg"], 2, 'Invalid value "sdg"'),
    (["resnet20", "--samples", "4"], 2, "--samples 4: the rule is samples >= 8"),
    (["resnet20", "--weight-decay", "-1"], 2, "--weight-decay -1.0: the rule is weight-decay >= 0"),
    (["resnet20", "--classes", "0"], 2, "--classes 0: the rule is classes >= 1"),
    (["resnet20", "--lr", "0"], 2, "--lr 0.0: the rule is lr > 0"),
    (["resnet20", "--input", "3,a"], 2, "--input 3,a: the rule is whole numbers"),
    (["resnet20", "--out", "x.txt"], 2, "--out x.txt: the rule is one of the endings .json"),
    (["resnet20", "--save-model", "x"], 2, "give --fix with it"),
    (["resnet20", "--fix", "--save-model", "nowhere/x"], 2, "--save-model nowhere/x: there is no folder nowhere"),
    (["resnet20", "--fix", "--save-model", "."], 2, "--save-model . is a folder"),
    (["resnet20", "--certainty", "0.4"], 2, "--certainty 0.4: the rule is 0.5 < certainty < 1"),
    (["resnet20", "--allowance", "2"], 2, "--allowance 2.0: the rule is a share of the training"),
    (["resnet20", "--schedule", "cosin", "--samples", "8", "--input", "3,8,8"], 2, "schedule"),
    (["resnet20", "resnet20"], 2, "resnet20 is given twice"),
    (["resnet20", "resnet8", "--fix"], 2, "--fix mends one model, and 2 are given"),
    (["resnet20", "--lint", "--fix"], 2, "--lint runs no pass, so it excludes --fix and --thorough"),
    (["resnet20", "--device", "gpu7"], 2, "device 'gpu7' cannot be used"),
    (["resnet20", "--batch", "nowhere"], 3, "nowhere does not exist"),
    (["mine.py:net", "--batch", "."], 2, "the model takes 6; set --input"),
    (["tim:resnet18"], 2, "unknown source of models 'tim'; did you mean 'timm'"),
    (["gone.py:make"], 2, "gone.py: no such file; a model of your own is given as FILE.py:NAME"),
    (["mne.py:make"], 2, r"mne.py: no such file; did you mean mine.py\?"),
    (["mine.py"], 2, "the file has mine.py:make, "),
    (["mine.py:mke"], 2, "mine.py: unknown name 'mke'; did you mean 'make'"),
    (["mine.py:needs"], 2, "needs arguments: depth; give a function without any"),
    (["mine.py:fails"], 2, "mine.py, line 26: ZeroDivisionError: division by zero"),
    (["mine.py:text"], 2, "mine.py:text gives a str; it has to give a torch.nn.Module"),
    (["mine.py:make", "--depth", "3"], 2, "mine.py:make takes no argument, and none of them is known to be the depth"),
    (["torn.py:make"], 2, "torn.py: SyntaxError"),
    (["mine.py:picky"], 2, "shapes cannot be multiplied.*set another one by --input"),
    ([], 2, "MODEL"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "message"), ERRORS, ids=lambda v: " ".join(v) if type(v) is list else ""
)
def test_errors_name_the_argument_and_the_way_out(capsys, arguments, status, message):
    got, out, err = run(capsys, *arguments, *([] if "--samples" in arguments or not arguments else QUICK[:2]))
    assert got == status
    assert re.search(message, err, re.DOTALL), err
    assert err.startswith("skipway: ")
    assert "Traceback" not in err
    assert out == ""


def test_reports_are_written_by_their_endings(capsys):
    pytest.importorskip("matplotlib")
    outs = [argument for ending in ENDINGS for argument in ("--out", f"reports/seen{ending}")]
    status, out, _ = run(capsys, *MINE, *outs)
    assert status == status_of(json.loads(Path("reports/seen.json").read_text()))
    assert out.count("report    reports/seen") == len(ENDINGS)
    assert Path("reports/seen.html").read_text().startswith("<!DOCTYPE html>")
    assert all(Path(f"reports/seen{ending}").stat().st_size > 500 for ending in ENDINGS)


def test_a_picture_that_needs_matplotlib_is_refused_before_the_diagnosis(capsys, monkeypatch):
    monkeypatch.setattr("skipway.cli.diagnose.find_spec", lambda name: None)
    with monkeypatch.context() as patched:
        patched.setattr("skipway.cli.diagnose.diagnose_text", lambda *given: pytest.fail("it was diagnosed"))
        for ending in (".png", ".pdf"):
            status, out, err = run(capsys, *MINE, "--out", f"seen{ending}")
            assert (status, out) == (2, "")
            assert f"--out seen{ending} needs matplotlib, which is not installed: pip install 'skipway[plot]'" in err
    assert run(capsys, *MINE, "--out", "seen.svg")[2] == ""


DEEP = ["mine.py:deep", "--input", "3,2,2", "--samples", "32", "--device", "cpu"]


def test_fix_shows_progress_and_before_and_after_and_saves_the_weights(capsys, monkeypatch):
    """24 layers without a skip do not train; with one around each layer, scaled by a learnable gain, they do. Progress
    is plain lines in a pipe for people.
    """
    monkeypatch.setattr("skipway.diagnosis.progress.PLAIN_INTERVAL", 0.0)
    status, out, err = run(capsys, *DEEP, "--fix", "--save-model", "mended.safetensors")
    assert status == 0
    assert "  → add a skip around each of 24 layers (2, 3, …, 25): x = x + layer(x) / √24\n" in out
    assert re.search(r"^ +before +after$", out, re.MULTILINE)
    assert re.search(r"^verdict +will not train +trains$", out, re.MULTILINE)
    assert sum(name.endswith(".gain") for name in read_weights("mended.safetensors")) == 24
    assert "\nweights   mended.safetensors\nnote      more than weights was changed: the file, loaded into the" in out
    lines = err.splitlines()
    assert re.match(r"diagnosing: \d+ % after \d+ s, about \d+ s more$", lines[0])
    stages = [line.partition(":")[0] for line in lines]
    assert stages == list(dict.fromkeys(stages)), "one line for each stage of less than 30 s"
    assert {"diagnosing", "remedy 1 of at most 6", "diagnosing the mended network"} <= set(stages)


def test_fix_tells_programs_the_same_without_progress(capsys, monkeypatch):
    monkeypatch.setattr("skipway.diagnosis.progress.PLAIN_INTERVAL", 0.0)
    status, text, err = run(capsys, *DEEP, "--fix", "--json", "--save-model", "mended.safetensors")
    content = json.loads(text)
    assert content["saved"] == "mended.safetensors"
    assert err.startswith("note      more than weights was changed")
    assert err.count("\n") == 1
    assert (status, content["applied"]) == (
        0,
        ["add a skip around each of 24 layers (2, 3, …, 25): x = x + layer(x) / √24"],
    )
    assert [content[when]["verdict"] for when in ("before", "after")] == ["will not train", "trains"]


def test_fix_says_where_nothing_was_mended_and_saves_nothing(capsys):
    """One answer is right for all samples, for which there is no remedy; and a network that trains needs none."""
    train = ["--optimizer", "adamw", "--lr", "0.03", "--device", "cpu", "--fix", "--save-model", "mended.safetensors"]
    status, out, err = run(capsys, "mine.py:one_class", *train)
    assert status in (1, 4)
    assert err == ""
    assert "nothing was applied: no remedy is tried where a falling loss is no learning; the findings above" in out
    assert "nothing to fix" not in out
    assert out.endswith("weights   not saved: nothing was mended\n")
    status, out, _ = run(capsys, "mine.py:easy", *train)
    assert status == 0
    assert out.endswith("\nnothing to fix\nweights   not saved: nothing was mended\n")
    assert not Path("mended.safetensors").exists()


@pytest.mark.parametrize("how", ["--json", "--quiet"])
def test_programs_are_told_that_an_older_file_is_not_of_this_diagnosis(capsys, how):
    Path("mended.safetensors").write_text("of yesterday")
    train = ["--optimizer", "adamw", "--lr", "0.03", "--device", "cpu", "--fix", "--save-model", "mended.safetensors"]
    status, out, err = run(capsys, "mine.py:easy", *train, how)
    assert status == 0
    assert err == "note      not saved: nothing was mended; mended.safetensors was there before\n"
    assert how == "--quiet" or json.loads(out)["saved"] is None
    assert Path("mended.safetensors").read_text() == "of yesterday"


def test_mended_weights_that_cannot_be_written_are_no_undecided_verdict(capsys, monkeypatch):
    def full(path, tensors, metadata):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("skipway.checkpoint.files.write_tensors", full)
    status, out, err = run(capsys, *DEEP, "--fix", "--json", "--save-model", "mended.safetensors")
    assert (status, json.loads(out)["saved"]) == (2, None)
    assert "the disk is full" in err


def test_weights_alone_make_the_mended_network_or_do_not():
    mine, x = load_model("mine.py:post", ModelRequest()).model, torch.randn(16, 3, 2, 2)
    diagnosis = sw.diagnose(mine, x, lr=0.01, remedies=0)
    assert makes_mended_network(diagnosis.fix(Damp()))
    assert not makes_mended_network(diagnosis.fix(NormFirst())), "the switch is in no state dict"


def test_progress_is_for_people_and_names_one_of_several(capsys, monkeypatch):
    monkeypatch.setattr("skipway.diagnosis.progress.PLAIN_INTERVAL", 0.0)
    assert run(capsys, *MINE, "--json")[2] == run(capsys, *MINE, "--quiet")[2] == ""
    several = run(capsys, "mine.py:make", "mine.py:dead", "--input", "3,2,2", *QUICK)[2].splitlines()
    assert [line.partition(": ")[0] for line in several][:1] == ["mine.py:make"]


def pictures(root: Path, each: int = 5) -> None:
    noise = np.random.default_rng(0)
    for name in ("dark", "light", "loud"):
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{number}.png")


def test_a_folder_of_images_is_the_batch_and_counts_the_classes(capsys):
    pictures(Path("photos"))
    options = ["--depth", "8", "--input", "3,8,8", "--batch", "photos", "--samples", "10", "--device", "cpu"]
    status, out, err = run(capsys, "resnet", *options, "--out", "seen.json")
    content = json.loads(Path("seen.json").read_text())
    assert (status, err) == (status_of(content), "")
    assert out.startswith("batch     10 images of photos with their labels\n")
    assert 0.5 < content["measurement"]["loss"] < 6
    narrow = ["mine.py:paired", "--input", "3,8,8", "--batch", "photos", *QUICK]
    assert run(capsys, *narrow)[0] == 2


def test_a_network_of_tokens_has_no_classes(capsys):
    code, _, error = run(capsys, "gpt-nano", "--batch", "digits")
    assert code == 2
    assert "the network takes tokens and has no classes; --batch is a text file" in error


def test_the_bundled_digits_are_a_batch_unless_a_folder_has_that_name(capsys):
    options = ["resnet", "--depth", "8", "--batch", "digits", "--samples", "10", "--device", "cpu"]
    _, out, _ = run(capsys, *options, "--input", "3,9,9")
    assert out.startswith("batch     10 images of the bundled digits with their labels, fresh ones of 1,797 at every")
    loaded = load_model("resnet", ModelRequest(depth=8, shape=(3, 9, 9), classes=10))
    images = DigitBatches(loaded, Path("digits"), 10, 0)
    x, labels = images.batch(0, 0)
    again, others = images.batch(0, 1)
    assert x.shape == again.shape == (10, 3, 9, 9)
    assert torch.equal(x[:, 0] * images.std[0], x[:, 2] * images.std[2])  # grey
    assert labels.tolist() == [int(each.file[0]) for each in images.drawn(0, 0)] != others.tolist()
    pictures(Path("digits"))
    assert run(capsys, *options, "--input", "3,9,9")[1].startswith("batch     10 images of digits with their labels")


def test_every_trial_step_takes_a_fresh_batch_of_the_folder():
    pictures(Path("photos"))
    loaded = load_model("resnet", ModelRequest(depth=8, shape=(3, 8, 8), classes=3))
    batches = FolderBatches(loaded, Path("photos"), samples=4, seed=0)
    turn = [images for images, _ in itertools.islice(batches, 2 * batches.count)]
    assert batches.count == len(batches.files) // 4 > 1
    assert all(images.shape == (4, 3, 8, 8) for images in turn)
    first = torch.cat(turn[: batches.count]).flatten(1)
    assert len(first.unique(dim=0)) == len(first), "every image once a pass"
    assert not torch.equal(turn[0], turn[batches.count]), "in another order in the next"
    again = next(iter(FolderBatches(loaded, Path("photos"), samples=4, seed=0)))
    assert torch.equal(again[0], turn[0])
    assert abs(float(turn[0].mean())) < 1e-3
    assert "fresh ones of" in batches.remark


def test_several_models_are_compared_and_one_that_fails_is_a_row(capsys):
    names = ["mine.py:easy", "mine.py:dead", "mine.py:picky"]
    learns = ["--input", "3,2,2", "--optimizer", "adamw", "--lr", "0.03", "--samples", "8", "--device", "cpu"]
    status, out, err = run(capsys, *names, *learns)
    assert (status, err) == (0, "")
    assert "Train mine.py:easy.\n" in out
    rows = [line.split("  ")[0] for line in out.splitlines() if line.startswith("mine.py")]
    assert rows == names
    assert "✗ mine.py:picky: " in out
    assert "batch     mine.py:easy: given by the model's file; mine.py:dead: 8 random" in out
    status, out, _ = run(capsys, "mine.py:dead", "mine.py:picky", "--input", "3,2,2", "--quiet", *QUICK)
    assert (status, out) == (1, "None of them trains as planned.\n")
    status, out, _ = run(capsys, *names[1:], "--input", "3,2,2", "--json", "--out", "seen.html", *QUICK)
    assert [each["name"] for each in json.loads(out)["models"]] == names[1:]
    assert "mine.py:dead or mine.py:picky" in Path("seen.html").read_text()


@pytest.mark.parametrize("data", ["photos", "book.txt"])
def test_a_run_is_asked_about_by_its_own_recipe(capsys, data):
    pictures(Path("photos"), each=16)
    Path("book.txt").write_text("To be, or not to be, that is the question. " * 200)
    options = ["--epochs", "1", "--batch-size", "8", "--seed", "3", "--device", "cpu", "--quiet"]
    options += (
        ["--model", "resnet8", "--size", "8", "--workers", "0"]
        if data == "photos"
        else ["--model", "gpt-nano", "--depth", "1", "--width", "12", "--context", "8"]
    )
    assert main(["train", data, *options, "--out", "run"]) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    status, out, err = run(capsys, "run", "--json", "--device", "cpu")
    content = json.loads(out)
    assert (status, err) == (status_of(content), "")
    assert content["batch"] == "training batches of run"
    assert any("each on another batch of the loader" in remark for remark in content["remarks"])
    recipe = json.loads(Path("run/config.json").read_text())["recipe"]
    assert f"schedule {recipe['schedule']}" in content["settings"]
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    status, _, err = run(capsys, "run", "--lr", "0.1", "--samples", "16")
    assert status == 2
    assert "run is a run, which is asked about by its own recipe; leave --samples, --lr out" in err


def test_remedies_are_tried_on_a_run(capsys):
    pictures(Path("photos"), each=16)
    options = ["--epochs", "20", "--batch-size", "8", "--lr", "30", "--device", "cpu", "--quiet", "--size", "8"]
    config = ["train", "photos", *options, "--model", "resnet8", "--workers", "0", "--out", "run"]
    assert main([*config, "--time", "1s"]) in (0, 5)
    capsys.readouterr()
    _, out, _ = run(capsys, "run", "--fix", "--json", "--device", "cpu")
    assert re.match("set the learning rate to", json.loads(out)["applied"][0])


def test_a_damaged_run_is_no_undecided_verdict(capsys):
    Path("run").mkdir()
    Path("run/config.json").write_text('{"recipe": 3}')
    assert run(capsys, "run")[0] == 2


def test_a_text_is_the_batch_of_a_language_model(capsys):
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def make(vocabulary=256): return nn.Sequential(nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary))\n"
        "def narrow(): return make(255)\n"
    )
    Path("book.txt").write_text("To be, or not to be, that is the question. " * 100)
    options = ["--batch", "book.txt", "--optimizer", "adamw", "--lr", "0.03", *QUICK]
    status, out, _ = run(capsys, "mine.py:make", *options)
    assert status == status_named_in(out)
    assert out.startswith("batch     8 windows of 64 bytes of book.txt, fresh ones at every trial step\n")
    assert "cross-entropy of each next token" in out
    assert "chance: the best constant answer has a loss of 2." in " ".join(out.split())
    status, _, err = run(capsys, "mine.py:narrow", *options)
    assert status == 2
    assert "the rule is a vocabulary of at least 256, for bytes, and the model has 255" in err
    assert "with no labels; use --batch FILE" in run(capsys, "mine.py:make", "--optimizer", "adamw", *QUICK)[1]


def test_lint_prints_findings_and_fails_on_fatal_ones(capsys, monkeypatch):
    lint = pytest.importorskip("skipway.diagnosis.lint")
    from skipway.diagnosis import Finding

    found = [Finding(rule="P0", level="fatal", what="what", why="why", source="source")]
    monkeypatch.setattr(lint, "lint", lambda model, example: found)
    status, out, err = run(capsys, *MINE, "--lint")
    assert (status, err) == (1, "")
    assert out.startswith(
        "✗1 fatal · P0 · the network\n   what\n   why: why\n   source: source\nlint reads the network"
    )
    status, out, _ = run(capsys, *MINE, "--lint", "--json")
    assert (status, json.loads(out)[0]["rule"]) == (1, "P0")
    found.clear()
    assert run(capsys, *MINE, "--lint", "--quiet") == (0, "0 findings\n", "")
    status, out, _ = run(capsys, *MINE, "--lint")
    assert out.startswith(
        "0 findings\nlint reads the network and does not measure its signal; skipway diagnose mine.py:"
    )
    assert "--lint" not in out


def test_the_linter_itself_is_called(capsys):
    pytest.importorskip("skipway.diagnosis.lint")
    assert run(capsys, *MINE, "--lint", "--quiet") == (0, "0 findings\n", "")
    status, out, err = run(capsys, "resnet20", "--lint", *QUICK)
    assert (status, err) == (0, "")
    assert re.match(r"·1 note · P19 · stages\.\{0\.\.2\}\.\{0\.\.2\} \(9\)\n", out)


def test_the_optimizers_are_those_of_the_library():
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


def test_shapes_are_read_from_what_a_model_says_or_from_its_first_layer():
    assert input_shape_of(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))) == FIRST_LAYER[nn.Embedding](None)
    assert input_shape_of(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 4, 3))) == (2, 224, 224)
    assert input_shape_of(nn.ReLU()) == (3, 224, 224)
    assert load_model("resnet20", ModelRequest()).shape == (3, 32, 32)
    assert load_model("vit-tiny-16", ModelRequest(shape=(3, 32, 32), classes=2)).shape == (3, 32, 32)


def test_other_libraries_load(monkeypatch):
    if find_spec("timm") is None or find_spec("torchvision") is None:
        monkeypatch.undo()
        with pytest.raises(SkipwayError, match="--no-deps timm"):
            load_model("timm:resnet10t", ModelRequest())
        pytest.skip("timm is not installed")
    loaded = load_model("timm:resnet10t", ModelRequest(classes=3))
    assert loaded.shape == (3, 176, 176)
    assert loaded.model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert load_model("torchvision:squeezenet1_1", ModelRequest()).shape == (3, 224, 224)
    for text, near in (("timm:resnet10x", "resnet10t"), ("torchvision:resnet19", "resnet1")):
        with pytest.raises(SkipwayError, match=near):
            load_model(text, ModelRequest())
    with pytest.raises(SkipwayError, match="--scheme fixup: timm:NAME does not take it"):
        load_model("timm:resnet10t", ModelRequest(scheme="fixup"))


@pytest.mark.parametrize("text", ["timm:x", "torchvision:x", "hf:X"])
def test_a_library_that_is_missing_is_named_with_its_way_in(text, monkeypatch):
    monkeypatch.setattr("skipway.zoo.sources.find_spec", lambda name: None)
    with pytest.raises(SkipwayError, match=r"which is not installed: pip install (--no-deps |pyyaml |.skipway)"):
        load_model(text, ModelRequest())


def test_other_sources_of_images_are_batches(capsys):
    """Shards, lists and classes of one image: nothing is held back, since a diagnosis tests on nothing."""
    pictures(Path("photos"), each=1)
    with tarfile.open("train-0.tar", "w") as tar:
        tar.add("photos")
    Path("list.csv").write_text("what,kind,\n" + "".join(f"photos/{name}/0.png,{name},\n" for name in ("dark", "loud")))
    loaded = load_model("resnet", ModelRequest(depth=8, shape=(3, 8, 8), classes=3))
    shown = [FolderBatches(loaded, Path(source), samples=3, seed=0) for source in ("photos", "train-0.tar")]
    assert [len(batches.first) for batches in shown] == [3, 3]
    assert len(FolderBatches(loaded, Path("list.csv"), samples=2, seed=0, columns="what, kind").first) == 2
    assert class_names(Path("train-0.tar"), outside=False, columns=None) == ("dark", "light", "loud")
    question = Question(batch=Path("train-0.tar"), input="3,8,8", depth=8, device="cpu", samples=8)
    assert prepared("resnet", question)[0].model.config.classes == 3
    odd = FolderBatches(loaded, Path("photos"), samples=3, seed=0, columns="what,kind")
    assert odd.remark.endswith("; --columns what,kind has no effect: photos is no list")
    with pytest.raises(SkipwayError, match="--columns a has no effect without --batch"):
        Question(columns="a")


def test_the_column_of_text_is_an_option(monkeypatch):
    loaded = SimpleNamespace(vocabulary=256, shape=(16,))
    table = Path("tales.jsonl")
    table.write_text(json.dumps({"tale": "Once upon a time. " * 9, "note": "What a tale that was! " * 9}) + "\n")
    with pytest.raises(SkipwayError, match="name one, with columns='note'"):
        TextBatches(loaded, table, 8, 0)
    assert TextBatches(loaded, table, 8, 0, columns=" tale").data.origin["column"] == "tale"
