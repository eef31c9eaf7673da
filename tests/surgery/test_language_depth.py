"""`deepen` and `shorten` keep what makes a network a language model, and its config builds the same network again.

Configs of these networks count blocks in the ways that those of transformers do: beside a number, a list of the places
of a kind (`attn_layer_indices`), the first place of a kind (`first_k_dense_replace`), the last (`moe_layer_end_index`),
a list that nothing but a check of its length reads (`layer_types`), a string with a letter for each (`M*-`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from skipway.surgery import shorten

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.mix, self.out = number, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(x).cumsum(1).tanh())


class Recurrence(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.out = number, nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.cummax(1).values)


class Block(nn.Module):
    """The place of its number differs by its kind; `twice` is computed from it and used by nothing."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__()
        self.norm, self.twice = nn.LayerNorm(8), 2 * number
        if kind == "*":
            self.attention = Attention(number)
        else:
            self.recurrence = Recurrence(number)

    def forward(self, x: Tensor) -> Tensor:
        part = self.attention if hasattr(self, "attention") else self.recurrence
        return x + part(self.norm(x))


@dataclass
class Counting:
    n_layer: int = 4
    width: int = 8

    def kinds(self) -> str:
        return "*" * self.n_layer


@dataclass
class Places(Counting):
    attention_at: list[int] = field(default_factory=lambda: [1, 3, 7])

    def kinds(self) -> str:
        return "".join("*" if number in self.attention_at else "M" for number in range(self.n_layer))


@dataclass
class Border(Counting):
    recurrent: int = 3

    def kinds(self) -> str:
        return "M" * self.recurrent + "*" * (self.n_layer - self.recurrent)


@dataclass
class Last(Counting):
    last_recurrent: int = 3

    def kinds(self) -> str:
        return "M" * (self.last_recurrent + 1) + "*" * (self.n_layer - 1 - self.last_recurrent)


@dataclass
class Pattern(Counting):
    n_layer: int = 0
    pattern: str = "M*M*"

    def kinds(self) -> str:
        return self.pattern


@dataclass
class Checked(Counting):
    layer_types: list[str] = field(default_factory=lambda: ["a", "b", "c", "d"])

    def kinds(self) -> str:
        if len(self.layer_types) != self.n_layer:
            raise ValueError("layer_types")
        return super().kinds()


@dataclass
class Period(Counting):
    period: int = 2

    def kinds(self) -> str:
        return "".join("M*"[number % self.period] for number in range(self.n_layer))


class Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, kinds = config, config.kinds()
        self.count = len(kinds)
        self.blocks = nn.ModuleList(Block(number, kind) for number, kind in enumerate(kinds))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.count):
            x = self.blocks[number](x)
        return x


def numbers_of(model: nn.Module) -> list[int]:
    parts = [module for module in model.modules() if isinstance(module, Attention | Recurrence)]
    return [part.number for part in parts]


@pytest.mark.parametrize("operate", ["deepen", "shorten"])
@pytest.mark.parametrize(
    "config",
    [Counting(), Places(), Places(attention_at=[0, 1, 2, 3]), Border(), Last(), Pattern(), Checked()],
    ids=repr,
)
def test_the_config_builds_the_changed_network(config, operate):
    torch.manual_seed(0)
    model = Decoder(config).eval()
    before = replace(config)
    operation = sw.deepen(model, X, 2) if operate == "deepen" else shorten(model, X, 2)
    assert not operation.refused
    assert model.count == len(model.blocks) == (6 if operate == "deepen" else 2)
    assert numbers_of(model) == list(range(model.count))
    assert [block.twice for block in model.blocks] == [2 * number for number in range(model.count)]
    again = Decoder(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))
    operation.undo()
    assert model.config is config
    assert config == before
    assert (model.count, numbers_of(model)) == (4, [0, 1, 2, 3])


def test_blocks_that_stayed_on_another_device_do_not_come_back():
    model = Decoder(Counting()).eval()
    operation = shorten(model, X, 2)
    model.to("meta")
    with pytest.raises(sw.SkipwayError, match="moved to meta since, .* stayed on cpu"):
        operation.undo(force=True)


def test_a_config_that_cannot_say_it_is_named_with_what_is_built_instead():
    model = Decoder(Period()).eval()
    operation = sw.deepen(model, X, 1)
    assert "the closest differs in" in operation.refused["config"]
    assert "torch.save" in operation.refused["config"]


class Scaled(Block):
    """A block with a factor that is computed from its number, as DiffLlama's `lambda_init`."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__(number, kind)
        self.factor = 0.5**number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x)) * self.factor


class DepthScaled(Decoder):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Scaled(number, "*") for number in range(self.count))


def test_what_is_built_with_other_values_is_said():
    model = DepthScaled(Counting()).eval()
    old = model(X)
    operation = sw.deepen(model, X, 1)
    assert torch.allclose(model(X), old)
    assert model.config.n_layer == 5
    assert "other values of blocks.3.factor, blocks.4.factor" in operation.refused["config"]


class Recurring(nn.Module):
    """Blocks that keep their state in one tensor with an entry for each of them (RWKV)."""

    def __init__(self, config: Counting) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Stateful(number) for number in range(config.n_layer))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = x.new_zeros(len(x), 8, len(self.blocks)) - 1e30
        for block in self.blocks:
            x = block(x, state)
        return x, state


class Stateful(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number, "*")
        self.number = number

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        state[..., self.number] = x[:, -1]
        return super().forward(x)


def test_states_of_all_blocks_in_one_tensor_get_an_entry_for_a_copy():
    model = Recurring(Counting()).eval()
    old, states = model(X)
    operation = sw.deepen(model, X, 1)
    assert not operation.refused
    assert torch.allclose(model(X)[0], old)
    assert model(X)[1].shape == (*states.shape[:-1], 5)
    operation.undo()
    measured = shorten(model, X, 3).report
    assert (
        len({value for name, value in measured.items() if name.startswith("blocks.")}) == 4
    )  # not those of the states


@pytest.mark.parametrize(
    ("scheme", "said"), [("umup", "weighted or gated"), ("hyperconnections(2)", "it mixes several streams")]
)
def test_a_refusal_names_its_own_reason(scheme, said):
    model, ids = sw.build("gpt", depth=2, dim=16, heads=2, vocab=9, context=8, scheme=scheme), torch.tensor([[1, 2, 3]])
    with pytest.raises(sw.SkipwayError, match=said) as refusal:
        sw.deepen(model, ids, 1)
    assert "torch.utils.checkpoint" not in str(refusal.value)


def test_blocks_without_influence_are_remarked_upon():
    model = sw.build("gpt", depth=2, dim=16, heads=2, vocab=9, context=8, scheme="prores")
    assert "0 for every block" in shorten(model, torch.tensor([[1, 2, 3]]), 2).refused["influence"]


def test_decoding_with_a_cache_is_verified():
    model = sw.build("gpt", depth=2, dim=16, heads=2, vocab=9, context=8)
    for operation in (sw.deepen(model, torch.tensor([[1, 2, 3]]), 1), shorten(model, torch.tensor([[1, 2, 3]]), 3)):
        assert "equals a pass over all tokens" in operation.verified["decoding with a cache"]


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_cache_without_a_slot_for_a_copy_is_refused():
    """MT5's `generate` makes a cache for as many blocks as the encoder has."""
    from benchmarks.peers import import_transformers

    library = import_transformers()
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4}
    model = library.MT5ForConditionalGeneration(library.MT5Config(**sizes, num_layers=2, num_decoder_layers=2)).eval()
    ids = torch.randint(2, 40, (2, 5))
    keys = list(model.state_dict())
    with pytest.raises(sw.SkipwayError, match=r"decoding with a cache: it does not run .* change both by as many"):
        sw.deepen(model, {"input_ids": ids, "decoder_input_ids": ids}, 1)
    assert list(model.state_dict()) == keys
