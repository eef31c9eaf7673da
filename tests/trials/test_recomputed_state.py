"""Kind: a block is computed twice, and writes into something both times: a cache grows, a counter counts double.

The gradients of the network as it was are the right value, and everything that blocks write into is as after one pass.

| trial | input | right value |
|---|---|---|
| D3, D7 | Llama, Mistral, Qwen2, GPT-2, OPT, padded, with a cache, `checkpointed` | equal gradients; one key a token |
| D15 | the same, `reversible` | gradients as with everything kept; the cache once |
| D3 | blocks that write into a dict or list that they are given | written into once |
| D7 | blocks that count their passes, collect activations, keep the last one | counted once |
| D7 | a block whose second pass computes something else (it reads its counter) | refused, the model as before |
| D3 | a tensor that blocks accumulate into in place | refused, the model as before |
| D5 | the model checkpoints its blocks itself, re-entrantly | refused, with the way out |
| D7 | batch norm, dropout | statistics once, the same draws |
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.surgery import checkpointed, reversible

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {**SMALL, "intermediate_size": 64}),
    "Mistral": (
        "MistralForCausalLM",
        {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8},
    ),
    "Qwen2": ("Qwen2ForCausalLM", {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}),
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
}
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def training_step(model: Any) -> tuple[Tensor, int]:
    """Gradients of a language model's step, and the keys that are in its cache afterwards."""
    torch.manual_seed(0)
    output = model.train()(input_ids=IDS, attention_mask=MASK, labels=IDS)
    found = gradients(model, output.loss)
    return found, output.past_key_values.get_seq_length()


@needs_transformers
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FOREIGN)
def test_checkpointed_language_models(name, attention, segments):
    transformers = import_transformers()
    kind, options = FOREIGN[name]
    config = getattr(transformers, kind.replace("ForCausalLM", "").replace("LMHeadModel", "") + "Config")
    model = getattr(transformers, kind)(config(**options, attn_implementation=attention))
    expected, keys = training_step(model)
    assert keys == 9
    checkpointed(model, {"input_ids": IDS, "attention_mask": MASK}, segments)
    found, keys = training_step(model)
    torch.testing.assert_close(found, expected)
    assert keys == 9


@needs_transformers
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen2"])
def test_reversible_language_models(name):
    transformers = import_transformers()
    kind, options = FOREIGN[name]
    config = getattr(transformers, kind.replace("ForCausalLM", "").replace("LMHeadModel", "") + "Config")
    model = getattr(transformers, kind)(config(**options))
    operation = reversible(model, {"input_ids": IDS, "attention_mask": MASK})
    assert operation.report["gradient difference"] < 1e-4
    assert training_step(model)[1] == 9


class Block(nn.Module):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.kind, self.passes, self.kept, self.last = kind, 0, [], None

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        h = self.down(self.up(self.norm(x)).relu())
        if self.kind == "dict":
            cache["keys"] = torch.cat([cache["keys"], h], 0) if "keys" in cache else h
            h = h * (3 / len(cache["keys"]))
        elif self.kind == "list":
            cache.append(h)
            h = h / len(cache)
        elif self.kind == "counter":
            self.passes += 1
            self.kept.append(h.detach())
            self.last = h
        elif self.kind == "reads its counter":
            self.passes += 1
            h = h * self.passes
        elif self.kind == "in place":
            cache.add_(1)
            h = h * cache
        return x + h


class Stack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for _ in range(4))
        self.cache: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.cache = {"dict": {}, "list": [], "in place": torch.zeros(1)}.get(self.blocks[0].kind)
        for block in self.blocks:
            x = block(x, self.cache)
        return x


X = torch.randn(3, 5, 8)


@pytest.mark.parametrize("operate", [lambda m: checkpointed(m, X), lambda m: checkpointed(m, X, 2)], ids=["1", "2"])
@pytest.mark.parametrize("kind", ["dict", "list", "counter"])
def test_what_blocks_write_into_is_written_into_once(kind, operate):
    torch.manual_seed(0)
    model = Stack(kind)
    expected = gradients(model, model(X).square().mean())
    for block in model.blocks:
        block.passes, block.kept = 0, []
    operate(model)
    for block in model.blocks:
        block.passes, block.kept = 0, []
    torch.testing.assert_close(gradients(model, model(X).square().mean()), expected)
    if kind == "dict":
        assert len(model.cache["keys"]) == 4 * 3
    if kind == "list":
        assert len(model.cache) == 4
    assert [(block.passes, len(block.kept)) for block in model.blocks] == [(1, 1) if kind == "counter" else (0, 0)] * 4


@pytest.mark.parametrize("kind", ["list", "counter"])
def test_reversible_blocks_write_once(kind):
    model = Stack(kind)
    operation = reversible(model, X)
    assert operation.report["gradient difference"] < 1e-4
    for block in model.blocks:
        block.passes, block.kept = 0, []
    model(X).square().mean().backward()
    if kind == "list":
        assert len(model.cache) == 4
    assert [block.passes for block in model.blocks] == [1 if kind == "counter" else 0] * 4


@pytest.mark.parametrize("operate", [lambda m: checkpointed(m, X), lambda m: reversible(m, X)])
@pytest.mark.parametrize("kind", ["in place", "reads its counter"])
def test_what_is_not_computed_twice_alike_is_refused(kind, operate):
    model = Stack(kind)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(sw.SkipwayError, match="use_cache=False"):
        operate(model)
    assert [type(module) for module in model.modules()] == classes


class OwnCheckpoints(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0].norm.bias
        for block in self.blocks:
            x = checkpoint(block, x, None, use_reentrant=True) if torch.is_grad_enabled() else block(x, None)
        return x


@pytest.mark.parametrize("operate", [lambda m: checkpointed(m, X), lambda m: reversible(m, X)])
def test_reentrant_checkpoints_of_the_model_are_named(operate):
    with pytest.raises(sw.SkipwayError, match=r"re-entrantly.*use_reentrant"):
        operate(OwnCheckpoints(""))


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return x + self.drop(self.down(self.up(self.batch_norm(x)).relu()))


def test_statistics_move_once_and_draws_are_the_same():
    torch.manual_seed(0)
    model, other, x = Stack(""), Stack(""), torch.randn(6, 8)
    for each in (model, other):
        each.blocks = nn.ModuleList(Normed() for _ in range(4))
    other.load_state_dict(model.state_dict())
    checkpointed(other, x, 2)
    found = []
    for each in (model, other):
        torch.manual_seed(1)
        found.append(gradients(each, each.train()(x).square().mean()))
    torch.testing.assert_close(*found)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
