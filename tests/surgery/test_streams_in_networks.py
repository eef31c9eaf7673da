"""Several streams in networks of others: equal at the start, the paper's equations after it, undone to the bit."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import skipway as sw
from skipway.nn import AttentionRead, HyperConnection, StreamExit
from skipway.schemes import all_schemes, parse_scheme
from skipway.schemes.scheme import has_streams
from skipway.surgery import rescheme
from skipway.surgery.stream_slots import StreamedBlock

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
TRANSFORMERS = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
REFUSED = ("valueresiduals", "dualresidual", "siamesenorm")
STREAMED = [name for name, scheme in all_schemes().items() if has_streams(scheme()) and name not in REFUSED]


class Block(nn.Module):
    """A pre-norm block: two connections y = x + c · drop(F(norm(x)))."""

    def __init__(self, factor: float = 1.0, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.one, self.norm2, self.two = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.factor, self.drop = factor, drop

    def branch(self, norm: nn.Module, x: Tensor, fc: nn.Module) -> Tensor:
        f = F.dropout(fc(norm(x)), self.drop, self.training) if self.drop else fc(norm(x))
        return f if self.factor == 1 else self.factor * f

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(self.norm1, x, self.one)
        return x + self.branch(self.norm2, x, self.two)


class Net(nn.Module):
    def __init__(self, checkpointed: bool | None = None, **options: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.norm, self.head, self.checkpointed = nn.LayerNorm(8), nn.Linear(8, 4), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return self.head(self.norm(x))


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "residual_" in name}


@torch.no_grad()
def draw_(model: nn.Module) -> None:
    torch.manual_seed(3)
    for parameter in new_parameters(model).values():
        parameter.add_(0.3 * torch.randn_like(parameter))


def hyper_connected(streams: list[Tensor], static: Tensor, branch) -> list[Tensor]:
    """Zhu et al. 2025, eq. 2-5, stream by stream: columns of `static` are A_m, A_r and B."""
    n = len(streams)
    f = branch(sum(static[i, 0] * streams[i] for i in range(n)))
    return [sum(static[i, 1 + j] * streams[i] for i in range(n)) + static[j, n + 1] * f for j in range(n)]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_with_any_weights_the_network_computes_the_papers_equations(factor):
    """A factor behind the last module leaves the block as one branch, block(x) − x."""
    net, twin = Net(factor=factor).eval(), Net(factor=factor).eval()
    operation = rescheme(net, X, "hyperconnections(3, dynamic=False)")
    torch.testing.assert_close(net(X), twin(X), atol=1e-6, rtol=1e-6)
    draw_(net)
    statics = iter(module.static for module in net.modules() if isinstance(module, HyperConnection))
    streams = [X] * 3
    for block in twin.blocks:
        if factor == 1:
            streams = hyper_connected(streams, next(statics), lambda x: block.one(block.norm1(x)))  # noqa: B023
            streams = hyper_connected(streams, next(statics), lambda x: block.two(block.norm2(x)))  # noqa: B023
        else:
            assert operation.touched["blocks.0:1"].startswith("blocks.0, as one branch")
            streams = hyper_connected(streams, next(statics), lambda x: block(x) - x)  # noqa: B023
    assert next(statics, None) is None
    expected = twin.head(twin.norm(sum(streams) / 3))
    torch.testing.assert_close(net(X), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, twin(X), atol=0.05)


def attended(sources: list[Tensor], query: Tensor | None) -> Tensor:
    """Kimi Team 2026, eq. 2-4, times the number of sources."""
    if query is None:
        return sources[0]
    keys = [(v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ query for v in sources]
    weights = torch.stack(keys).softmax(0)
    return len(sources) * sum(weight.unsqueeze(-1) * v for weight, v in zip(weights, sources, strict=True))


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("blocks", [None, 2])
def test_with_any_queries_the_network_attends_to_its_earlier_outputs(blocks, factor):
    """Sources are the stem and all branches (eq. 1), or the stem and sums over blocks of branches (eq. 5 and 6)."""
    net, twin = Net(factor=factor).eval(), Net(factor=factor).eval()
    rescheme(net, X, f"attentionresiduals(blocks={blocks})")
    torch.testing.assert_close(net(X), twin(X), atol=1e-5, rtol=1e-5)
    draw_(net)
    queries = iter([None, *(module.query for module in net.modules() if isinstance(module, AttentionRead))])
    branches: list = []
    for block in twin.blocks:
        if factor == 1:
            branches.append(lambda x, block=block: block.one(block.norm1(x)))
            branches.append(lambda x, block=block: block.two(block.norm2(x)))
        else:
            branches.append(lambda x, block=block: block(x) - x)
    size = 1 if blocks is None else len(branches) // blocks
    sources = [X]
    for number, branch in enumerate(branches):
        f = branch(attended(sources, next(queries)))
        sources = [*sources, f] if number % size == 0 else [*sources[:-1], sources[-1] + f]
    expected = twin.head(twin.norm(attended(sources, next(queries))))
    assert next(queries, None) is None
    torch.testing.assert_close(net(X), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, twin(X), atol=0.02)


def test_earlier_outputs_stay_apart_from_norms_after_the_addition():
    """A post-norm block normalises what is in the stream, which here would be all earlier outputs: it is one branch."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    operation = rescheme(model, X, "denseformer")
    assert all("as one branch" in words for words in operation.touched.values())


@pytest.mark.parametrize("start", ["identity", "scheme"])
@pytest.mark.parametrize("scheme", REFUSED)
def test_a_scheme_that_needs_other_forwards_is_refused(scheme, start):
    """Values inside of an attention, and norms between the connections."""
    net = Net().eval()
    with pytest.raises(sw.SkipwayError, match="inside of a branch|norms between the connections"):
        rescheme(net, X, scheme, start=start)
    assert not new_parameters(net)


@pytest.mark.parametrize("scheme", STREAMED)
def test_the_start_is_equal_and_every_new_parameter_learns(scheme):
    """Gradients within two steps, and streams that do not stay equal (P38)."""
    net = Net().eval()
    before = net(X).detach()
    rescheme(net, X, scheme)
    assert float((net(X) - before).detach().abs().max()) <= 1e-5 * float(before.abs().max())
    new, learned = new_parameters(net), set()
    optimizer = torch.optim.AdamW(sw.param_groups(net, X, lr=1e-2, weight_decay=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        learned |= {name for name, p in new.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert learned == set(new)
    if parse_scheme(scheme).open() is None:
        return
    seen: list[Tensor] = []
    net.blocks[1].norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(X)
    first, *others = seen[0].chunk(parse_scheme(scheme).open().count)
    assert all(float((first - other).detach().abs().max()) > 1e-4 for other in others)


def test_static_parameters_are_not_decayed():
    net = Net().eval()
    rescheme(net, X, "hyperconnections(2)")
    groups = sw.param_groups(net, X, lr=1.0, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2]: decay[id(p)] for name, p in
             new_parameters(net).items()}  # fmt: skip
    assert {name for name, value in found.items() if value} == {"map.weight"}


def test_undo_after_training_copies_and_files():
    net, twin = Net().eval(), Net().eval()
    keys, kinds = list(net.state_dict()), [type(module) for module in net.modules()]
    operation = rescheme(net, X, "hyperconnections(2)")
    for parameter in (p for name, p in net.named_parameters() if "residual_" not in name):
        parameter.requires_grad_(False)
    draw_(net)
    out = net(X)
    assert torch.equal(copy.deepcopy(net)(X), out)
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), out)
    other = Net().eval()
    rescheme(other, X, "hyperconnections(2)")
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), out)
    with pytest.raises(sw.SkipwayError, match="changed since"):
        operation.undo()
    operation.undo(force=True)
    assert list(net.state_dict()) == keys
    assert [type(module) for module in net.modules()] == kinds
    assert torch.equal(net(X), twin(X))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_have_the_same_gradients(reentrant):
    found = []
    for checkpointed in (None, reentrant):
        net = Net(checkpointed)
        rescheme(net, X, "hyperconnections(2)")
        draw_(net)
        net.train()(X.clone().requires_grad_()).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_threads_compiled_graphs_and_parts_alone():
    net = Net().eval()
    rescheme(net, X, "hyperconnections(2)")
    draw_(net)
    with torch.no_grad():
        out, same = net(X), []
        work = [threading.Thread(target=lambda: same.append(torch.equal(net(X), out))) for _ in range(3)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert same == [True] * 3
        assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(X), out)
    with pytest.raises(sw.SkipwayError, match="without its beginning"):
        net.blocks[0].one(X)


def test_dropout_written_behind_the_last_module_makes_the_block_one_branch():
    """In evaluation it is not there; in training it would drop what is written into each stream by itself."""
    for choices in ({}, {"start": "scheme"}, {"tolerance": math.inf}):
        operation = rescheme(Net(drop=0.05).eval(), X, "hyperconnections(2)", **choices)
        assert all("as one branch" in words for words in operation.touched.values())


@pytest.mark.parametrize(
    ("scheme", "norm_first", "words"),
    [
        ("gatedstreams", False, "every branch begins with a norm"),
        ("hyperconnections + stochasticdepth", True, "give 'hyperconnections(.*)' alone"),
    ],
)
def test_what_is_refused(scheme, norm_first, words):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    keys = list(model.state_dict())
    with pytest.raises(sw.SkipwayError, match=words):
        rescheme(model, X, scheme)
    assert list(model.state_dict()) == keys


@TRANSFORMERS
def test_generate_continues_with_the_same_tokens_and_its_cache_holds_one_stream():
    from benchmarks.surgery.foreign_networks import build

    model, example = build("Qwen3")
    choices = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = example["input_ids"][:, :4]
    before = model.eval().generate(ids, **choices)
    rescheme(model, example, "hyperconnections(2)")
    assert torch.equal(model.generate(ids, **choices), before)
    draw_(model)
    assert torch.equal(model.generate(ids, **choices), model.generate(ids, use_cache=False, **choices))


@TRANSFORMERS
def test_hidden_states_that_the_example_asks_for_stay_as_they_were():
    """A row ends where a block's output is read by the model itself, so that streams never come out."""
    from benchmarks.surgery.foreign_networks import build

    model, example = build("ViT of transformers")
    model.eval()
    example = {"pixel_values": example, "output_hidden_states": True}
    before = [each.shape for each in model(**example).hidden_states]
    rescheme(model, example, "hyperconnections(2)")
    assert [each.shape for each in model(**example).hidden_states] == before


def test_streams_travel_between_the_blocks_of_a_row_alone():
    net = Net().eval()
    rescheme(net, X, "hyperconnections(2)")
    slots = [module for module in net.modules() if isinstance(module, StreamedBlock)]
    assert [(slot.first is None, slot.last is None) for slot in slots] == [(False, True), (True, False)]
    assert isinstance(slots[1].last, StreamExit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_schemes_go_before_and_nothing_after(dtype):
    """A scale stays between a branch and where it is written; gradients of bfloat16 are equal up to its rounding."""
    net, x = Net().to(dtype).eval(), X.to(dtype)
    first = rescheme(net, x, "layerscale")
    operation = rescheme(net, x, "hyperconnections(2)")
    assert operation.touched["blocks.0:1"] == "blocks.0.norm1 to blocks.0.one.residual_scale"
    for again in (lambda: rescheme(net, x, "hyperconnections(2)"), lambda: sw.shorten(net, x, 1)):
        with pytest.raises(sw.SkipwayError, match="several streams run through it"):
            again()
    operation.undo()
    first.undo()
    assert not new_parameters(net)
