"""Text on the same loop: exact resume, parts and processes, what is measured, chosen and refused."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.test_loop import StopAfter, assert_same
from torch import nn

import skipway as sw
from skipway.checkpoint.files import read_tensors
from skipway.data.source_kind import source_kind
from skipway.errors import CheckpointError, DataError, SkipwayError
from skipway.inference.text_run import evaluate_text_run, generate_text
from skipway.recipe import Recipe
from skipway.training import step
from skipway.training.cross_validation import cross_validate
from skipway.training.loop import train
from skipway.training.task_choice import choose_task
from skipway.training.text_task import LanguageModelling, TextBatch
from skipway.weights import hub

TINY = {"model": "gpt-nano", "depth": 1, "width": 12, "context": 8, "batch_size": 8, "device": "cpu"}
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "on", "the", "cat"]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(" ".join(draw.choice(WORDS, 600)) + "\n")
    return path


@pytest.fixture
def recipe(book):
    return Recipe(data=book, **TINY, steps=8, precision="float32", health=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9, "accumulate": 2, "scheme": "layerscale + stochasticdepth(0.3)", "save_every": 2},
        {"sampling": "random", "tokenizer": "chars", "precision": "bfloat16"},
        {"optimizer": "sgd", "schedule": "trapezoid", "steps": None, "epochs": 2, "batch_size": 64},
    ],
    ids=["ema", "random", "epochs"],
)
def test_a_stopped_run_ends_in_the_same_bits(tmp_path, recipe, options):
    recipe = dataclasses.replace(recipe, **options)
    unstopped = train(recipe, tmp_path / "unstopped")
    assert not train(recipe, tmp_path / "stopped", stop=StopAfter(2)).finished
    assert not train(None, tmp_path / "stopped", resume=True, stop=StopAfter(4)).finished
    assert_same(unstopped, train(None, tmp_path / "stopped", resume=True))


def test_parts_and_ranks_have_the_gradient_of_the_batch():
    """Rows are scored in part, so a mean of means over parts would be another gradient."""
    torch.manual_seed(0)
    model = sw.build("gpt-nano", depth=1, dim=12, vocab=16, context=8)
    ids, targets = torch.randint(16, (2, 8, 8)).unbind()
    for row in range(8):
        targets[row, :row] = -100
    nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for parts, world in ((1, 1), (4, 1), (2, 2)):
        gradients = []
        for rank in range(world):
            run: Any = SimpleNamespace(
                recipe=SimpleNamespace(seed=0),
                steps_per_epoch=1,
                progress=SimpleNamespace(accumulation=parts, before=0, step=0),
                ranks=SimpleNamespace(rank=rank, world=world),
                optimizer=torch.optim.SGD(model.parameters()),
                scaler=torch.amp.GradScaler("cpu", enabled=False),
                network=model,
                task=LanguageModelling(),
                autocast=nullcontext,
                kernels=nullcontext,
            )
            run.loss = partial(run.task.loss, run)
            mine, wanted = ids[rank::world], targets[rank::world]
            step.backward(run, TextBatch(mine, wanted, wanted, torch.arange(8), int((targets >= 0).sum())))  # type: ignore[arg-type]
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert torch.allclose(torch.stack(gradients).mean(0), expected, atol=1e-6)


def test_bits_per_byte_are_those_of_the_tokens_of_the_test_text(tmp_path, recipe, book):
    """By hand from the file: the last fifth of the bytes, in windows of the context, one after the other; the last one
    begins earlier, so that its tokens have as much context as others.
    """
    outcome = train(recipe, tmp_path / "run")
    model = sw.from_pretrained(tmp_path / "run")
    content = book.read_bytes()
    ids = torch.tensor(list(content[-math.ceil(len(content) / 5) :]))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 8):
            first = min(start, len(ids) - 9)
            part = ids[first : first + 9]
            losses = nn.functional.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="none")
            nats += float(losses[start - first :].sum())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test_bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(ids) - 1), rel=1e-4)
    assert evaluate_text_run(tmp_path / "run").evaluation.loss == pytest.approx(outcome.evaluation.loss, rel=1e-6)
    again = evaluate_text_run(tmp_path / "run", book).evaluation
    assert again.total == len(content) - 1


def test_the_weights_of_the_lowest_validation_loss_are_kept(tmp_path, recipe):
    outcome = train(dataclasses.replace(recipe, steps=40, lr=0.05, patience=3, holdout=0.0), tmp_path / "run")
    rows = outcome.folder.read_metrics()
    best = min(rows, key=lambda row: row["validation_loss"])
    assert outcome.best_epoch == best["epoch"]
    assert read_tensors(outcome.folder.best)[1]["epoch"] == best["epoch"]
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"] < math.log(256)
    assert outcome.evaluation.loss == pytest.approx(outcome.best_loss, rel=1e-6), "tested on the validation text"
    page = outcome.folder.report.read_text()
    assert "They were tested on the validation text" in page
    assert "looked at" not in page


def test_samples_of_a_run_are_what_its_network_writes(tmp_path, recipe):
    outcome = train(recipe, tmp_path / "run")
    row = outcome.folder.read_metrics()[-1]
    written = generate_text(outcome.folder.last, row["prompt"], 6, temperature=0.8, seed=0, device="cpu")
    assert row["sample"] == written
    page = outcome.folder.report.read_text()
    assert "What it writes" in page
    assert "bits per byte" in page


def test_a_longer_run_goes_on(tmp_path, recipe):
    train(recipe, tmp_path / "run")
    longer = train(dataclasses.replace(recipe, steps=12), tmp_path / "run", resume=True)
    assert longer.finished
    assert longer.folder.read_metrics()[-1]["step"] == 12
    assert "The test text was looked at 2 times, the last time at the end" in longer.folder.report.read_text()


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_ranks_of_a_sharded_network_stop_together(sharding):
    """Told so by another rank, this one stops after the same batch; unsharded, every rank stops by itself."""
    seen = []
    ranks = SimpleNamespace(any=lambda here: True, all_reduce=lambda values: values)
    model = nn.Embedding(4, 4)
    model.register_forward_hook(lambda *_: seen.append(1))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    run: Any = SimpleNamespace(
        model=model,
        recipe=SimpleNamespace(sharding=sharding),
        ranks=ranks,
        data=SimpleNamespace(test=SimpleNamespace(scored_bytes=1)),
        autocast=nullcontext,
        stop=lambda: False,
    )
    batches = [TextBatch(ids, ids, ids, torch.arange(1), 0)] * 2
    result = LanguageModelling().evaluate(run, "test", batches, rounds=0)
    assert (len(seen), result is None) == ((1, True) if sharding == "full" else (2, False))


def test_a_time_is_planned(tmp_path, recipe):
    outcome = train(dataclasses.replace(recipe, steps=None, time="1s"), tmp_path / "run")
    assert outcome.finished
    assert outcome.folder.read_metrics()[-1]["step"] > 1


def test_folds_and_published_weights_are_refused_before_anything_is_begun(tmp_path, recipe):
    with pytest.raises(SkipwayError, match="folds=3: the rule is images in classes"):
        cross_validate(recipe, tmp_path / "folds", folds=3)
    assert not (tmp_path / "folds").exists()
    with pytest.raises(SkipwayError, match="start='pretrained': no published weights go with gpt-nano"):
        train(dataclasses.replace(recipe, start="pretrained"), tmp_path / "run")


def test_changed_text_is_refused(tmp_path, recipe, book):
    copy = tmp_path / "book.txt"
    copy.write_bytes(book.read_bytes())
    train(dataclasses.replace(recipe, data=copy), tmp_path / "run", stop=StopAfter(3))
    copy.write_text(copy.read_text() + "more")
    with pytest.raises(DataError, match="the text, its splits or its tokenizer have changed"):
        train(None, tmp_path / "run", resume=True)


def test_weights_to_start_from_have_the_same_tokenizer(tmp_path, recipe, monkeypatch):
    first = train(dataclasses.replace(recipe, steps=2), tmp_path / "book.txt-1")
    tuned = train(dataclasses.replace(recipe, start=first.folder.best, steps=1, lr=1e-9), tmp_path / "tuned")
    before, after = (read_tensors(outcome.folder.best)[0] for outcome in (first, tuned))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    monkeypatch.setattr(hub, "download", lambda name, others=(): {"hf:me/net": first.folder.path}[name])
    # the name of the folder ends like that of a file
    for number, start in enumerate((first.folder.best, first.folder.path, "hf:me/net")):
        with pytest.raises(CheckpointError, match="trained with another tokenizer, bytes of 256 tokens"):
            train(dataclasses.replace(recipe, start=start, tokenizer="chars"), tmp_path / f"other {number}")


REFUSED = [
    ({"flip": True}, "flip=True: an option for images"),
    ({"augment": "mixup"}, "augment='mixup': an option for images"),
    ({"freeze": "first"}, "freeze='first': an option for images"),
    ({"model": "resnet20", "depth": None, "width": None}, "book.txt holds text, and model='resnet20' takes images"),
    ({"context": 100_000}, "a window needs 100001"),
    ({"data": None, "model": "resnet8", "depth": None}, "context=8: an option for text"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_has_no_meaning_is_refused(tmp_path, recipe, options, words):
    with pytest.raises(SkipwayError, match=words):
        train(dataclasses.replace(recipe, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_kind_of_a_source(tmp_path, book):
    from PIL import Image

    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "labels.txt").write_text("a.png 0\nb.png 1\n")
    (tmp_path / "README").write_text("Three images.")
    assert source_kind(tmp_path) == "image"
    assert source_kind(tmp_path / "labels.txt") == "image"
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("No image.")
    assert source_kind(tmp_path) == "mixed"
    with pytest.raises(DataError, match="model='gpt-micro' trains on its text"):
        choose_task(Recipe(data=tmp_path))
    assert source_kind(book) == source_kind(book.parent) == "text"
    assert choose_task(Recipe(data=book)).kind == choose_task(Recipe(model="gpt-nano")).kind == "text"
    assert choose_task(Recipe()).kind == "image"


def test_a_network_of_text_is_exported(tmp_path, recipe):
    pytest.importorskip("onnxruntime")
    from skipway.inference.publish import write_hub_folder, write_onnx

    train(dataclasses.replace(recipe, steps=1), tmp_path / "run", stop=StopAfter(9))
    with pytest.warns(UserWarning, match="for sequences of 8 tokens"):
        difference = write_onnx(tmp_path / "run", tmp_path / "model.onnx")
    assert difference < 1e-5
    with pytest.raises(SkipwayError, match="--transformers FOLDER"):
        write_hub_folder(tmp_path / "run", tmp_path / "hub")


def test_text_from_the_command_line(tmp_path, book, capsys):
    from skipway.cli import main

    words = ["--depth", "1", "--width", "12", "--context", "8", "--batch-size", "8", "--steps", "4", "--device", "cpu"]
    out = str(tmp_path / "run")
    assert main(["train", str(book), "--model", "gpt-nano", *words, "--precision", "float32", "--out", out]) == 0
    told = capsys.readouterr().out
    assert "bits/byte train" in told
    assert "tokens/s" in told
    bits = next(line for line in told.splitlines() if line.startswith("bits"))
    assert main(["evaluate", out, "--json"]) == 0
    assert f"{json.loads(capsys.readouterr().out)['bits_per_byte']:.4f} bits per byte" in bits
    assert main(["generate", out, "the cat", "--length", "3", "--seed", "0", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["text"]
    assert main(["generate", out, "the cat", "--length", "3", "--seed", "0"]) == 0
    assert capsys.readouterr().out == f"the cat{first}\n"
    assert main(["evaluate", out, "--flip"]) == 2
    assert "--flip: an option for images" in capsys.readouterr().err
    assert main(["predict", out, str(book)]) == 2
    assert "skipway generate RUN" in capsys.readouterr().err
