"""Connections over several streams in networks of others: counted, located and named as their equations say."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skipway as sw
from skipway.zoo.sources import import_library

N, D, DEPTH = 3, 8, 2


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class Layer(nn.Module):
    """Weights of a dynamic hyper-connection (Zhu et al. 2025, eq. 10-13) of s (..., n, D), and the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.static = nn.Parameter(torch.cat((torch.eye(N, 1), torch.eye(N), torch.ones(N, 1)), 1))
        self.dynamic = nn.Parameter(torch.randn(D, N + 2))
        self.branch = mlp()

    def weights(self, s):
        return (torch.tanh(self.norm(s) @ self.dynamic) * 0.1 + self.static).split((1, N, 1), -1)


class Folded(Layer):
    """Streams beside each sample in the batch axis, (b s) ...: one einsum reads and mixes, one writes."""

    def forward(self, s):
        s = s.unflatten(0, (-1, N)).movedim(1, -2)
        read, mix, write = self.weights(s)
        mixed = torch.einsum("...st,...sd->...td", torch.cat((read, mix), -1), s)
        carried = mixed[..., 1:, :].movedim(-2, 1).flatten(0, 1)
        out = torch.einsum("b...d,b...s->b...sd", self.branch(mixed[..., 0, :]), write[..., 0])
        return out.movedim(-2, 1).flatten(0, 1) + carried


class OneAfterTheOther(Layer):
    """Streams one after the other in the batch axis, (s b) ..."""

    def forward(self, s):
        s = s.unflatten(0, (N, -1)).movedim(0, -2)
        read, mix, write = self.weights(s)
        written = write * self.branch((read * s).sum(-2)).unsqueeze(-2)
        return (mix.mT @ s).movedim(-2, 0).flatten(0, 1) + written.movedim(-2, 0).flatten(0, 1)


class Matmul(Layer):
    """Streams on an axis of their own; in float32, with matrix products, the branch first."""

    def forward(self, s):
        read, mix, write = (each.float() for each in self.weights(s.double().float()))
        f = self.branch((read.mT @ s).squeeze(-2))
        return torch.matmul(write, f.unsqueeze(-2)) + torch.matmul(mix.mT, s)


class Written(Layer):
    """Every product and sum written out, as DeepSeek's hc_post; weights made doubly stochastic in front."""

    def forward(self, s):
        read, mix, write = self.weights(s)
        for _ in range(20):
            mix = mix.exp() if not _ else mix / mix.sum(-1, keepdim=True)
            mix = mix / mix.sum(-2, keepdim=True)
        x = (read * s).sum(2)
        return write * self.branch(x).unsqueeze(2) + (mix.unsqueeze(-1) * s.unsqueeze(3)).sum(2)


class Static(Layer):
    """Weights that are parameters."""

    def forward(self, s):
        read, mix, write = self.static.split((1, N, 1), -1)
        x = torch.einsum("nk,btnd->btd", read, s)
        return torch.baddbmm((mix.mT @ s).flatten(0, 1), write.expand(len(s) * s.shape[1], N, 1),
                             self.branch(x).view(-1, 1, D)).view_as(s)  # fmt: skip


class InChannels(Layer):
    """A gated residual: streams beside each other in the channels; the skip is the identity."""

    def forward(self, s):
        apart = s.unflatten(-1, (N, D))
        read, _, write = self.weights(apart)
        f = self.branch((torch.sigmoid(read) * apart).mean(-2))
        return s + (f.unsqueeze(-2) * (2 * torch.sigmoid(write))).flatten(-2)


class Highway(Layer):
    """A gate for every channel of every stream carries, which is no mixing of streams."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def forward(self, s):
        read, _, write = self.weights(s)
        return s * torch.sigmoid(self.gate(s)) + write * self.branch((read * s).sum(2)).unsqueeze(2)


class Network(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, D), nn.Linear(D, 2)
        self.layers = nn.ModuleList(layer() for _ in range(DEPTH))
        self.kind = layer

    def open(self, x):
        if self.kind is Folded:
            return x.repeat_interleave(N, 0)
        if self.kind is OneAfterTheOther:
            return x.repeat(N, 1, 1)
        return x.repeat(1, 1, N) if self.kind is InChannels else torch.stack([x] * N, 2)

    def close(self, s):
        if self.kind is Folded:
            return s.unflatten(0, (-1, N)).sum(1)
        if self.kind is OneAfterTheOther:
            return s.unflatten(0, (N, -1)).sum(0)
        return s.unflatten(-1, (N, D)).mean(-2) if self.kind is InChannels else s.sum(2)

    def forward(self, x):
        s = self.open(self.stem(x))
        for layer in self.layers:
            s = layer(s)
        return self.head(self.close(s))


# kind, its skip, axis of the streams, stride, axis of the channels; x is (2, 5, 4)
FORMS = [
    (Folded, "mixed", 0, 1, 2),
    (OneAfterTheOther, "mixed", 0, 2, 2),
    (Matmul, "mixed", 2, 1, 3),
    (Written, "mixed", 2, 1, 3),
    (Static, "mixed", 1, 1, 2),  # the sum is one of (b t, n, D)
    (InChannels, "identity", 2, D, 2),
]


@pytest.mark.parametrize(("kind", "skip", "axis", "stride", "channel"), FORMS)
def test_hyper_connections_in_any_form(kind, skip, axis, stride, channel):
    found = sw.chain(Network(kind), torch.randn(2, 5, 4))
    assert [each.name for each in found] == ["layers.0", "layers.1"]
    for each in found:
        streams = each.seen.streams
        assert (streams.axis.count, streams.axis.axis, streams.axis.stride) == (N, axis, stride)
        assert (each.seen.skip, each.seen.channel) == (skip, channel)
        assert each.seen.maps == tuple(f"{each.name}.branch.{place}" for place in (1, 3))
        assert each.seen.norms == ("pre",)
        assert each.seen.last == f"{each.name}.branch.3"


@pytest.mark.parametrize("kind", [form[0] for form in FORMS])
def test_a_layer_scale_multiplies_the_branch(kind):
    """In front of the write: with the gains at 0 a network computes what it does where its branches put out 0. Where a
    matrix product writes, a factor before it is refused.
    """
    model, x = Network(kind), torch.randn(2, 5, 4)
    before = set(model.state_dict())
    if kind in (Matmul, Static):
        with pytest.raises(sw.SkipwayError, match="a factor before that is none after it"):
            sw.rescheme(model, x, "layerscale")
        return
    sw.rescheme(model, x, "layerscale")
    with torch.no_grad():
        for name in model.state_dict().keys() - before:
            model.get_parameter(name).zero_()
        without = model(x)
        for layer in model.layers:
            layer.branch.register_forward_hook(lambda *given: torch.zeros_like(given[-1]))
    assert torch.equal(without, model(x))


@pytest.mark.parametrize("kind", [Folded, InChannels])
def test_influence_of_mixed_and_of_carried_streams(kind):
    model, x = Network(kind).eval(), torch.randn(2, 5, 4)
    if kind is InChannels:
        assert set(sw.influence(model, x)) == {"layers.0", "layers.1"}
        return
    with pytest.raises(sw.SkipwayError, match="mixes several streams"):
        sw.influence(model, x)


def test_a_diagnosis_measures_them_and_says_of_what():
    diagnosis = sw.diagnose(Network(Matmul), torch.randn(16, 5, 4), targets=torch.randint(2, (16, 5)))
    assert any("2 connections of several streams" in remark for remark in diagnosis.remarks)
    assert not any("skip" in finding.rule for finding in diagnosis.findings)
    assert len(diagnosis.chain) == DEPTH


def test_gates_of_channels_are_refused():
    found = sw.chain(Network(Highway), torch.randn(2, 5, 4))
    assert not found
    assert [each.reason for each in found.refused if each.shape == (2, 5, N, D)] == ["gated"] * DEPTH


def test_a_block_alone_on_streams_that_came_in():
    (found,) = sw.chain(Matmul(), torch.randn(2, 5, N, D))
    assert (found.seen.streams.axis.count, found.seen.streams.axis.axis) == (N, 2)


class Context(nn.Module):
    """x + mlp(mean over positions): one vector for all positions, which are no streams."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mlp, self.weigh = nn.Conv2d(3, D, 1), nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        a = torch.softmax(self.weigh(x), 1)
        return x + torch.sigmoid(a) * F.gelu(self.mlp((a * x).sum(1, keepdim=True)))


def test_positions_are_no_streams():
    assert not [each for each in sw.chain(Context(), torch.randn(2, 3, 4, 4)) if each.seen.streams]


# Networks of transformers -------------------------------------------------------------------------------------------


def tiny(model: str, name: str, **settings) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    pytest.importorskip("transformers")
    import_library("transformers")
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    kind = getattr(module, name)
    sizes = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    config = kind.config_class(**sizes | settings)
    return kind(config).eval(), {"input_ids": torch.randint(3, 60, (2, 12))}


def deepseek_v4():
    return tiny(
        "deepseek_v4", "DeepseekV4Model", head_dim=16, q_lora_rank=16, o_lora_rank=8, o_groups=2, index_head_dim=8,
        index_n_heads=2, index_topk=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, hc_mult=4,
        hc_sinkhorn_iters=3, qk_rope_head_dim=8, partial_rotary_factor=0.5, mlp_layer_types=["hash_moe", "moe"],
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    )  # fmt: skip


def qwen4_exp():
    return tiny(
        "qwen4_exp", "Qwen4ExpTextModel", num_key_value_heads=2, head_dim=8, hc_count=4, hc_lowrank=8,
        layer_types=["linear_attention", "indexed_attention"], linear_key_head_dim=8, linear_value_head_dim=8,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16, indexer_compress_ratio=2,
        linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, shared_expert_intermediate_size=16,
    )  # fmt: skip


def gemma3n():
    return tiny(
        "gemma3n", "Gemma3nTextModel", vocab_size_per_layer_input=64, intermediate_size=[48, 48], num_key_value_heads=2,
        head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.5, 0.0],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "skip", "axis", "stride", "norms"),
    [(deepseek_v4, "mixed", 2, 1, "pre"), (qwen4_exp, "identity", 2, 32, "pre")],
)
def test_attention_and_experts_of_every_layer(build, skip, axis, stride, norms):
    """Two connections of each decoder layer, on 4 streams (B, L, 4, D) and (B, L, 4 D)."""
    found = sw.chain(*build())
    assert [each.name for each in found] == [f"layers.{layer}:{place}" for layer in range(DEPTH) for place in (1, 2)]
    for each in found:
        streams = each.seen.streams
        assert (streams.axis.count, streams.axis.axis, streams.axis.stride) == (4, axis, stride)
        assert each.seen.skip == skip
        assert norms in each.seen.norms
        part = "attn" if each.name.endswith(":1") else "mlp"
        assert all(part in name for name in each.seen.maps)


def test_altup_and_laurel_of_gemma3n():
    """In Gemma3nTextDecoderLayer.forward: LAuReL adds a low-rank map to the normed stream; attention, LAuReL and the
    feed-forward network are added to the active stream; AltUp corrects 4 streams, and the input of the layer is added
    to the last 3.
    """
    found = sw.chain(*gemma3n())
    names = [f"layers.{layer}{end}" for layer in range(DEPTH) for end in (".laurel", ":1", ":2", ":3", ":4", ":5")]
    assert [each.name for each in found] == names
    several = [each for each in found if each.seen.streams]
    assert [each.name[-2:] for each in several] == [":4", ":5"] * DEPTH
    assert {(each.seen.streams.axis.count, each.seen.streams.axis.axis) for each in several} == {(4, 0)}
    assert [each.seen.shape[0] for each in several] == [4, 3] * DEPTH
    assert [each.seen.skip for each in several] == ["mixed", "identity"] * DEPTH
    assert {"layers.0.laurel.linear_left", "layers.0.mlp.down_proj"} <= set(several[0].seen.maps)
    predictions = [each for each in found.refused if each.reason == "mixing"]
    assert [each.owner for each in predictions] == ["layers.0", "layers.1"]


@pytest.mark.parametrize("scheme", ["hyperconnections(3, dynamic=False)", "hyperconnections(4)", "mhc", "gatedstreams"])
@pytest.mark.parametrize("name", ["vit-tiny-16", "resnet20"])
def test_our_own_as_strangers(scheme, name):
    """The same connections as by type, all on several streams, one after the other in the batch axis."""
    sizes = {"depth": 2, "dim": 12, "heads": 2, "patch": 4, "image": 8} if "vit" in name else {}
    model = sw.build(name, scheme=scheme, **sizes)
    x = torch.randn(2, 3, 8, 8)
    found, own = sw.chain(model, x), sw.chain(model)
    assert [each.name for each in found] == [each.name for each in own]
    for each, connection in zip(found, own, strict=True):
        count = connection.residual.streams.count
        streams = each.seen.streams.axis
        assert (streams.count, streams.axis, streams.stride) == (count, 0, each.seen.shape[0] // count)
        assert each.path[0].module is connection.path[0].module
