"""Folders of transformers: read as networks of the family gpt, and written so that transformers loads them."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import skipway as sw
from benchmarks.peers import import_transformers, randomise_
from skipway.cli import main
from skipway.data.text.tokenizer import ByteTokenizer, CharTokenizer
from skipway.data.text.tokenizer_file import read_tokenizer
from skipway.inference.decoder_folder import write_transformers_folder
from skipway.models.gpt import GPT

LLAMA = {"rms": True, "position": "rotary", "act": "silu", "gated": True, "bias": "none"}
NETWORKS = {
    "GPT2LMHeadModel": {},
    "GPT2LMHeadModel, no biases": {"bias": "none", "tied": False},
    "LlamaForCausalLM": {**LLAMA, "groups": 1, "rotary_scaling": "llama3(4, 1, 4, 8)"},
    "Qwen2ForCausalLM": {**LLAMA, "bias": "qkv"},
    "Qwen3ForCausalLM": {**LLAMA, "head_norm": True, "head_dim": 6, "bias": "qkv"},
}


@pytest.fixture(scope="module")
def transformers():
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'skipway[transformers]'")
    return import_transformers()


def network(**options) -> GPT:
    """A small decoder off its start."""
    return randomise_(sw.build("gpt", **{"depth": 3, "dim": 16, "heads": 4, "vocab": 29, "context": 32, **options}))


def operate(operation, *choices) -> GPT:
    """A network after an operation of surgery."""
    model = network().eval()
    operation(model, tokens(2, 8), *choices)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 29, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", NETWORKS)
def test_transformers_loads_what_is_written_and_so_do_we(transformers, tmp_path, case):
    model = network(**NETWORKS[case]).train()
    assert write_transformers_folder(model, tmp_path / "out") < 1e-5
    assert model.training
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens(2, 32)
    assert type(theirs).__name__ == case.partition(",")[0]
    back = sw.from_pretrained(tmp_path / "out")
    expected = model.eval()(ids)
    torch.testing.assert_close(back(ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    grown = theirs.generate(tokens(2, 3), max_new_tokens=9, do_sample=False)  # with no token that ends a text
    assert torch.equal(sw.generate(back, tokens(2, 3), 9, temperature=0), grown)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("scheme", ["layerscale", "rezero", "depthscaled(exponent=1, base=8)", "stochasticdepth(0.5)"])
def test_gains_and_constants_of_a_scheme_go_into_the_weights(transformers, tmp_path, scheme, options):
    """rezero has no norms to give away in a transformer: only its gain is left beside those."""
    model = network(scheme=scheme, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert write_transformers_folder(model, tmp_path / "out") < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("left", [5, 4, 2])
def test_what_shorten_left_out_is_written_as_zeros_or_not_at_all(transformers, tmp_path, left):
    model = operate(sw.shorten, left)
    assert write_transformers_folder(model, tmp_path / "out") < 1e-5
    present = {name.split(".")[1] for name in model.state_dict() if name.startswith("blocks.")}
    assert json.loads((tmp_path / "out/config.json").read_text())["n_layer"] == len(present)


@pytest.mark.parametrize("options", [{}, {**LLAMA, "bias": "qkv"}])
@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (ByteTokenizer(), "naïve\n\t  한 é<|endo \U0001f600"),
        (CharTokenizer("\n abcé\U0001f600", separates=True), "a  bé\n\nc\U0001f600 "),
    ],
    ids=["bytes", "chars"],
)
def test_tokenizers_travel(transformers, tmp_path, tokenizer, text, options):
    """A qwen2 would be read with Qwen's tokenizer, whatever is written, so it is written as another class."""
    write_transformers_folder(network(vocab=tokenizer.size, **options), tmp_path / "out", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.separator
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == tokenizer.separator


def test_a_tokenizer_from_a_file_travels_without_what_it_puts_around_texts(transformers, tmp_path):
    """Our texts have no token at their start, whatever the file's template says: nor should they have one there."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json")
    write_transformers_folder(network(vocab=4), tmp_path / "out", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a b b x")["input_ids"] == tokenizer.encode_known("a b b x").tolist() == [1, 2, 2, 3]
    assert (theirs.eos_token_id, theirs.unk_token_id) == (0, 3)


def test_characters_that_a_tokenizer_lacks(transformers, tmp_path):
    with_unknown = CharTokenizer("ab", marks_unknown=True)
    write_transformers_folder(network(vocab=3), tmp_path / "out", tokenizer=with_unknown)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("axb")["input_ids"] == [0, 2, 1]


def test_a_folder_of_theirs_read_trained_and_written_with_what_lies_beside_it(transformers, tmp_path, capsys):
    """The command exports it; its tokenizer, and the token that ends a text, stay."""
    tokenizer = CharTokenizer("abcdefgh", separates=True)
    write_transformers_folder(network(vocab=9), tmp_path / "theirs", tokenizer=tokenizer)
    (tmp_path / "theirs/README.md").write_text("not taken")
    assert main(["export", str(tmp_path / "theirs"), "--transformers", str(tmp_path / "again")]) == 0
    assert "largest difference" in capsys.readouterr().out
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert not (tmp_path / "again/README.md").exists()


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """Config and tokenizer are fetched with the weights; a config of another network than the given one is refused."""
    hub = pytest.importorskip("huggingface_hub", reason="the extra 'hub' is not installed")
    model = network().eval()
    write_transformers_folder(model, tmp_path)
    asked = []

    def snapshot(repository, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    back = sw.from_pretrained("hf:org/name")
    torch.testing.assert_close(back(tokens(2, 8)), model(tokens(2, 8)))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(asked[0])
    with pytest.raises(sw.CheckpointError, match="heads=2 in the model, heads=4 in the file"):
        sw.load(network(heads=2), "hf:org/name", names="huggingface")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_of_numbers_stay(transformers, tmp_path, dtype):
    write_transformers_folder(network().to(dtype), tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: network(norm="post"), r"differs in norm='post' \(there 'pre'\)"),
        (lambda: network(**{**LLAMA, "position": "learned"}), r"differs in position='learned' \(there 'rotary'\)"),
        (lambda: network(scheme="fixup"), r"differ in \d+ parameters, 'blocks\.0\.attention"),
        (lambda: network(scheme="plain"), r"computes other logits with these weights"),
        (lambda: network(scheme="deepnorm"), r"differ in \d+ parameters, 'stem\.post\.norm"),
        (lambda: operate(sw.rescheme, "layerscale"), r"sw\.fold_gains\(model, example\) multiplies"),
        (lambda: nn.Linear(2, 2), r"a Linear: the rule is a network of the family gpt"),
    ],
)
def test_what_transformers_cannot_express_is_refused_and_leaves_nothing(tmp_path, make, said):
    with pytest.raises(sw.SkipwayError, match=said):
        write_transformers_folder(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_of_other_networks_and_folders_with_other_files(tmp_path):
    with pytest.raises(sw.CheckpointError, match="the tokenizer has 256 tokens, the network vocab=29"):
        write_transformers_folder(network(), tmp_path / "out", tokenizer=ByteTokenizer())
    with pytest.raises(sw.CheckpointError, match="holds no tokenizer"):
        write_transformers_folder(network(), tmp_path / "out", tokenizer=tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(sw.SkipwayError, match="contains other files"):
        write_transformers_folder(network(), tmp_path / "out")


def test_a_folder_that_names_more_blocks_than_it_has(transformers, tmp_path):
    write_transformers_folder(network(), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for blocks, said in ((4, "missing from the file"), (10**9, "describes 1000000000 blocks")):
        (tmp_path / "config.json").write_text(json.dumps({**described, "n_layer": blocks}))
        with pytest.raises(sw.CheckpointError, match=said):
            sw.from_pretrained(tmp_path)
