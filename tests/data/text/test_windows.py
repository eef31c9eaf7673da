"""Windows: every target once, batches as functions of (seed, epoch, step), disjoint ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from skipway.data.text import IGNORED, load_text
from skipway.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text in which every pair of neighbours occurs once (a de Bruijn sequence), so that a pair is a target."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    numbers = [each for i in range(32) for each in (i, *(n for j in range(i + 1, 32) for n in (i, j)))]
    path.write_text("".join(chr(0x4E00 + number) for number in numbers), encoding="utf-8")
    return load_text(path, tokenizer="chars", context=16, holdout=0.1, validation=0.1)


def scored(batches):
    """How often each (input, target) is scored."""
    found = Counter()
    for ids, targets in batches:
        on = targets != IGNORED
        found.update(zip(ids[on].tolist(), targets[on].tolist(), strict=True))
    return found


def pairs(split):
    return Counter(itertools.pairwise(split.tokens.tolist()))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50, 700])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_packed_pass_scores_every_target_once(data, batch_size, epoch):
    batches = [data.train_batch(epoch, step, batch_size) for step in range(data.steps(batch_size))]
    assert {each.shape for pair in batches for each in pair} == {(batch_size, 16)}
    assert scored(batches) == pairs(data.train)
    # no more steps than are needed, and no row of a batch is empty
    assert len(batches) == -(-data.train.targets // (16 * batch_size))
    assert all((targets != IGNORED).any(1).all() for _, targets in batches)


def test_packed_windows_are_contiguous_text_but_around_the_end(data):
    follows = dict(pairs(data.train))
    around = (int(data.train.tokens[-2]), int(data.train.tokens[0]))
    breaks = 0
    for step in range(data.steps(4)):
        ids, _ = data.train_batch(0, step, 4)
        for row in ids.tolist():
            steps = list(itertools.pairwise(row))
            breaks += sum(step not in follows for step in steps)
            assert all(step in follows or step == around for step in steps)
    assert breaks <= 2


@pytest.mark.parametrize("sampling", ["packed", "random"])
def test_a_batch_is_a_function_of_seed_epoch_and_step(data, sampling):
    one, two = replace(data, sampling=sampling), replace(data, sampling=sampling)
    want = [one.train_batch(epoch, step, 6) for epoch in (0, 1) for step in range(one.steps(6))]
    order = [(epoch, step) for epoch in (0, 1) for step in range(two.steps(6))]
    for number in reversed(range(len(order))):
        got = two.train_batch(*order[number], 6)
        assert all(torch.equal(a, b) for a, b in zip(got, want[number], strict=True))
    assert not torch.equal(want[0][0], want[one.steps(6)][0])
    assert not torch.equal(want[0][0], replace(one, seed=1).train_batch(0, 0, 6)[0])
    assert torch.equal(replace(one, seed=1).train_batch(0, 0, 6, seed=0)[0], want[0][0])


@pytest.mark.parametrize("sampling", ["packed", "random"])
def test_ranks_are_disjoint_parts_of_the_batch(data, sampling):
    data = replace(data, sampling=sampling)
    ids, targets = data.train_batch(1, 2, 6)
    shares = [data.train_batch(1, 2, 6, rank=rank, world=3) for rank in range(3)]
    assert torch.equal(torch.cat([share[0] for share in shares]), ids)
    assert torch.equal(torch.cat([share[1] for share in shares]), targets)


def test_random_windows_are_those_of_nanogpt(data):
    """`randint(len(data) - block_size)` starts, whose targets are the ids one further; every start can be drawn."""
    data = replace(data, sampling="random")
    place = {pair: number for number, pair in enumerate(itertools.pairwise(data.train.tokens.tolist()))}
    starts = set()
    for epoch in range(60):
        ids, targets = data.train_batch(epoch, 0, 500)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        starts |= {place[pair] for pair in map(tuple, ids[:, :2].tolist())}
    assert starts == set(range(len(data.train) - 16))
    assert data.steps(8) == data.train.targets // (16 * 8)


@pytest.mark.parametrize("stride", [None, 16, 5, 1])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_scores_every_target_once(data, stride, world):
    ranks = [
        list(data.evaluation_batches("validation", 4, stride=stride, rank=rank, world=world)) for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {each.shape for batches in ranks for pair in batches for each in pair} == {(4 // world, 16)}
    assert scored([pair for batches in ranks for pair in batches]) == pairs(data.validation)


def test_a_stride_gives_every_target_context(data):
    """But for those of the first window, context - stride positions come before the first target that is scored."""
    for number, (_, targets) in enumerate(data.evaluation_batches("test", 1, stride=4)):
        assert int((targets[0] == IGNORED).sum()) >= (12 if number else 0)
        assert bool((targets[0, -1] != IGNORED).item())


def test_evaluation_goes_on_where_it_stopped(data):
    batches = list(data.evaluation_batches("validation", 2))
    rest = list(data.evaluation_batches("validation", 2, start=2))
    assert len(rest) == len(batches) - 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, batches[2:], strict=True))


def test_a_split_shorter_than_the_context_is_scored_without_what_follows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 20)
    data = load_text(path, context=64, holdout=0.1, validation=0.05)
    assert any("validation text has 9 tokens" in remark for remark in data.remarks)
    ((ids, targets),) = data.evaluation_batches("validation", 2)
    assert int((targets != IGNORED).sum()) == data.validation.targets == 8
    assert ids[0, :8].tolist() == data.validation.tokens[:-1].tolist()
    assert targets[0, :8].tolist() == data.validation.tokens[1:].tolist()


def test_ids_are_counted(data, monkeypatch):
    monkeypatch.setattr("skipway.data.text.token_split.CHUNK", 7)
    counts = Counter(data.train.tokens.tolist())
    assert data.train.id_counts(40).tolist() == [counts[number] for number in range(40)]


def test_bits_per_byte_of_a_uniform_guess(data):
    """log2 of the vocabulary for each token, over bytes: these characters have three."""
    nats = data.test.targets * np.log(data.tokenizer.size)
    assert data.test.bits_per_byte(nats) == pytest.approx(np.log2(data.tokenizer.size) / 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda data: data.train_batch(0, 99, 4), "step=99: an epoch has the steps 0 to"),
        (lambda data: data.train_batch(0, 0, 5, world=2), "2 ranks cannot share it evenly; take 4 or 6"),
        (lambda data: data.train_batch(0, 0, 0), "at least one window"),
        (lambda data: next(data.evaluation_batches("dev", 4)), "split='dev'"),
        (lambda data: next(data.evaluation_batches("test", 4, stride=17)), "stride=17"),
    ],
)
def test_refused_in_words(data, call, words):
    with pytest.raises(DataError, match=words):
        call(data)
