"""Training on text from a folder of transformers, and back to one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import skipway as sw
from benchmarks.peers import randomise_
from skipway.cli import main
from skipway.data.text.tokenizer import CharTokenizer
from skipway.errors import CheckpointError, SkipwayError
from skipway.inference.decoder_folder import write_transformers_folder
from skipway.recipe import Recipe
from skipway.training.loop import train

LETTERS = CharTokenizer("\n acdehmnost")
LLAMA = {"rms": True, "position": "rotary", "act": "silu", "gated": True, "bias": "none", "groups": 1}


def folder(path, **options):
    """A small decoder of transformers with two rows of its table to spare."""
    sizes = {"depth": 2, "dim": 16, "heads": 2, "vocab": LETTERS.size + 2, "context": 16}
    write_transformers_folder(randomise_(sw.build("gpt", **sizes, **options)), path, tokenizer=LETTERS)
    return path


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(" ".join(draw.choice(["the", "cat", "sat", "on", "mat", "and", "dan"], 600)) + "\n")
    return path


@pytest.fixture
def recipe(book):
    return Recipe(data=book, context=8, batch_size=8, steps=2, device="cpu", precision="float32", health=0.0)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_a_folder_gives_network_weights_and_tokenizer(tmp_path, recipe, options, capsys):
    """With a rate of nothing the weights stay: their shorter table of positions, and the rest as it was."""
    pytest.importorskip("tokenizers")
    start = folder(tmp_path / "start", **options)
    train(dataclasses.replace(recipe, start=start, lr=1e-30, weight_decay=0.0), tmp_path / "run")
    before, after = sw.from_pretrained(start), sw.from_pretrained(tmp_path / "run")
    assert after.config == dataclasses.replace(before.config, context=8, scheme=after.config.scheme)
    assert after.text.tokenizer.encode("the cat").tolist() == LETTERS.encode("the cat").tolist()
    ids = torch.from_numpy(LETTERS.encode("the cat"))[None]
    torch.testing.assert_close(after(ids), before(ids))
    assert main(["export", str(tmp_path / "run"), "--transformers", str(tmp_path / "out")]) == 0
    torch.testing.assert_close(sw.from_pretrained(tmp_path / "out")(ids), before(ids))
    assert main(["generate", str(start), "the ", "--length", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the ")


def test_what_does_not_go_together(tmp_path, recipe):
    pytest.importorskip("tokenizers")
    start = folder(tmp_path / "start")
    for choices, kind, said in (
        ({"tokenizer": "bytes"}, SkipwayError, r"256 tokens in the tokenizer; leave vocab out"),
        ({"model": "gpt-2(dim=16, heads=4, vocab=14, blocks=2)"}, CheckpointError, "heads=4 in the model, heads=2"),
        (
            {"tokenizer": "chars", "model": "gpt2(dim=16, heads=2, blocks=2, vocab=14)"},
            CheckpointError,
            "another tokenizer",
        ),
    ):
        with pytest.raises(kind, match=said):
            train(dataclasses.replace(recipe, start=start, **choices), tmp_path / "run")
    (start / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json: give the one"):
        train(dataclasses.replace(recipe, start=start), tmp_path / "run")
    described = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**described, "scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx=True"):
        train(dataclasses.replace(recipe, start=start, tokenizer="chars"), tmp_path / "run")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "student.pt", "weights", "shards"])
def test_weights_of_others_start_a_decoder_as_they_start_a_classifier(tmp_path, recipe, file):
    """In a folder without a config, or in a file of any name: they say nothing about a tokenizer."""
    start, model = tmp_path / "start", "gpt-nano(dim=16, heads=2, blocks=2, vocab=256, context=8)"
    start.mkdir()
    state = randomise_(sw.build("gpt", depth=2, dim=16, heads=2, vocab=256, context=8)).state_dict()
    names = {name: f"{number % 2}.bin" for number, name in enumerate(state)} if file == "shards" else {}
    for part in set(names.values()):
        torch.save({name: tensor for name, tensor in state.items() if names[name] == part}, start / part)
    if names:
        (start / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        torch.save(state, start / file)
    given = start / file if file == "weights" else start
    choices = {"model": model, "tokenizer": "bytes", "lr": 1e-30, "weight_decay": 0.0}
    train(dataclasses.replace(recipe, start=given, **choices), tmp_path / "run")
    after = sw.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.allclose(after[name], tensor) for name, tensor in state.items())
