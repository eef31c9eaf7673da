"""The GPT family: published sizes, causality, positions, the cache, transformers' building blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skipway as sw
from skipway.errors import SkipwayError
from skipway.inference.generate import Sampling
from skipway.models import variants
from skipway.models.gpt.variants import gpt_name
from skipway.nn import CausalAttention, GatedMlp, RotaryPositions, decoding
from skipway.optim.roles import parameter_roles
from skipway.schemes import all_schemes

TINY = {"depth": 2, "dim": 16, "heads": 4, "vocab": 11, "context": 12}
LLAMA = {"rms": True, "position": "rotary", "act": "silu", "gated": True, "bias": "none", "groups": 2}
SHAPES = {
    "gpt2": {},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_norm": True, "head_dim": 6},
    "one key head": {**LLAMA, "groups": 1, "tied": False},
    "post-norm": {"norm": "post"},
    "no positions": {"position": "none", "norm": "sandwich", "bias": "qkv"},
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


def network(**options: object) -> nn.Module:
    """A small decoder off its start, in evaluation mode."""
    model = sw.build("gpt", **{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("variant", [v for v in variants() if v.family == "gpt"], ids=lambda v: v.name)
def test_published_numbers_of_parameters(variant):
    model = sw.build(variant.name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == variant.parameters
    assert len(sw.chain(model)) == variant.config.branches


@pytest.mark.parametrize("scheme", list(all_schemes("attention")))
def test_no_logit_sees_a_later_token(scheme):
    """Whatever dresses the connections; and each logit sees its own token (through attention, where it is on)."""
    model, ids = network(scheme=scheme), tokens(2, 9)
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 11
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-5)
    assert (after[:, 5] - before[:, 5]).abs().max() > 1e-4


@pytest.mark.parametrize("scheme", list(all_schemes("attention")))
def test_a_cache_changes_nothing_in_any_scheme(scheme):
    model, ids = network(scheme=scheme), tokens(2, 12)
    with torch.no_grad(), decoding(model, 12) as state:
        parts = []
        for part in ids.split((5, 1, 4, 2), dim=1):
            parts.append(model(part))
            state.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_texts_with_and_without_cache_beyond_the_context(shape):
    model, ids = network(**SHAPES[shape]), tokens(3, 4)
    model.train()
    cached = sw.generate(model, ids, 14, temperature=0)
    assert torch.equal(cached, sw.generate(model, ids, 14, temperature=0, cache=False))
    assert model.training
    assert cached.shape == (3, 18)
    longer = torch.cat((ids, tokens(3, 12)), dim=1)  # a prompt that is longer than the context
    assert sw.generate(model, longer, 2).shape == (3, 18)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_equation(shape):
    """Σ_{s ≤ t} softmax(q_t k_s / √d) v_s head by head, each query head with the keys of its group."""
    model = network(**SHAPES[shape])
    attention = model.blocks[0].attention.branch
    h = torch.randn(2, 7, 16)
    heads, groups, d = attention.heads, attention.groups, attention.width
    q, k, v = attention.qkv(h).split((heads * d, groups * d, groups * d), dim=-1)
    rotary = attention.rotary or nn.Identity()
    mixed = []
    for head in range(heads):
        group = head // (heads // groups)
        own_q = rotary(attention.norm_q(q[..., head * d : (head + 1) * d])[:, None])[:, 0]
        own_k = rotary(attention.norm_k(k[..., group * d : (group + 1) * d])[:, None])[:, 0]
        weights = (own_q @ own_k.mT / d**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).softmax(-1)
        mixed.append(weights @ v[..., group * d : (group + 1) * d])
    expected = attention.end(attention.proj(torch.cat(mixed, dim=-1)))
    torch.testing.assert_close(attention(h), expected, rtol=1e-4, atol=1e-5)


def test_rotary_products_depend_on_distances_alone():
    rotary, q, k = RotaryPositions(8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(at: int, other: int) -> float:
        return float((rotary(q, at) * rotary(k, other)).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)
    # the first pair turns by one radian a token, the last by θ^(-(d-2)/d)
    turned = RotaryPositions(4, theta=100.0)(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4), 1).flatten()
    expected = torch.tensor([1.0, 0.1]).cos(), torch.tensor([1.0, 0.1]).sin()
    torch.testing.assert_close(turned, torch.cat(expected))


def test_the_gated_perceptron_is_the_equation():
    model = network(**LLAMA)
    mlp = model.blocks[0].mlp.branch
    assert isinstance(mlp, GatedMlp)
    h = torch.randn(3, 16)
    gate, up = mlp.fc1.weight.chunk(2)
    torch.testing.assert_close(mlp(h), (F.silu(h @ gate.T) * (h @ up.T)) @ mlp.fc2.weight.T)
    assert sw.models.GPTConfig(dim=512, blocks=1, heads=8, gated=True).mlp_width == 1408  # 8/3 · 512 = 1365.3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_watched_chain_is_the_typed_one(shape):
    model = network(**SHAPES[shape])
    watched = sw.chain(model, tokens(2, 7))
    assert [connection.name for connection in watched] == [connection.name for connection in sw.chain(model)]


def test_gpt2_starts_with_the_last_maps_divided_by_the_root_of_branches():
    model = sw.build("gpt2", depth=8, dim=128, heads=2, vocab=50)
    for block in model.blocks:
        assert block.attention.branch.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for last in (block.attention.branch.proj, block.mlp.branch.fc2):
            assert last.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.03)
    assert model(tokens(1, 3)).std() < 0.5  # near the uniform distribution


def test_a_tied_head_is_the_table():
    tied, loose = network(), network(tied=False)
    assert "head.classifier.weight" in loose.state_dict()
    assert not any("classifier" in name for name in tied.state_dict())
    tied.stem.token.data[3] = 0
    assert bool((tied(tokens(1, 4))[..., 3] == 0).all())
    roles = parameter_roles(tied, tokens(1, 4))
    assert roles["stem.token"].name == roles["stem.position"].name == "embedding"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(1, 13)), r"context=12; call it with .*ids\[:, -12:\]"),
        (lambda m: m(torch.tensor([[3, 11]])), "token 11: .*vocab=11"),
        (lambda m: m(torch.tensor([[3, -1]])), "token -1"),
        (lambda m: m(torch.zeros(1, 3)), r"float32: the rule is \(N, T\)"),
        (lambda m: m(torch.tensor([3])), r"shape \(1,\)"),
        (lambda m: sw.generate(m, tokens(1, 0), 3), "at least one token"),
        (lambda m: sw.generate(m, tokens(1, 3), 3, temperature=-1), "temperature >= 0"),
        (lambda m: sw.generate(m, tokens(1, 3), 3, top_p=0), "0 < top_p"),
        (lambda m: sw.generate(nn.Linear(2, 2), tokens(1, 3), 3), "no causal attention.*cache=False"),
        (lambda m: CausalAttention(16, 4, kit=None, placement=None, groups=3), "groups divides heads"),
        (lambda m: sw.build("gpt", **TINY, position="rotary", head_dim=5), "even number of channels"),
        (lambda m: sw.build("gpt", **TINY | {"heads": 5}), "heads divides dim, or give head_dim"),
        (lambda m: sw.build("gpt", **TINY | {"depth": 0}), "at least one block"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(SkipwayError, match=message):
        call(network())


def test_a_network_decodes_one_text_at_a_time_and_forgets_it():
    model = network()
    with decoding(model, 4):
        with pytest.raises(SkipwayError, match="decoding already"), decoding(model, 4):
            pass
        with pytest.raises(SkipwayError, match="a cache for 4"):
            model(tokens(1, 5))
    with torch.no_grad():
        model(tokens(1, 12))  # as before


def test_draws():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    shares = torch.bincount(Sampling(temperature=0.5)(logits), minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1).float(), rtol=0, atol=0.03)
    assert set(Sampling(top_k=2)(logits).tolist()) == {2, 3}
    assert set(Sampling(top_p=0.6)(logits).tolist()) == {3}  # e³ has 0.644 of the sum
    assert set(Sampling(top_p=0.7)(logits).tolist()) == {2, 3}
    first, second = (sw.generate(network_of_seed(), tokens(1, 3), 8, seed=5) for _ in range(2))
    assert torch.equal(first, second)


def network_of_seed() -> nn.Module:
    torch.manual_seed(0)
    return network()


def test_rows_end_at_a_token():
    class Counting(nn.Module):
        """The next token is the last one plus one."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.one_hot((ids + 1) % 9, 9).float()

    grown = sw.generate(Counting(), torch.tensor([[1], [3]]), 8, temperature=0, stop=5, cache=False)
    assert grown.tolist() == [[1, 2, 3, 4, 5], [3, 4, 5, 5, 5]]


@pytest.mark.parametrize("temperature", [0, 5])
def test_rows_to_spare_are_not_drawn(temperature):
    model = network()
    drawn = sw.generate(model, tokens(4, 3), 60, temperature=temperature, tokens=7, seed=0)[:, 3:]
    assert drawn.max() < 7 <= sw.generate(model, tokens(4, 3), 60, temperature=5, seed=0)[:, 3:].max()
    assert torch.equal(Sampling(temperature=0, tokens=2)(torch.tensor([[1.0, 2.0, 9.0]])), torch.tensor([1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_name_that_gives_the_config(shape):
    config = network(**SHAPES[shape], rotary_scaling=None).config
    again = sw.build(gpt_name(config), vocab=11, context=12, scheme=config.scheme, device="meta").config
    assert again == config


def test_options_in_brackets_behind_a_name():
    model = sw.build("gpt-4(dim=16, heads=2, position='rotary', rotary_scaling='linear(4)')", heads=4, device="meta")
    assert (model.config.dim, model.config.heads, str(model.config.rotary_scaling)) == (16, 4, "linear(factor=4)")
    assert (
        gpt_name(model.config)
        == "gpt-small(dim=16, blocks=4, heads=4, position='rotary', rotary_scaling='linear(factor=4)')"
    )
    assert sw.build("resnet18(classes=7)", device="meta").config.classes == 7
    for name, said in (
        ("resnet18(clases=7)", "resnet18: unknown option 'clases'; did you mean 'classes'"),
        ("gpt-4(dim=f())", "not of the form"),
        ("gpt-4(dim=16", "not of the form"),
        ("gpt-4(3)", "options"),
    ):
        with pytest.raises(SkipwayError, match=said):
            sw.build(name, device="meta")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_model_generates_without_a_compilation_per_token(wrapped):
    model, graphs = sw.build("gpt", depth=2, dim=16, heads=2, vocab=9, context=12), []
    expected = sw.generate(model, tokens(1, 3) % 9, 6, temperature=0)

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    if wrapped:
        compiled = torch.compile(model, backend=count)
    else:
        model.compile(backend=count)
        compiled = model
    assert torch.equal(sw.generate(compiled, tokens(1, 3) % 9, 6, temperature=0), expected)
    assert not graphs
    compiled(tokens(1, 3) % 9)
    assert graphs  # outside, it is compiled as before
