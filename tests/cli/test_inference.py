"""`skipway predict`, `evaluate` and `export` as people and scripts call them."""

from __future__ import annotations

import csv
import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import skipway as sw
from skipway.cli import main
from skipway.data.pool import FEW_FILES
from skipway.data.text import ByteTokenizer
from skipway.errors import DataError, spell
from skipway.inference.decoder_folder import write_transformers_folder
from skipway.inference.run_evaluation import evaluate_images
from skipway.inference.text_evaluation import TextEvaluation
from skipway.inference.text_run import BATCH
from skipway.recipe import Recipe
from skipway.training.loop import train
from skipway.training.run import Outcome
from skipway.weights import hub


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(("dark", "light \x1b[31m")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(6):
                pixels = noise.integers(0, 100, (8, 8, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    recipe = Recipe(data=root, depth=8, width=4, epochs=2, batch_size=8, device="cpu", precision="float32")
    return train(recipe, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(outcome) -> str:
    return str(outcome.folder.path)


@pytest.fixture
def test_images(outcome) -> Path:
    return outcome.recipe.data / "test"


def test_predict_writes_a_line_per_image(run, test_images, tmp_path, capsys):
    (tmp_path / "bad\n.png").write_text("<html>")
    assert main(["predict", run, str(test_images), str(tmp_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    file, first, second = lines[0].split("\t")
    assert file.endswith("0.png")
    shares = [float(cell.rpartition(" ")[2]) for cell in (first, second)]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert lines[-1] == f"{tmp_path}/bad\\n.png\tcannot be read: not an image but HTML"
    assert "\x1b" not in "".join(lines)


def test_predict_writes_json_and_csv(run, test_images, tmp_path, capsys):
    assert main(["predict", run, str(test_images), "--json", "--top", "1", "--batch-size", "5"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 12
    assert {row["label"] for row in rows} <= {"dark", "light \x1b[31m"}, "as they are: JSON has escapes"
    assert all(list(row["probabilities"]) == [row["label"]] for row in rows)
    assert main(["predict", run, str(test_images), "--csv", str(tmp_path / "out.csv"), "--top", "9"]) == 0
    assert capsys.readouterr().out == ""
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["probability"]) for row in table] == pytest.approx([r["probability"] for r in rows], abs=1e-5)
    assert list(table[0]) == ["file", "label", "probability", "label_2", "probability_2", "error"]


def test_predict_fails_as_documented(run, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("")
    assert main(["predict", run, str(tmp_path / "bad.png")]) == 3
    captured = capsys.readouterr()
    assert "none of 1 image can be read" in captured.err
    assert "an empty file" in captured.out
    assert main(["predict", run]) == 2
    assert main(["predict", run, str(tmp_path), "--json", "--csv", "x.csv"]) == 2
    assert main(["predict", run, str(tmp_path), "--top", "0"]) == 2
    assert main(["predict", str(tmp_path / "none"), str(tmp_path / "bad.png")]) == 4
    assert main(["predict", run, str(tmp_path / "none.png")]) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_evaluate_says_what_training_said(outcome, run, capsys):
    assert main(["evaluate", run, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == outcome.evaluation.accuracy
    assert found["confusion"] == outcome.evaluation.confusion.tolist()
    assert [row["images"] for row in found["classes"]] == [6, 6]
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert main(["evaluate", run, "--flip"]) == 0
    text = capsys.readouterr().out
    assert "95 % interval" in text
    assert "class\trecall\tprecision\tF1\timages" in text
    assert "\x1b" not in text


def test_what_is_not_finite_is_null_in_json(run, capsys, monkeypatch):
    """Of a text without bytes, and of weights that overflow; other readers of JSON know no NaN."""
    evaluation = TextEvaluation(loss=math.nan, total=0, correct=0, bytes=0)
    found = SimpleNamespace(name="book", evaluation=evaluation, remarks=("read as the run's",))
    monkeypatch.setattr("skipway.inference.predict.find_text_inputs", lambda path: object())
    monkeypatch.setattr("skipway.inference.text_run.evaluate_text_run", lambda *given, **options: found)
    assert main(["evaluate", run, "--json"]) == 0

    def refuse(constant):
        raise AssertionError(constant)

    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (shown["loss"], shown["bits_per_byte"], shown["accuracy"]) == (None, None, 0)
    assert shown["remarks"] == ["read as the run's"]


def test_evaluate_takes_other_images(outcome, run, test_images, tmp_path, capsys):
    assert main(["evaluate", run, str(test_images), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confusion"] == outcome.evaluation.confusion.tolist()
    for name in ("dark", "other"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    assert main(["evaluate", run, str(tmp_path)]) == 3
    assert "class 'other'" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 4
    assert main(["evaluate", run, "--batch-size", "0"]) == 2


def test_images_that_were_trained_on_are_said(run, test_images, tmp_path, capsys):
    trained = test_images.parent / "train"
    assert main(["evaluate", run, str(trained), "--json"]) == 0
    (remark,) = json.loads(capsys.readouterr().out)["remarks"]
    learned = int(remark.split()[0])
    assert remark.startswith(f"{learned} of them were trained on and {12 - learned} of them were used to choose the w")
    shutil.copytree(trained, tmp_path / "train")  # copies cannot be told from new images
    for other in (tmp_path, test_images):
        assert main(["evaluate", run, str(other), "--json"]) == 0
        assert "trained on" not in capsys.readouterr().out


def test_evaluate_takes_a_list_with_columns_of_other_names(outcome, run, test_images, capsys):
    source = test_images.parent / "odd.csv"
    rows = [(f"test/{part.name}/{n}.png", part.name, "dark") for part in test_images.iterdir() for n in range(6)]
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("photo", "kind", "breed"), *rows])
    assert main(["evaluate", run, str(source), "--columns", "photo, kind", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confusion"] == outcome.evaluation.confusion.tolist()
    assert main(["evaluate", run, str(source), "--columns", "photo,breed", "--json"]) == 0
    dark = json.loads(capsys.readouterr().out)["classes"][0]
    assert (dark["name"], dark["images"]) == ("dark", 12)
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("photo", "kind", "set"), *((*row[:2], "test") for row in rows)])
    assert main(["evaluate", run, str(source), "--columns", "photo,kind,set", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    assert main(["evaluate", run, str(source), "--columns", "photo,kind,part"]) == 0
    assert "there is no column 'part'" in capsys.readouterr().out
    assert main(["evaluate", run, str(source), "--columns", "photo,kind,set,more"]) == 3
    assert "--columns photo,kind,set,more: the rule is two or three names" in capsys.readouterr().err
    assert main(["evaluate", run, str(test_images), "--columns", "photo,kind"]) == 0
    assert "--columns photo,kind has no effect: test is no list" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--columns", "photo,kind"], ["--outside"], ["--max-megapixels", "9"]])
def test_evaluate_refuses_options_of_other_images_without_them(run, option, capsys):
    assert main(["evaluate", run, *option]) == 2
    assert f"{option[0]} has no effect without DATA" in capsys.readouterr().err


def test_export_writes_a_hub_folder_that_predicts(run, test_images, tmp_path, capsys):
    assert main(["export", run, "--hub", str(tmp_path / "hub")]) == 0
    assert "skipway.from_pretrained(" in capsys.readouterr().out
    assert main(["predict", str(tmp_path / "hub"), str(test_images), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
    assert main(["evaluate", str(tmp_path / "hub")]) == 4
    assert "pass images to evaluate on" in capsys.readouterr().err
    assert main(["export", run]) == 2
    assert main(["export", run, "--hub", run]) == 2
    for name in ("again", "again-v1.0", "again.v2"):  # the kind of a target without option by its suffix
        assert main(["export", run, str(tmp_path / name)]) == 0
        assert (tmp_path / name / "config.json").exists()
    capsys.readouterr()
    named = [[str(tmp_path / name)] for name in ("net.txt", "net.h5", "net.mp4", "net.7z")]
    for wrong in (*named, [str(tmp_path / "net.pt2"), "--pt2", "other.pt2"]):
        assert main(["export", run, *wrong]) == 2
        assert "the rule is FILE.onnx, FILE.pt2 or a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_help_is_there_and_light(command):
    code = (
        "import sys; from skipway.cli import main; main(sys.argv[1:]);"
        "print('LOADED', *({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True)
    text, _, loaded = done.stdout.rpartition("LOADED")
    assert loaded.strip() == ""
    assert f"skipway {command} RUN" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["book.txt", "--flip"], "--flip: an option for images"),
        (["book.txt", "--model", "a.py:b"], "--model: an option for networks of others"),
        (["book.txt", "--trust-code"], "--trust-code: an option for networks of others"),
        (["--columns", "story"], "--columns has no effect without DATA"),
        (["--outside"], "--outside has no effect without DATA"),
    ],
)
def test_evaluate_of_text_refuses_options_without_effect(words, said, capsys, monkeypatch):
    monkeypatch.setattr("skipway.inference.predict.find_text_inputs", lambda path: object())
    assert main(["evaluate", "run", *words]) == 2
    assert said in capsys.readouterr().err


def test_evaluate_of_text_reads_the_column_that_is_named(capsys, monkeypatch):
    def evaluate(run, data, **choices):
        raise DataError(f"{choices['column']} {choices['outside']}: {spell('column', 'tale')} names another")

    monkeypatch.setattr("skipway.inference.predict.find_text_inputs", lambda path: object())
    monkeypatch.setattr("skipway.inference.text_run.evaluate_text_run", evaluate)
    assert main(["evaluate", "run", "a.jsonl", "--columns", "story", "--outside"]) == 3
    assert "story True: --columns tale names another" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_evaluate_takes_a_folder_of_transformers(layout, tmp_path, monkeypatch, capsys):
    """Also by its name on the hub. A decoder whose logits are equal takes eight bits for a byte."""
    pytest.importorskip("tokenizers")
    model, folder, book = sw.build("gpt-nano", depth=1, dim=12, vocab=256, context=8), tmp_path / "net", tmp_path / "b"
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    write_transformers_folder(model, folder, tokenizer=ByteTokenizer())
    state = load_file(folder / "model.safetensors")
    if layout != "model.safetensors":
        (folder / "model.safetensors").unlink()
    if layout == "pytorch_model.bin":
        torch.save(state, folder / layout)
    elif layout == "model.safetensors.index.json":
        homes = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(state)}
        for home in set(homes.values()):
            save_file({name: tensor for name, tensor in state.items() if homes[name] == home}, folder / home)
        (folder / layout).write_text(json.dumps({"weight_map": homes}))
    book.write_text("Once upon a time there was a text. " * 9)
    monkeypatch.setattr(hub, "download", lambda name, others=(): {"hf:org/name": folder}[name])
    monkeypatch.setattr("skipway.inference.predict.find_text_inputs", lambda path: pytest.fail("all weights were read"))
    for run in (str(folder), "hf:org/name"):
        assert main(["evaluate", run, str(book), "--device", "cpu", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["bits_per_byte"] == pytest.approx(8, rel=1e-6)
        assert main(["evaluate", run, "--device", "cpu"]) == 4
        assert "so its test text is unknown; give a text" in capsys.readouterr().err
        assert main(["evaluate", run, str(book), "--flip"]) == 2
        assert "--flip: an option for images" in capsys.readouterr().err


def test_evaluate_takes_a_name_on_the_hub(outcome, run, test_images, monkeypatch, capsys):
    monkeypatch.setattr(hub, "download", lambda name, others=(): {"hf:me/net": Path(run)}[name])
    assert main(["evaluate", "hf:me/net", str(test_images), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confusion"] == outcome.evaluation.confusion.tolist()
    given = []

    def evaluate(path, data, **options):
        given.append(path)
        raise DataError("far enough")

    monkeypatch.setattr("skipway.inference.run_evaluation.evaluate_images", evaluate)
    assert main(["evaluate", "hf:me/net", str(test_images)]) == 3
    assert given == ["hf:me/net"]  # no path, whose slash is another one on Windows


def test_help_says_how_many_at_a_time(capsys):
    assert main(["evaluate", "--help"]) == 0
    images = inspect.signature(evaluate_images).parameters["batch_size"].default
    assert f"[as in training; {images} for DATA, {BATCH} for text]" in " ".join(capsys.readouterr().out.split())
    assert main(["train", "--help"]) == 0
    assert f"Threads that decode. [cores; 0 below {FEW_FILES:,} files]" in capsys.readouterr().out
