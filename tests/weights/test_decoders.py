"""Decoders of transformers: their names and configs to ours and back; what has no counterpart is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

import skipway as sw
from benchmarks.peers import difference, import_transformers, randomise_
from skipway.models import variants
from skipway.models.gpt import GPT, GPTConfig
from skipway.nn import RotaryPositions
from skipway.weights import export_names
from skipway.weights.decoder_config import read_decoder_config, write_decoder_config

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 32}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "max_position_embeddings": 32,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
THEIRS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, own head, gelu, width": (
        "GPT2",
        {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 24},
    ),
    "llama": ("Llama", LLAMA),
    "llama, one key head, tied": ("Llama", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, biases of attention": ("Llama", {**LLAMA, "attention_bias": True, "rms_norm_eps": 1e-2}),
    "llama, all biases": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama 3.1": ("Llama", {**LLAMA, "rope_parameters": STRETCHED}),
    "llama, interpolated": ("Llama", {**LLAMA, "rope_parameters": {**STRETCHED, "rope_type": "linear"}}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 6, "tie_word_embeddings": True}),
    "qwen3, biases, own head": ("Qwen3", {**LLAMA, "head_dim": 6, "attention_bias": True}),
}


@pytest.fixture(scope="module")
def transformers():
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'skipway[transformers]'")
    return import_transformers()


def decoder(transformers, kind: str, config: dict):
    """A small one of theirs off its start, in evaluation mode."""
    own = getattr(transformers, f"{kind}Config")(**config, bos_token_id=None, eos_token_id=None)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return randomise_(getattr(transformers, name)(own)).eval()


def ours(theirs) -> GPT:
    """The network of ours that their config describes, fresh."""
    return sw.initialise_(GPT(read_decoder_config(theirs.config.to_dict(), "config")))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


# Both ways ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", THEIRS)
def test_logits_names_and_config_both_ways(transformers, case):
    theirs = decoder(transformers, *THEIRS[case])
    own = ours(theirs)
    assert difference(own, theirs, "huggingface", tokens(2, 32)) < 1e-5
    exported = export_names(own, "huggingface")
    assert exported.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported[name], tensor), name
    written = transformers.AutoConfig.for_model(**write_decoder_config(own.config))
    again = transformers.AutoModelForCausalLM.from_config(written).eval()
    again.load_state_dict(exported)
    torch.testing.assert_close(again(tokens(2, 32)).logits, theirs(tokens(2, 32)).logits)


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3"])
def test_greedy_texts_are_theirs(transformers, case):
    theirs = decoder(transformers, *THEIRS[case])
    own, prompt = sw.load(ours(theirs), theirs.state_dict(), names="huggingface"), tokens(3, 4)
    grown = sw.generate(own, prompt, 20, temperature=0)
    for cached in (True, False):
        expected = theirs.generate(
            prompt, max_new_tokens=20, do_sample=False, use_cache=cached, attention_mask=torch.ones_like(prompt)
        )
        assert torch.equal(grown, expected)
        assert torch.equal(sw.generate(own, prompt, 20, temperature=0, cache=cached), expected)


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3"])
def test_folders_shards_and_the_base_alone(transformers, tmp_path, case):
    theirs = decoder(transformers, *THEIRS[case])
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = theirs(tokens(2, 9)).logits
    for source in (tmp_path / "one", tmp_path / "one/model.safetensors", tmp_path / "shards"):
        own = sw.load(ours(theirs), source, names="huggingface").eval()
        torch.testing.assert_close(own(tokens(2, 9)), expected, rtol=1e-5, atol=1e-5)
    if theirs.config.tie_word_embeddings:
        own = sw.load(ours(theirs), theirs.base_model.state_dict(), names="huggingface").eval()
        torch.testing.assert_close(own(tokens(2, 9)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("GPT2", "gpt2"), ("GPT2", "gpt2-xl"), ("Llama", "llama3.2-1b"), ("Qwen3", "qwen3-0.6b")],
)
def test_published_sizes_have_their_names_and_shapes(transformers, kind, name):
    config = next(variant.config for variant in variants() if variant.name == name)
    with torch.device("meta"):
        written = getattr(transformers, f"{kind}Config")(**write_decoder_config(config))
        theirs = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(written)
    exported = export_names(sw.build(name, device="meta"), "huggingface")
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in exported.items()} == shapes
    assert read_decoder_config(written.to_dict(), "config") == replace(config, scheme=sw.Identity())


# What stands in files -----------------------------------------------------------------------------------------------


def network(**options) -> GPT:
    return sw.build("gpt", **{"depth": 1, "dim": 8, "heads": 2, "vocab": 11, "context": 12, **options})


def test_a_tied_head_may_be_absent_equal_or_alone_but_not_another():
    model = randomise_(network())
    state = export_names(model, "huggingface")
    for left_out in ("lm_head.weight", "transformer.wte.weight"):
        part = {name: tensor for name, tensor in state.items() if name != left_out}
        loaded = sw.load(network(), part, names="huggingface")
        assert torch.equal(loaded.stem.token, model.stem.token)
    with pytest.raises(sw.CheckpointError, match=r"1 not known to the model:\n  lm_head\.weight"):
        sw.load(network(), {**state, "lm_head.weight": state["lm_head.weight"] + 1}, names="huggingface")


def test_the_published_file_of_gpt2_has_masks_and_no_root(tmp_path):
    model = randomise_(network())
    state = {name.removeprefix("transformer."): tensor for name, tensor in export_names(model, "huggingface").items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    del state["lm_head.weight"]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    loaded = sw.load(network(), tmp_path / "model.safetensors", names="huggingface")
    assert torch.equal(loaded.blocks[0].mlp.branch.fc1.weight, model.blocks[0].mlp.branch.fc1.weight)
    assert load_file(tmp_path / "model.safetensors")["h.0.mlp.c_fc.weight"].shape == (8, 32)  # Conv1D: (in, out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 4}, "heads=4 in the model, heads=2 in the file"),
        ({"act": "gelu"}, "act='gelu' in the model, act='tanhgelu' in the file"),
        ({"epsilon": 1e-3}, "epsilon=0.001 in the model, epsilon=1e-05 in the file"),
    ],
)
def test_weights_that_fit_beside_a_config_of_another_network(tmp_path, options, said):
    (tmp_path / "config.json").write_text(json.dumps(write_decoder_config(network().config)))
    state = export_names(network(), "huggingface")
    del state["lm_head.weight"]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    sw.load(network(), tmp_path, names="huggingface")
    with pytest.raises(sw.CheckpointError, match=said):
        sw.load(network(**options), tmp_path, names="huggingface")


def test_a_longer_table_of_positions_is_cut_where_that_is_allowed():
    """The first rows of a table mean the same in a shorter text; a table that is too short is refused."""
    model = randomise_(network()).eval()
    state = export_names(model, "huggingface")
    with pytest.raises(sw.CheckpointError, match=r"adapt=\('size',\)"):
        sw.load(network(context=5), state, names="huggingface")
    short = sw.load(network(context=5), state, names="huggingface", adapt=("size",)).eval()
    torch.testing.assert_close(short(tokens(2, 5)), model(tokens(2, 5)))
    with pytest.raises(sw.CheckpointError, match=r"stem\.position: \(12, 8\) in the file, \(13, 8\) in the model"):
        sw.load(network(context=13), state, names="huggingface", adapt=("size",))


# What there is not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (
            {"model_type": "mixtral"},
            "model_type='mixtral': the rule for the family gpt is one of gpt2, llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "gpt2", "activation_function": "quick_gelu"}, "activation_function='quick_gelu'"),
        ({"model_type": "gpt2", "n_head": 7}, "heads divides dim"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "rope_type='linear' without 'factor'"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "llama", "mlp_bias": True}, "attention_bias=False, mlp_bias=True"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "mistral"}, "sliding_window=4096: the family gpt computes sliding_window=None only"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"model_type": "llama", "vocab_size": "many"}, "vocab"),
    ],
)
def test_what_the_family_cannot_express_is_named(described, said):
    with pytest.raises(sw.CheckpointError, match=said):
        read_decoder_config(described, "config.json")


def test_what_is_not_followed_is_remarked_upon():
    remarks: list[str] = []
    described = {"model_type": "gpt2", "resid_pdrop": 0.1, "attn_pdrop": 0.0, "logit_scale": 2}
    read_decoder_config(described, "config.json", remarks.append)
    assert [sentence.partition(":")[2] for sentence in remarks] == [
        " fields of no known meaning, not followed: logit_scale",
        " resid_pdrop=0.1 is not taken: the family gpt has no dropout, which matters in training",
    ]


LIKE_LLAMA = {"rms": True, "position": "rotary", "act": "silu", "gated": True, "bias": "none"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "post"}, r"from GPT2LMHeadModel it differs in norm='post' \(there 'pre'\)"),
        ({"rms": True, "bias": "none"}, r"GPT2LMHeadModel it differs in rms=True"),
        ({"groups": 1}, r"GPT2LMHeadModel it differs in groups=1"),
        ({**LIKE_LLAMA, "rms": False}, r"LlamaForCausalLM it differs in rms=False \(there True\)"),
        ({**LIKE_LLAMA, "position": "none"}, r"LlamaForCausalLM it differs in position='none'"),
        ({**LIKE_LLAMA, "head_norm": True, "bias": "all"}, r"it differs in (head_norm=True|bias='all')"),
    ],
)
def test_what_no_class_of_theirs_computes_has_no_names_there(options, said):
    """Some of these have the same names and shapes as one of theirs, and would compute something else there."""
    model = network(**options)
    for use in (lambda: export_names(model, "huggingface"), lambda: write_decoder_config(model.config)):
        with pytest.raises(sw.CheckpointError, match=said):
            use()


@pytest.mark.parametrize("scheme", ["layerscale", "plain", "hyperconnections", "orthogonal"])
def test_schemes_have_no_names_there(scheme):
    with pytest.raises(sw.CheckpointError, match="huggingface"):
        export_names(network(scheme=scheme), "huggingface")


# Scaled frequencies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["llama3(factor=0, low=1, high=4, original=8)", "llama3(2, 4, 4, 8)", "yarn(2)"])
def test_scalings_that_are_none(spec):
    with pytest.raises(sw.SkipwayError, match="high > low|factor > 0|unknown rotary scaling 'yarn'"):
        GPTConfig(dim=8, blocks=1, heads=2, position="rotary", rotary_scaling=spec)


def test_interpolated_positions_turn_less():
    """Position 8 of four times the context stands where position 2 stood; position 0 does not turn."""
    x = torch.randn(1, 1, 9, 8)
    same = x[:, :, :1].expand_as(x)
    plain, slow = RotaryPositions(8)(same), RotaryPositions(8, scaling="linear(4.0)")(same)
    torch.testing.assert_close(slow[:, :, 8], plain[:, :, 2])
    with pytest.raises(sw.SkipwayError, match="position='rotary'"):
        GPTConfig(dim=8, blocks=1, heads=2, rotary_scaling="linear(4)")
