"""Additions in forms that the table of operators did not know vanished without a trace, and lost their signs.

| trial | input | right value |
|---|---|---|
| D10 | `x - f(x)`, `-=`, `sub(alpha=)`, `rsub`, `x + (-f(x))` | 1 connection, sign −1, weights (1, −alpha) |
| D10 | `add(alpha=)`, `lerp` by a number or a parameter, `addcmul`, `addcdiv` | 1 connection, weights, parameters |
| D10 | `addmm`, `baddbmm` with a residual as the first operand | 1 connection, ends in the layer of the matrix |
| D9 | `index_add`, `scatter_add`, `scatter_reduce`, `index_put(accumulate)`: mixture of depths | 1 connection |
| D10 | sum or mean over a stack or a `cat` of unsqueezed tensors, `einsum` sums, Python's `sum` | 1 connection |
| D10 | Highway with a learned gate; with gates from the input, GRU cells | 1 connection; refused as gated |
| D10 | `f(x) - x`, as in PoolFormer's mixer | refused: a difference |
| D10 | `where`, `scatter` and `index_put` that replace | refused: selected |
| D10 | a weighted sum over a stack whose weights cannot be told | refused: joined |
| D10 | foreign operators, `_foreach_add` | refused: unknown operator NAME |
| D10 | `cat` followed by a map | nothing is added |
| D10 | DnCNN, its blocks trained | 1 connection over the network, sign −1 |
| – | lesion, multiply_, rescheme at each form | what theory gives: y = a x, b F doubled, unchanged |
| – | what a probe reads | the operands as they are added, with sign and weights |
| D9 | training adds by `index_add`, evaluation by `+` | the connections are found in both modes |
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import skipway as sw
from skipway.probes import Observer
from skipway.surgery import lesion, rescheme
from skipway.tracing import watch
from skipway.tracing.chain import chain_from_program

N, C = 4, 8


class Net(nn.Module):
    """Parts that each form of addition may use."""

    def __init__(self, form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C))
        self.last = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C)
        self.g = nn.Parameter(torch.rand(C) + 0.5)
        self.two = nn.Parameter(torch.tensor([0.3, 0.6]))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def subtracted_in_place(m, x):
    y = x.clone()
    y -= m.f(x)
    return y


def highway(m, x):
    t = m.g.sigmoid()
    return t * m.f(x) + (1 - t) * x


def rows(x: Tensor) -> Tensor:
    return torch.arange(2, device=x.device)


def index_of(x: Tensor) -> Tensor:
    return rows(x)[:, None].expand(2, C)


def added_in_place(m, x):
    y = x.clone()
    y.index_put_((rows(x),), m.f(x[:2]), accumulate=True)
    return y


def padded(x: Tensor) -> Tensor:
    """The first two rows of x above zeros."""
    return torch.cat([x[:2], torch.zeros_like(x[2:])])


# form: (forward, weights, what is added for the skip and for the branch)
X, F = (lambda m, x: x), (lambda m, x: m.f(x))
FORMS = {
    "x + f": (lambda m, x: x + m.f(x), (1, 1), X, F),
    "x - f": (lambda m, x: x - m.f(x), (1, -1), X, lambda m, x: -m.f(x)),
    "-=": (subtracted_in_place, (1, -1), X, lambda m, x: -m.f(x)),
    "x + (-f)": (lambda m, x: x + (-m.f(x)), (1, -1), X, lambda m, x: -m.f(x)),
    "sub alpha": (lambda m, x: torch.sub(x, m.f(x), alpha=0.5), (1, -0.5), X, lambda m, x: -0.5 * m.f(x)),
    "subtract": (lambda m, x: torch.subtract(input=x, other=m.f(x)), (1, -1), X, lambda m, x: -m.f(x)),
    "rsub": (lambda m, x: torch.rsub(m.f(x), x), (1, -1), X, lambda m, x: -m.f(x)),
    "add alpha": (lambda m, x: torch.add(x, m.f(x), alpha=0.5), (1, 0.5), X, lambda m, x: 0.5 * m.f(x)),
    "lerp": (lambda m, x: torch.lerp(x, m.f(x), 0.25), (0.75, 0.25), lambda m, x: 0.75 * x, lambda m, x: m.f(x) / 4),
    "lerp reversed": (
        lambda m, x: m.f(x).lerp(x, 0.75),
        (0.75, 0.25),
        lambda m, x: 0.75 * x,
        lambda m, x: m.f(x) / 4,
    ),
    "lerp learned": (
        lambda m, x: torch.lerp(x, m.f(x), m.g),
        (1, 1),
        lambda m, x: (1 - m.g) * x,
        lambda m, x: m.g * m.f(x),
    ),
    "addcmul": (lambda m, x: torch.addcmul(x, m.g, m.f(x), value=2), (1, 2), X, lambda m, x: 2 * m.g * m.f(x)),
    "addcdiv": (lambda m, x: torch.addcdiv(x, m.f(x), m.g), (1, 1), X, lambda m, x: m.f(x) / m.g),
    "addmm": (
        lambda m, x: torch.addmm(x, m.f(x), m.last.weight, beta=2, alpha=0.5),
        (2, 0.5),
        lambda m, x: 2 * x,
        lambda m, x: m.f(x) @ m.last.weight / 2,
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x[None], m.f(x)[None], m.last.weight[None])[0],
        (1, 1),
        lambda m, x: x[None],
        lambda m, x: (m.f(x) @ m.last.weight)[None],
    ),
    "index_add": (
        lambda m, x: torch.index_add(x, 0, rows(x), m.f(x[:2]), alpha=3),
        (1, 3),
        X,
        lambda m, x: 3 * padded(m.f(x)),
    ),
    "scatter_add": (lambda m, x: x.scatter_add(0, index_of(x), m.f(x[:2])), (1, 1), X, lambda m, x: padded(m.f(x))),
    "scatter_reduce": (
        lambda m, x: x.scatter_reduce(0, index_of(x), m.f(x[:2]), "sum"),
        (1, 1),
        X,
        lambda m, x: padded(m.f(x)),
    ),
    "index_put_": (added_in_place, (1, 1), X, lambda m, x: padded(m.f(x))),
    "stack sum": (lambda m, x: torch.stack([x, m.f(x)]).sum(0), (1, 1), X, F),
    "stack mean": (
        lambda m, x: torch.stack([m.f(x), x], dim=-1).mean(dim=-1),
        (0.5, 0.5),
        lambda m, x: x / 2,
        lambda m, x: m.f(x) / 2,
    ),
    "cat sum": (lambda m, x: torch.cat([x[None], m.f(x)[None]]).sum(0), (1, 1), X, F),
    "cat, view, sum": (lambda m, x: torch.cat([x, m.f(x)], 1).view(N, 2, C).sum(1), (1, 1), X, F),
    "map of a stack": (
        lambda m, x: functional.linear(torch.stack([x, m.f(x)], -1), m.two[None])[..., 0],
        (1, 1),
        None,
        None,
    ),
    "sum of a list": (lambda m, x: sum([x, m.f(x)]), (1, 1), X, F),
    "einsum": (lambda m, x: torch.einsum("nbd->bd", torch.stack([x, m.f(x)])), (1, 1), None, None),
    "einsum weighted": (lambda m, x: torch.einsum("n,nbd->bd", m.two, torch.stack([x, m.f(x)])), (1, 1), None, None),
    "highway learned": (
        highway,
        (1, 1),
        lambda m, x: (1 - m.g.sigmoid()) * x,
        lambda m, x: m.g.sigmoid() * m.f(x),
    ),
}
PARAMETERS = {  # of the skip and of the branch
    "lerp learned": (("g",), ("g",)),
    "addcmul": ((), ("g",)),
    "addcdiv": ((), ("g",)),
    "einsum weighted": (("two",), ("two",)),
    "map of a stack": (("two",), ("two",)),
    "highway learned": (("g",), ("g",)),
}


def example() -> Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FORMS)
def test_an_addition_is_found_in_any_form(name):
    form, weights, *_ = FORMS[name]
    chain = sw.chain(Net(form), example())
    assert (len(chain), chain.refused) == (1, ())
    seen = chain[0].seen
    assert seen.weights == pytest.approx(weights)
    assert seen.sign == (-1 if weights[1] < 0 else 1)
    assert seen.skip == "identity"
    scale = () if seen.scale is None else seen.scale.parameters
    assert (seen.carry, scale) == PARAMETERS.get(name, ((), ()))
    assert seen.ends == (("last",) if "addmm" in name or "baddbmm" in name else ("f.2",))
    assert ("−" in str(chain[0]).split("·")[0]) == (seen.sign < 0)


class Operands(Observer):
    """Keeps what is added."""

    def operands(self, connection, skip, branch):
        self.kept = skip.detach().clone(), branch.detach().clone()

    def stream(self, connection, stream):
        self.sum = stream.detach().clone()


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form[2] is not None])
def test_a_probe_reads_what_is_added_with_its_sign(name):
    form, _, skip, branch = FORMS[name]
    net, x = Net(form).eval(), example()
    expected = net(x)
    with Operands(net, sw.chain(net, x)) as observer:
        assert torch.equal(net(x), expected)  # bit for bit what it computes without
    torch.testing.assert_close(observer.kept[0], skip(net, x))
    torch.testing.assert_close(observer.kept[1], branch(net, x))
    torch.testing.assert_close(observer.kept[0] + observer.kept[1], observer.sum)


@pytest.mark.parametrize("name", FORMS)
def test_multiplying_the_branch_keeps_its_sign(name):
    net, x = Net(FORMS[name][0]).eval(), example()
    (connection,) = sw.chain(net, x)
    before = net(x)
    connection.multiply_(0.0)
    skip = net(x)  # the skip's share alone
    net = Net(FORMS[name][0]).eval()
    (connection,) = sw.chain(net, x)
    connection.multiply_(2.0)
    torch.testing.assert_close(net(x) - skip, 2 * (before - skip))


DRESSED = [name for name in FORMS if "addmm" not in name and "baddbmm" not in name]


@pytest.mark.parametrize("name", DRESSED)
def test_operations_keep_the_sign(name):
    form, (carry, _), *_ = FORMS[name]
    net, x = Net(form).eval(), example()
    net.f = Wrapped(net.f)
    before = net(x)
    operation = lesion(net, x, [""])
    if name not in PARAMETERS or not PARAMETERS[name][0]:
        torch.testing.assert_close(net(x), carry * x)
    skip = net(x)
    operation.undo()
    assert torch.equal(net(x), before)
    operation = rescheme(net, x, "layerscale")
    assert operation.report["difference"] < 1e-6
    with torch.no_grad():
        net.get_parameter("f.residual_scale.gain").fill_(3.0)
    torch.testing.assert_close(net(x) - skip, 3 * (before - skip))


class Wrapped(nn.Module):
    """A module of its own around a container."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def gated(m, x):
    t = m.gate(x).sigmoid()
    return t * m.f(x) + (1 - t) * x


def gru(m, x):
    z, n = m.gate(x).sigmoid(), m.f(x).tanh()
    return (1 - z) * n + z * x


REFUSED = {
    "gated": [gated, gru, lambda m, x: torch.lerp(x, m.f(x), m.gate(x).sigmoid())],
    "difference": [lambda m, x: m.f(x) - x, lambda m, x: functional.avg_pool1d(x, 3, 1, 1) - x],
    "selected": [
        lambda m, x: torch.where(x > 0, x, m.f(x)),
        lambda m, x: x.scatter(0, index_of(x), m.f(x[:2])),
        lambda m, x: x.index_put((rows(x),), m.f(x[:2])),
        lambda m, x: x.index_copy(0, rows(x), m.f(x[:2])),
    ],
    "joined": [
        lambda m, x: (torch.stack([x, m.f(x)]) * m.two[:, None, None]).sum(0),
        lambda m, x: torch.einsum("bn,nbd->bd", m.gate(x)[:, :2], torch.stack([x, m.f(x)])),
        lambda m, x: functional.linear(torch.stack([x, m.f(x)], -1), m.two[None], m.two[:1])[..., 0],
        lambda m, x: torch.stack([x, m.f(x)]).cumsum(0)[1],
    ],
    "unknown": [lambda m, x: torch._foreach_add([x], [m.f(x)])[0], lambda m, x: torch.ldexp(x, m.f(x))],
    "parallel": [lambda m, x: m.f(x) + m.gate(x).relu(), lambda m, x: m.f(x) - m.gate(x).relu()],
    "broadcast": [lambda m, x: x - m.gate(x).relu().mean(1, keepdim=True)],
    "rotary": [lambda m, x: x - m.g * x.roll(1, 0), lambda m, x: x + (x.roll(1, 0) - x) * m.g],
    "constant": [lambda m, x: m.f(x - m.g), lambda m, x: m.f(torch.addcmul(m.g, m.g, x))],
}


@pytest.mark.parametrize(("reason", "form"), [(reason, form) for reason, forms in REFUSED.items() for form in forms])
def test_what_is_no_connection_is_listed_with_its_reason(reason, form):
    chain = sw.chain(Net(form), example())
    assert len(chain) == 0
    assert {refusal.reason for refusal in chain.refused} == {reason}


@torch.library.custom_op("skipway_trials::join", mutates_args=())
def join(x: Tensor, y: Tensor) -> Tensor:
    """An operator that nobody knows."""
    return x + y


@join.register_fake
def _(x, y):
    return torch.empty_like(x)


def test_an_unknown_operator_is_named():
    chain = sw.chain(Net(lambda m, x: join(x, m.f(x))), example())
    assert len(chain) == 0
    assert "unknown operator join" in str(chain.refused[0])


@pytest.mark.parametrize(
    "form",
    [
        lambda m, x: functional.linear(torch.cat([x, m.f(x)], -1), m.last.weight.repeat(1, 2)),
        lambda m, x: torch.maximum(x, m.f(x)),
        lambda m, x: x * m.f(x),
        lambda m, x: m.f(x).mean(0),
    ],
)
def test_what_adds_nothing_is_not_listed(form):
    chain = sw.chain(Net(form), example())
    assert (len(chain), chain.refused) == (0, ())


def test_a_stack_of_three_is_two_connections_which_a_probe_tells_apart():
    net, x = Net(lambda m, x: torch.stack([x, m.f(x), m.gate(x).relu()]).sum(0)), example()
    chain = sw.chain(net, x)
    assert [connection.seen.ends for connection in chain] == [("f.2",), ("gate",)]
    kept = {}

    class Each(Observer):
        def operands(self, connection, skip, branch):
            kept[connection.name] = skip.detach(), branch.detach()

    with Each(net, chain):
        net(x)
    torch.testing.assert_close(kept[":1"], (x, net.f(x).detach()))
    torch.testing.assert_close(kept[":2"], ((x + net.f(x)).detach(), net.gate(x).relu().detach()))


def test_dncnn_is_one_connection_that_is_subtracted():
    class DnCNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = [layer for _ in range(3) for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())]
            self.net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(6, 1, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.net(x)

    chain = sw.chain(DnCNN(), torch.randn(2, 1, 8, 8))
    assert [(c.seen.skip, c.seen.sign, c.seen.channel) for c in chain] == [("identity", -1, 1)]


class Sparse(nn.Module):
    """Stochastic depth that computes a part of the samples in training."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.f(x)
        index = torch.randperm(len(x), device=x.device)[: len(x) // 2]
        return torch.index_add(x, 0, index, self.f(x[index]), alpha=2.0)


def test_connections_are_found_in_both_modes():
    net = nn.Sequential(*(Sparse() for _ in range(12)), nn.Linear(C, 3))
    x = torch.randn(64, C)
    for training in (True, False):
        assert len(chain_from_program(net, watch(net, x, training=training))) == 12
    assert len(sw.diagnose(net, x, targets=torch.randint(3, (64,)), allowance=0.0, remedies=0).chain) == 12


def test_a_sum_of_two_numbers_is_no_connection():
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(1, 1)

        def forward(self, x):
            x = x + self.a(x)
            z = x.mean()
            return z + self.b(z.view(1)).tanh().squeeze()

    found = sw.chain(Losses(), torch.randn(8, 8))
    assert len(found) == 1
    assert [each.reason for each in found.refused] == ["scalar"]
