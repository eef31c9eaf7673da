"""Kind: a block is taken for f(x), though it is called with masks, positions, caches and conditioning, by position or
by keyword, and returns tuples.

After `deepen` the parts that start silent are drawn at random, as after some training: a silent copy hides what it is
called with.

| trial | input | right value |
|---|---|---|
| D1 | `nn.TransformerEncoder` with a causal mask | no leak of later tokens |
| D1 | the same with a padding mask | padding does not reach real tokens |
| D1 | block(x, c) with conditioning, in positional and keyword form | the copy is conditioned, too |
| D1 | block(x=…, mask=…) by keyword | works |
| D1 | block that is given (x, mask) in one tuple, and returns it | works |
| D1 | block(h, x) that adds to its second argument (BERT's output modules) | the module around it is the block |
| D20 | `x, cache = block(x)` | works; what the copy returns beside x is named as dropped |
| D20 | block that numbers its slot in a dict of keys | the copy has a slot of its own |
| D20 | block that writes into an unnumbered list | refused, with use_cache=False |
| D20 | a block that runs four times, x through a projection, nothing shaped like x | the reason, for each block |
| D1, D2 | Llama, Qwen2, Gemma 2, Mistral, OLMo, Mixtral, GPT-2, OPT, Mamba | no leak; a cached step equals the pass |
| D20 | GPT-Neo, GPT-J, Falcon, MPT, CodeGen, BLOOM, Phi | the same |
| D1, D2 | BERT, T5, BART, Whisper, Wav2Vec2 | works, the output is as before |
| D1 | a copy silenced by a norm that computes (1 + gain) x̂ (Gemma) | silent at the start, and learns |
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.surgery.foreign_networks import configured
from skipway.surgery import influence, lesion, shorten

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
CAUSAL = [
    *("Llama", "Llama without cache", "Qwen2", "Gemma 2", "Mistral", "OLMo", "Mixtral", "GPT-2", "GPT-Neo", "GPT-J"),
    *("CodeGen", "Falcon", "MPT", "Bloom", "Phi", "Mamba", "OPT"),
]
OTHERS = ["BERT", "T5", "BART", "Whisper", "Wav2Vec2"]
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def foreign(name: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    return configured(name, **changed).eval()


def example_for(name: str) -> Any:
    if name == "Whisper":
        return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": IDS[:, :7]}
    if name == "Wav2Vec2":
        return torch.randn(2, 2000)
    example = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return {**example, "decoder_input_ids": IDS[:, :7]} if name in {"T5", "BART"} else example


def wake(model: nn.Module, known: set[int]) -> int:
    """Draw what is new and 0, as training would move it; returns how many tensors that were."""
    silent = [p for p in model.parameters() if id(p) not in known and (not p.any() or bool((p == -1).all()))]
    for parameter in silent:
        nn.init.normal_(parameter, std=0.3)
    return len(silent)


def deepened(model: nn.Module, example: Any, by: int = 1) -> sw.surgery.Operation:
    known = {id(parameter) for parameter in model.parameters()}
    operation = sw.deepen(model, example, by)
    assert operation.report["difference"] <= 1e-5
    assert wake(model, known)
    return operation


class Causal(nn.Module):
    """A language model of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, dropout=0.0)
        self.embed = nn.Embedding(64, 32)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        return self.encoder(self.embed(ids), mask=mask, src_key_padding_mask=padding)


@torch.no_grad()
def test_a_causal_mask_reaches_the_copy():
    torch.manual_seed(0)
    model, mask = Causal().eval(), nn.Transformer.generate_square_subsequent_mask(12)
    before = model(IDS, mask)
    deepened(model, (IDS, mask), 2)
    other = IDS.clone()
    other[:, 6:] = (IDS[:, 6:] + 1) % 60
    after, changed = model(IDS, mask), model(other, mask)
    assert not torch.allclose(after, before)  # the copies are awake
    torch.testing.assert_close(after[:, :6], changed[:, :6])
    assert not torch.allclose(after[:, 6:], changed[:, 6:])


@torch.no_grad()
def test_a_padding_mask_reaches_the_copy():
    torch.manual_seed(0)
    model = Causal().eval()
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 8:] = True
    deepened(model, {"ids": IDS, "padding": padding}, 2)
    other = torch.where(padding, (IDS + 1) % 60, IDS)
    torch.testing.assert_close(
        model(IDS, padding=padding)[~padding], model(other, padding=padding)[~padding], rtol=1e-4, atol=1e-5
    )


class Branch(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Conditioned(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x) * self.gate(c).unsqueeze(1)).relu())


class Masked(Branch):
    def forward(self, mask: Tensor, *, x: Tensor) -> Tensor:
        return x + super().forward(x) * mask


class Paired(Branch):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = pair
        return x + super().forward(x) * mask, mask


class AddsToSecond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + x)


class Layer(nn.Module):
    """BERT's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.output = nn.Linear(8, 8), AddsToSecond()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(x).relu(), x)


class Fresh(Branch):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.norm(x)
        return x + super().forward(x), keys


class Numbered(Branch):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, cache: dict[int, Tensor]) -> Tensor:
        assert self.number not in cache, "two blocks share a slot"
        cache[self.number] = x
        return x + super().forward(x)


class Appending(Branch):
    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(x)
        return x + super().forward(x)


class Stack(nn.Module):
    """Blocks that are called in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        kind = {
            "positional": Conditioned,
            "keyword": Conditioned,
            "by keyword": Masked,
            "pair": Paired,
            "bert": Layer,
            "tuple": Fresh,
            "appending": Appending,
        }
        self.blocks = nn.ModuleList(Numbered(n) if how == "numbered" else kind[how]() for n in range(4))
        self.sizes: list[int] = []

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        cache: dict[int, Tensor] = {}
        kept: list[Tensor] = []
        mask = c[:, :1, None]
        for block in self.blocks:
            if self.how == "positional":
                x = block(x, c)
            elif self.how == "keyword":
                x = block(c=c, x=x)
            elif self.how == "by keyword":
                x = block(mask, x=x)
            elif self.how == "pair":
                x, mask = block((x, mask))
            elif self.how == "tuple":
                x, keys = block(x)
                kept.append(keys)
            elif self.how == "numbered":
                x = block(x, cache)
            elif self.how == "appending":
                x = block(x, kept)
            else:
                x = block(x)
        self.sizes = [len(cache), len(kept)]
        return x


PAIR = torch.randn(3, 5, 8), torch.randn(3, 4)


@pytest.mark.parametrize("how", ["positional", "keyword", "by keyword", "pair", "bert", "tuple", "numbered"])
def test_copies_are_called_as_their_blocks(how):
    torch.manual_seed(0)
    model = Stack(how).eval()
    before = model(*PAIR)
    operation = sw.deepen(model, PAIR, 2)
    torch.testing.assert_close(model(*PAIR), before, rtol=1e-4, atol=1e-5)
    names = list(operation.touched)
    assert names == ["blocks.1", "blocks.3"]
    for name in names:  # each copy does what a block does that is called in the same way
        for parameter in model.get_submodule(name).residual_scale.parameters():
            nn.init.normal_(parameter, std=0.3)
    after = model(*PAIR)
    by_hand = Stack(how)
    order = [each for block in model.blocks for each in (block, getattr(block, "residual_scale", None)) if each]
    for block in model.blocks:
        if hasattr(block, "residual_scale"):
            block.__class__ = type(block).without_slots
    by_hand.blocks = nn.ModuleList(order)
    torch.testing.assert_close(by_hand(*PAIR), after)
    if how == "numbered":
        assert by_hand.sizes[0] == 6  # a slot for each copy
    if how == "tuple":
        assert "the copy's output 1 is dropped" in operation.touched["blocks.1"]


def test_a_copy_without_a_slot_of_its_own_is_refused():
    model = Stack("appending").eval()
    keys = list(model.state_dict())
    with pytest.raises(sw.SkipwayError, match=r"writes into cache \(list\).*use_cache=False"):
        sw.deepen(model, PAIR, 1)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("how", ["positional", "keyword", "by keyword", "pair", "bert", "tuple", "numbered"])
def test_blocks_are_left_out_however_they_are_called(how):
    torch.manual_seed(0)
    model = Stack(how).eval()
    x, c = PAIR
    by_hand = Stack(how)
    assert len(influence(model, PAIR)) == 4
    operation = shorten(model, PAIR, 2)
    by_hand.blocks = nn.ModuleList(b for n, b in enumerate(model.blocks) if f"blocks.{n}" not in operation.touched)
    assert len(by_hand.blocks) == 2
    torch.testing.assert_close(model(x, c), by_hand(x, c))


def test_what_a_block_returns_is_not_left_out_where_it_is_read():
    class Reads(Stack):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            for block in self.blocks:
                x, keys = block(x)
                x = x + 0 * keys.mean()
            return x

    with pytest.raises(sw.SkipwayError, match=r"0 blocks that can be left out.*does not run without it"):
        shorten(Reads("tuple").eval(), PAIR, 1)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Layer()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.inner = nn.Linear(8, 12), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.lift(x) + self.inner(x)


class Cut(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return (x + super().forward(x))[:, 1:]


class InItsOwnForward(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Shared(), "block.output: it runs 3 times in a pass"),
        (nn.Sequential(Widening()), "0: its connection 0 carries x through a projection"),
        (nn.Sequential(Cut()), "0: it returns nothing shaped like the x that it is given"),
        (InItsOwnForward(), "the model: it adds in its own forward"),
    ],
)
def test_the_reason_is_given_for_each_block(model, reason):
    with pytest.raises(sw.SkipwayError, match=re.escape(reason)):
        sw.deepen(model.eval(), torch.randn(3, 5, 8), 1)
    with pytest.raises(sw.SkipwayError, match=re.escape(reason)):
        shorten(model, torch.randn(3, 5, 8), 1)


@pytest.mark.parametrize("by", [True, 1.0, "1", None])
def test_numbers_of_blocks_are_whole(by):
    model = Stack("bert").eval()
    for operate in (sw.deepen, shorten):
        with pytest.raises(sw.SkipwayError, match="the rule is a whole number of blocks"):
            operate(model, PAIR, by)


@needs_transformers
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_language_models_stay_causal_and_cached(name):
    model, example = foreign(name), example_for(name)
    before = model(**example).logits
    operation = deepened(model, example)
    assert operation.touched
    after = model(**example).logits
    assert not torch.allclose(after, before, atol=1e-4)
    other = {**example, "input_ids": torch.cat([IDS[:, :6], (IDS[:, 6:] + 1) % 60], 1)}
    changed = model(**other).logits
    torch.testing.assert_close(changed[:, :6], after[:, :6], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed[:, 6:], after[:, 6:], atol=1e-4)
    if model.config.use_cache and name != "MPT":
        key = "cache_params" if name == "Mamba" else "past_key_values"
        start = model(input_ids=IDS[:, :11], use_cache=True)
        step = model(input_ids=IDS[:, 11:], **{key: getattr(start, key)}).logits
        torch.testing.assert_close(step[:, -1], after[:, -1], rtol=1e-3, atol=1e-4)
    operation.undo(force=True)
    assert torch.equal(model(**example).logits, before)


@needs_transformers
@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_pairs_of_stacks(name):
    model, example = foreign(name), example_for(name)
    keys = list(model.state_dict())
    operation = deepened(model, example, 2)
    call = (lambda: model(**example)) if isinstance(example, dict) else lambda: model(example)
    call()[0].square().mean().backward()
    added = [p for p in model.parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
    assert added
    operation.undo(force=True)
    assert list(model.state_dict()) == keys


@needs_transformers
@pytest.mark.parametrize("by", [1, 2, 3, 4])
def test_a_block_with_more_weights_than_others_is_copied_last(by):
    model = foreign("T5", num_layers=3)  # the first block of each stack alone holds a table of positions
    operation = sw.deepen(model, example_for("T5"), by)
    assert not operation.touched.keys() & {"encoder.block.0", "decoder.block.0"}
    assert not operation.refused


@needs_transformers
def test_a_gain_that_counts_from_one_starts_silent_and_learns():
    model = foreign("Gemma 2")
    known = {id(parameter) for parameter in model.parameters()}
    sw.deepen(model, example_for("Gemma 2"), 1)
    model(**example_for("Gemma 2"), labels=IDS).loss.backward()
    new = {n: p for n, p in model.named_parameters() if id(p) not in known}
    silent = [
        p
        for n, p in new.items()
        if n.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"))
    ]
    assert len(silent) == 2
    assert all(torch.equal(p, torch.full_like(p, -1)) and p.grad is not None and p.grad.any() for p in silent)


def test_lesions_are_unaffected():
    model = Stack("positional").eval()
    operation = lesion(model, PAIR, ["blocks.1"])
    assert operation.touched == {"blocks.1": "blocks.1.down"}
