"""Additions of language models that are no residual connections, and one that is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import skipway as sw
from skipway.tracing import watch
from skipway.tracing.chain import chain_from_program

TOKENS, DIM, VOCABULARY = 6, 8, 11


class Net(nn.Module):
    """An embedding and a block around what is tested."""

    def __init__(self, form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.other = nn.Embedding(VOCABULARY, DIM), nn.Embedding(VOCABULARY, DIM)
        self.keys, self.values, self.router = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 4)
        self.f = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM))
        self.register_buffer("range", torch.zeros(1))
        self.form = form

    def forward(self, ids: Tensor) -> Tensor:
        return self.form(self, self.table(ids), ids)


def delta_rule(m, x, ids):
    """S + k (v − k S), one token after the other."""
    state = x.new_zeros(x.shape[0], DIM, DIM)
    for key, value in zip(m.keys(x).unbind(1), m.values(x).unbind(1), strict=True):
        state = state + key[:, :, None] * (value - (state * key[:, :, None]).sum(1))[:, None]
    return state


def delta_rule_by_matrices(m, x, ids):
    state = x.new_zeros(x.shape[0], DIM, DIM)
    for key, value in zip(m.keys(x).split(1, 1), m.values(x).split(1, 1), strict=True):
        state = state + key.mT @ (value - key @ state)
    return state


def solver(m, x, ids):
    """Rows of (1 − A)⁻¹, as in the chunks of gated delta networks."""
    key = m.keys(x)
    scores = (key @ key.mT).exp().tril(-1)
    for i in range(1, TOKENS):
        row, above = scores[..., i, :i].clone(), scores[..., :i, :i].clone()
        scores[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return scores @ m.values(x)


def two_gates(m, x, ids):
    """The probabilities of the two experts that are chosen, within what they can take."""
    scores = m.router(x).flatten(0, 1).softmax(-1)
    best = functional.one_hot(scores.argmax(-1), 4)
    second = functional.one_hot(scores.masked_fill(best.bool(), -torch.inf).argmax(-1), 4)
    best = best * (best.cumsum(0) - 1 < 4)
    second = second * (second.cumsum(0) - 1 < 4)
    first, next_one = (scores * best).sum(1), (scores * second).sum(1)
    total = (first + next_one).clamp(min=1e-6)
    return (first / total)[:, None] * best + (next_one / total)[:, None] * second


def value_embedding(m, x, ids):
    return m.values(m.f(x)).relu() + m.other(ids)


def padded_choice(m, x, ids):
    """Scores with a mask of padded and later tokens, from which the highest are chosen."""
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=ids.device).triu(1)
    seen = ids.bool()[:, None, :] & ~later
    mask = torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, -1e9)
    return (m.keys(x) @ m.values(x).mT + mask).topk(2).values


REFUSED = {
    "rotary": [delta_rule, delta_rule_by_matrices],
    "broadcast": [two_gates],
    "unrelated": [value_embedding],
    "constant": [padded_choice],
}


@pytest.mark.parametrize(("reason", "form"), [(reason, form) for reason, forms in REFUSED.items() for form in forms])
def test_what_is_no_connection_is_refused(reason, form):
    chain = sw.chain(Net(form), torch.randint(1, VOCABULARY, (2, TOKENS)))
    assert [str(connection) for connection in chain] == []
    assert reason in {refusal.reason for refusal in chain.refused}


def test_a_solver_of_rows_is_no_connection():
    chain = sw.chain(Net(solver), torch.randint(1, VOCABULARY, (2, TOKENS)))
    assert (len(chain), [each.reason for each in chain.refused].count("rotary")) == (0, TOKENS - 1)


def test_a_range_of_activations_is_no_stream():
    """A running maximum of a stream that is read twice."""

    def form(m, x, ids):
        for _ in range(2):
            m.range = 0.5 * m.range + 0.5 * x.max()
            x = m.f(x)
        return x

    program = watch(net := Net(form), torch.randint(1, VOCABULARY, (2, TOKENS)), training=True)
    assert len(chain_from_program(net, program)) == 0


@pytest.mark.parametrize("copies", ["cat", "repeat", "stack"])
def test_both_halves_of_copies_are_carried(copies):
    """The first layer of a reversible network, whose halves are one tensor twice."""

    def form(m, x, ids):
        both = {"cat": torch.cat([x, x], -1), "repeat": x.repeat(1, 1, 2), "stack": torch.stack([x, x], -2).flatten(2)}
        first, second = both[copies].chunk(2, -1)
        first = first + m.f(second)
        second = second + m.f(first)
        return torch.cat([first, second], -1)

    assert len(sw.chain(Net(form), torch.randint(1, VOCABULARY, (2, TOKENS)))) == 2
