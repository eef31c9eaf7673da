"""Kind: a weight is computed in every pass (weight norm old and new, spectral norm, orthogonal, of the user's own), and
is taken for a parameter.

Operations do what they do elsewhere, or give an error of ours that names the module; the copy of a block starts silent
and learns from the first step on, by the factor of its weight that can be 0 or by a gain of its own.

| trial | input | right value |
|---|---|---|
| D6 | `x + wn(conv)(relu(wn(conv)(x)))` x 4, each norm, new and after a step | no raw error of any operation |
| D6 | the same, `deepen` | the output as before; a gradient that is not 0 at the end of each branch |
| D6 | `fold` | the same outputs |
| D6 | `checkpointed` with spectral norm, whose vectors move in every pass | equal gradients, the vectors moved once |
| D6 | a weight that its class computes from a parameter | the copy learns |
| D6 | gates and sums at the end of a branch: g(c) f(x), a(x) + b(x), experts in one tensor | the copy learns |
| meta | a model without values | refused before anything is changed, by name |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import skipway as sw
from skipway.surgery import checkpointed, influence, lesion, reversible, shorten, skip_compute

NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "older weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "older spectral norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:.*weight_norm` is deprecated")
X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.last = (norm(nn.Conv1d(8, 8, 3, padding=1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(x).relu())


def network(name: str, trained: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), *(Block(NORMS[name]) for _ in range(4)))
    if trained:  # the older norms keep a weight with a graph then
        model.train()(X).square().mean().backward()
        model.zero_grad()
    return model.eval()


OPERATIONS: dict[str, Callable[[nn.Module], object]] = {
    "deepen": lambda m: sw.deepen(m, X, 2),
    "shorten": lambda m: shorten(m, X, 2),
    "lesion": lambda m: lesion(m, X, ["1"]),
    "layerscale": lambda m: sw.rescheme(m, X, "layerscale"),
    "divide": lambda m: sw.rescheme(m, X, "skipinit(init=0.5)", start="divide"),
    "fixup": lambda m: sw.rescheme(m, X, "fixup"),
    "checkpointed": lambda m: checkpointed(m, X, 2),
    "reversible": lambda m: reversible(m, X),
    "skip_compute": lambda m: skip_compute(m, X, 0.5),
    "fuse": lambda m: sw.fuse(m),
}


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NORMS)
def test_no_raw_errors(name, operation, trained):
    model = network(name, trained)
    with suppress(sw.SkipwayError) if operation in {"divide", "fixup", "reversible"} else nullcontext():
        OPERATIONS[operation](model)


def assert_learns(model: nn.Module, example: tuple[Tensor, ...] | Tensor, twin: nn.Module) -> None:
    """A step along the gradient of the copy alone changes what the network computes."""
    call = (lambda: model(*example)) if isinstance(example, tuple) else lambda: model(example)
    before = call()
    loss = (before - torch.randn_like(before)).square().mean()
    parameters = list(twin.parameters())
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    moved = [(p, slope) for p, slope in zip(parameters, slopes, strict=True) if slope is not None and slope.any()]
    assert any(parameter.ndim != 1 or "gain" in str(type(twin)) for parameter, _ in moved)
    with torch.no_grad():
        for parameter, slope in moved:
            assert slope.isfinite().all()
            parameter.sub_(0.1 * slope)
    assert not torch.equal(call(), before)


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("name", NORMS)
def test_copies_start_silent_and_learn(name, trained):
    model = network(name, trained)
    before = model(X).detach()
    operation = sw.deepen(model, X, 1)
    torch.testing.assert_close(model(X), before)
    assert_learns(model, X, model.get_submodule(next(iter(operation.touched))).residual_scale)
    operation.undo(force=True)
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("name", NORMS)
def test_fused_networks_compute_the_same(name):
    model = network(name, trained=True)
    torch.testing.assert_close(sw.fuse(model)(X), model(X))


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", NORMS)
def test_recomputed_gradients_and_vectors_that_move(name, segments):
    model = network(name)
    twin = network(name)
    checkpointed(twin, X, segments)
    for each in (model, twin):
        each.train()(X).square().mean().backward()
    for (key, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, msg=key)
    for (key, own), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(other, own, msg=key)


class Doubled(nn.Linear):
    """A weight of the user's own: W + Wᵀ."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.weight.T, self.bias)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), Doubled(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x).sigmoid() * self.down(self.up(x).relu())


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.b(self.a(x).relu()) + self.c(x).relu())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 8, 8) / 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btc,ecd->bted", x, self.up).relu()
        return x + torch.einsum("bted,edc->btc", hidden, self.down)


@pytest.mark.parametrize("kind", [Own, Gated, Parallel, Experts])
def test_ends_of_branches(kind):
    x = torch.randn(2, 5, 8)
    model = nn.Sequential(*(kind() for _ in range(3))).eval()
    before = model(x).detach()
    operation = sw.deepen(model, x, 1)
    torch.testing.assert_close(model(x), before)
    assert_learns(model, x, model.get_submodule(next(iter(operation.touched))).residual_scale)


@pytest.mark.parametrize(
    "operate",
    [
        *(OPERATIONS[name] for name in ("deepen", "shorten", "checkpointed", "reversible", "skip_compute", "fuse")),
        lambda m: influence(m, X),
    ],
)
def test_models_without_values_are_refused_by_name(operate):
    with torch.device("meta"):
        model = network("weight norm")
    keys = list(model.state_dict())
    with pytest.raises(sw.SkipwayError, match="on the meta device"):
        operate(model)
    assert list(model.state_dict()) == keys
