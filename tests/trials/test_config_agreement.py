"""Kind: after an operation on its blocks, a network is saved with a config that builds another network.

Where a config counts the blocks (which entry does is found by building networks from changed configs, not by names), a
change of depth changes the config, renumbers blocks, and `save_pretrained` + `from_pretrained` gives the same network.
Where it does not, the operation says so.

| trial | input | right value |
|---|---|---|
| D22 | Llama, Qwen2 (`layer_types`), Gemma 2, GPT-2 (`n_layer`), GPT-Neo (two lists), BERT, ViT | the same outputs |
| D22 | T5 (a config for each stack), BART (`encoder_layers`, `decoder_layers`) | the same outputs |
| D22 | as many heads as blocks | heads stay |
| D22 | nanoGPT's layout: a dataclass, `type(model)(config)` | config.n_layer counts |
| D22 | ResNet of ours: a tuple with a count for each stage | that entry counts |
| D22 | a frozen config that two networks share | the other network's is left alone |
| D22 | blocks whose number changes what they compute (`scale_attn_by_inverse_layer_idx`) | said: others are built |
| D22 | a class that wants more than a config | said: config does not fit; keys stay |
| D22 | no config | an identity in the place of a block, and this is said |
| README D1 | a shortened decoder with a cache | a cached step equals the whole pass |
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.surgery.foreign_networks import configured
from skipway.surgery import shorten

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
AS_MANY_HEADS: dict[str, dict[str, int]] = {
    "Llama": {"num_key_value_heads": 4},
    "Qwen2": {},
    "Gemma 2": {"num_key_value_heads": 4},
    "GPT-2": {},
    "GPT-Neo": {},
    "BERT": {},
    "ViT of transformers": {},
    "T5": {"num_layers": 3, "num_heads": 3},
    "BART": {"encoder_layers": 3, "decoder_layers": 3},
}
"""Networks, with what gives some of them as many heads as blocks."""
PAIRS = {"T5", "BART"}
"""Networks of an encoder and a decoder."""
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def foreign(name: str, **changed: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = configured(name, **AS_MANY_HEADS[name], **changed).eval()
    if name == "ViT of transformers":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    return model, {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :5]} if name in PAIRS else {})}


def draw_zeros(model: nn.Module) -> None:
    for parameter in model.parameters():
        if (parameter.ndim > 1 and not parameter.any()) or bool((parameter == -1).all()):  # Gemma's gains count from 1
            nn.init.normal_(parameter, std=0.2)


@needs_transformers
@pytest.mark.parametrize("operate", ["deepen", "shorten"])
@pytest.mark.parametrize("name", AS_MANY_HEADS)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_network(name, operate, tmp_path):
    model, example = foreign(name)
    old, keys, config = model(**example)[0], list(model.state_dict()), model.config.to_dict()
    count = 6 if name in PAIRS else 4
    operation = sw.deepen(model, example, 2) if operate == "deepen" else shorten(model, example, count - 1)
    assert not operation.refused
    assert any(entry.startswith("config.") for entry in operation.touched)
    draw_zeros(model)
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    again.eval()
    torch.testing.assert_close(again(**example)[0], model(**example)[0])
    assert not torch.equal(model(**example)[0], old)
    operation.undo(force=True)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert torch.equal(model(**example)[0], old)


@needs_transformers
def test_heads_stay_where_there_are_as_many_as_blocks():
    model, example = foreign("Llama")
    sw.deepen(model, example, 1)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (5, 4, 4)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]


@needs_transformers
def test_the_list_of_kinds_of_layers_goes_along():
    model, example = foreign("Gemma 2")
    kinds = list(model.config.layer_types)
    sw.deepen(model, example, 1)  # after the third of four
    assert list(model.config.layer_types) == [*kinds[:3], kinds[2], *kinds[3:]]
    assert [layer.self_attn.sliding_window is not None for layer in model.model.layers] == [
        kind == "sliding_attention" for kind in model.config.layer_types
    ]


@needs_transformers
@torch.no_grad()
def test_a_shortened_decoder_goes_on_from_its_cache():
    model, example = foreign("Llama")
    first = model.model.layers[0]
    operation = shorten(model, example, 2, score=lambda changed: float(first in set(changed.modules())) * -1)
    assert "model.layers.0" in operation.touched  # the cache's length is that of the first block's keys
    whole = model(IDS).logits[:, -1]
    start = model(IDS[:, :-1], use_cache=True)
    step = model(IDS[:, -1:], past_key_values=start.past_key_values).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


@needs_transformers
def test_blocks_that_compute_by_their_number_compute_as_before():
    model, example = foreign("GPT-2", scale_attn_by_inverse_layer_idx=True)
    old = model(**example).logits
    operation = sw.deepen(model, example, 1)
    torch.testing.assert_close(model(**example).logits, old)
    assert "other values of transformer.h.3.attn.scaling" in operation.refused["config"]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@dataclass(frozen=True)
class NanoConfig:
    n_layer: int = 4
    n_head: int = 4
    block_size: int = 4


class Nano(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        blocks = nn.ModuleList(Block() for _ in range(config.n_layer))
        self.transformer = nn.ModuleDict({"h": blocks, "f": nn.LayerNorm(8)})
        self.position = nn.Parameter(torch.zeros(config.block_size, 8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer["h"]:
            x = block(x + 0 * self.position[0])
        return self.transformer["f"](x)


class Plain(Nano):
    def __init__(self, config: NanoConfig, device: str) -> None:
        super().__init__(config)


X = torch.randn(5, 8)


@pytest.mark.parametrize(("operate", "count"), [(lambda m: sw.deepen(m, X, 2), 6), (lambda m: shorten(m, X, 1), 1)])
def test_a_config_is_known_by_what_is_built_from_it(operate, count):
    model = Nano(NanoConfig()).eval()
    shared, other = model.config, copy(model)
    operation = operate(model)
    assert operation.touched["config.n_layer"] == f"4 → {count}"
    assert model.config == NanoConfig(n_layer=count)
    assert (shared, other.config) == (NanoConfig(), NanoConfig())
    again = Nano(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))
    operation.undo()
    assert model.config is shared


def test_of_several_stages_the_right_one_counts():
    model = sw.build("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    operation = sw.deepen(model, x, 1)
    assert operation.touched["config.blocks[1]"] == "3 → 4"
    assert model.config.blocks == (3, 4, 3)
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("operate", [lambda m: sw.deepen(m, X, 1), lambda m: shorten(m, X, 3)])
def test_a_config_that_does_not_fit_any_more_is_named(operate):
    model = Plain(NanoConfig(), "cpu").eval()
    operation = operate(model)
    assert "a Plain is not built from its config alone" in operation.refused["config"]
    assert "config" in str(operation)
    assert model.config == NanoConfig()


def test_without_a_config_the_other_keys_stay_and_this_is_said():
    model = nn.Sequential(*(Block() for _ in range(4))).eval()
    keys = set(model.state_dict())
    operation = shorten(model, X, 3)
    ((name, how),) = operation.touched.items()
    assert how.endswith("an identity is in its place, so that other keys stay")
    assert set(model.state_dict()) == {key for key in keys if not key.startswith(f"{name}.")}
    assert not operation.refused
