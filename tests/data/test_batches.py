"""Batches: what a rank gets is a slice of what one process gets, mixed or not; sizes; what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from skipway.data import Batch, Data, DataChoices, load
from skipway.errors import DataError

CPU = torch.device("cpu")
MIXED = {"policy": "trivial", "mixup": 0.3, "cutmix": 1.0, "erasing": 0.3, "flip": True}


def train(data: Data, **options) -> list[Batch]:
    return list(data.train_batches(**{"seed": 5, "epoch": 1, "batch_size": 96, "device": CPU, **options}))


@pytest.mark.parametrize("choices", [{}, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_get_slices_of_the_same_batches(choices, world):
    data = load(size=12, **choices)
    whole = train(data)
    parts = [train(data, rank=rank, world=world) for rank in range(world)]
    assert len(whole) == data.steps(96)
    for batch, *shares in zip(whole, *parts, strict=True):
        for field, share in zip(batch, zip(*shares, strict=True), strict=True):
            assert torch.equal(field, torch.cat(share))


@pytest.mark.parametrize("choices", [{}, MIXED], ids=["plain", "mixed"])
def test_a_batch_holds_what_it_says(choices):
    data = load(size=12, **choices)
    batch = train(data)[0]
    assert batch.inputs.shape == (96, 1, 12, 12)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.labels, data.train.labels[batch.numbers])
    assert batch.numbers.device == CPU
    if choices:
        assert (batch.targets.dtype, batch.targets.shape) == (torch.float32, (96, 10))
        assert torch.allclose(batch.targets.sum(1), torch.ones(96))
    else:
        assert torch.equal(batch.targets, batch.labels)


def test_a_run_that_starts_again_sees_the_same_mixed_batches():
    data = load(size=12, **MIXED)
    for first, second in zip(train(data)[3:], train(data, start=3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_variation_more_leaves_the_others_as_they_were():
    plain, erasing = (train(load(size=12, policy="rand", erasing=share))[0] for share in (0.0, 0.2))
    assert torch.equal(plain.numbers, erasing.numbers)
    untouched = (plain.inputs == erasing.inputs).flatten(1).all(1).float().mean()
    assert 0.6 < float(untouched) < 0.95


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_test_image_is_on_one_rank(world):
    data = load()
    seen = [
        batch.numbers
        for rank in range(world)
        for batch in data.evaluation_batches("test", batch_size=50, device=CPU, rank=rank, world=world)
    ]
    assert torch.equal(torch.cat(seen), torch.arange(len(data.test)))


def test_batches_can_be_smaller_images():
    data = load(size=16)
    small, own = (train(data, size=size)[0].inputs for size in (8, None))
    assert small.shape == (96, 1, 8, 8)
    expected = torch.nn.functional.interpolate(own, (8, 8), mode="bilinear", antialias=True)
    # one step of 255 in units of the standard deviation
    assert (small - expected).abs().max() <= 1 / 255 / data.std[0]


def test_what_ranks_cannot_share_is_refused():
    plain, mixing = load(), load(mixup=0.2)
    for data, batch_size, world in [(plain, 10, 3), (mixing, 6, 2), (mixing, 20, 8)]:
        with pytest.raises(DataError, match=rf"batch_size={batch_size}: {world} ranks cannot share it .*take \d+"):
            train(data, batch_size=batch_size, world=world)
    with pytest.raises(DataError, match="rank=2: ranks are numbered"):
        train(plain, rank=2, world=2)


WRONG = {
    "holdout": 1.5,
    "validation": 1.0,
    "fold": (3, 2),
    "size": 3,
    "channels": 2,
    "crop": "corner",
    "unreadable": "maybe",
    "most_unreadable": -1,
    "grey16": "clip",
    "workers": -1,
    "helpers": "gnomes",
    "policy": "auto",
    "mixup": -0.1,
    "erasing": 2,
    "columns": ("a",),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_choice_outside_its_rule_is_named(name):
    with pytest.raises(DataError, match=f"{name}=.*: the rule is"):
        DataChoices(**{name: WRONG[name]})


def test_choices_are_one_object_or_keywords():
    one, other = load(DataChoices(mixup=0.2, size=16)), load(size=16, mixup=0.2)
    assert one.augmentation == other.augmentation
    assert list(itertools.islice(map(len, train(one)), 1)) == [4]
