"""From a folder to batches: what is chosen from the data, augmentation, order, damaged files."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipway.data import UnreadableImage, load
from skipway.data.augment import DRAWS, Augmentation, crop_and_flip, random_box
from skipway.data.batches import AugmentationDraws
from skipway.data.decode import DecodeSpec
from skipway.data.digits import digits, read_table
from skipway.data.image_dataset import FileDataset, MemoryDataset
from skipway.data.inspection import DecodeTask
from skipway.data.loader import statistics
from skipway.data.randomness import draw_key, permutation, uniforms
from skipway.errors import DataError, MissingExtraError

CPU = torch.device("cpu")


def pictures(
    root: Path, *, classes: int = 2, each: int = 6, shape: tuple[int, ...] = (12, 12, 3), seed: int = 0
) -> Path:
    """Noise images in class folders."""
    noise = np.random.default_rng(seed)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(each):
            Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def tree_hash(root: Path) -> str:
    entries = [(str(p), p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(root.rglob("*"))]
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def test_the_input_is_chosen_from_the_images(tmp_path):
    small = load(pictures(tmp_path / "small"))
    assert (small.size, small.channels, small.augmentation.crop, small.augmentation.pad) == (12, 3, "pad", 2)
    grey = load(pictures(tmp_path / "grey", shape=(12, 12)))
    assert grey.channels == 1
    large = load(pictures(tmp_path / "large", shape=(70, 90, 3)))
    assert (large.size, large.augmentation.crop) == (224, "resized")
    assert isinstance(small.train, MemoryDataset)
    assert isinstance(large.train, FileDataset)


def test_the_choices_can_be_made(tmp_path):
    data = load(pictures(tmp_path), size=16, channels=1, crop="none", flip=False, holdout=0.5)
    inputs, *_ = next(data.evaluation_batches("test", batch_size=4, device=CPU))
    assert inputs.shape == (4, 1, 16, 16)
    assert len(data.test) == 6
    assert data.remarks == ("images are scaled and center-cropped to 16x16; most are 12x12",)


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (5, 4, 3, 3), dtype=torch.uint8)
    mean, std = statistics(images)
    values = images.numpy().astype(np.float64) / 255
    assert np.allclose(mean, values.mean((0, 1, 2)))
    assert np.allclose(std, values.std((0, 1, 2)))
    assert statistics(torch.full((2, 2, 2, 1), 7, dtype=torch.uint8))[1] == (1.0,)


def test_inputs_are_normalised_and_channels_last(tmp_path):
    data = load(pictures(tmp_path, each=20), crop="none", flip=False, validation=0.0)
    inputs, _, labels, _ = zip(*data.train_batches(seed=0, epoch=0, batch_size=32, device=CPU), strict=True)
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert labels[0].dtype == torch.int64
    everything = data.normalised(data.train.images)
    assert torch.allclose(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(everything.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_shift_and_flip_agree_with_padding_by_hand():
    images = torch.randint(0, 256, (32, 6, 6, 2), dtype=torch.uint8)
    draws = torch.rand(32, DRAWS)
    fill = torch.tensor([3.0, 250.0])
    out = crop_and_flip(images, draws, fill, pad=2, flip=True)
    for image, row, result in zip(images.numpy(), draws.numpy(), out.numpy(), strict=True):
        padded = np.empty((10, 10, 2), np.uint8)
        padded[:] = (3, 250)
        padded[2:8, 2:8] = image
        top, left = int(row[0] * 5), int(row[1] * 5)
        expected = padded[top : top + 6, left : left + 6]
        assert np.array_equal(result, expected[:, ::-1] if row[2] >= 0.5 else expected)


def test_shifts_are_uniform_and_half_are_flipped():
    draws = uniforms(20_000, DRAWS, seed=0, epoch=0)
    tops = (draws[:, 0] * 9).long()
    assert torch.allclose(tops.bincount(minlength=9) / 20_000, torch.full((9,), 1 / 9), atol=0.01)
    assert abs(float((draws[:, 2] >= 0.5).float().mean()) - 0.5) < 0.015


def test_two_epochs_show_every_image_both_ways():
    augmentation = Augmentation(flip=True)
    first, second, third = (
        AugmentationDraws.of(augmentation, 2_000, seed=0, epoch=epoch).crop[:, 2] >= 0.5 for epoch in (4, 5, 6)
    )
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert abs(float(first.float().mean()) - 0.5) < 0.05
    other = AugmentationDraws.of(augmentation, 2_000, seed=1, epoch=4).crop[:, 2] >= 0.5
    assert abs(float((first == other).float().mean()) - 0.5) < 0.05


def test_random_parts_lie_inside_and_have_the_stated_area():
    shares = []
    for row in uniforms(2_000, DRAWS, seed=1, epoch=0):
        left, top, right, bottom = random_box(row)(400, 400)
        assert 0 <= left < right <= 400 + 1e-9
        assert 0 <= top < bottom <= 400 + 1e-9
        assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6
        shares.append((right - left) * (bottom - top) / 400**2)
    assert min(shares) >= 0.35 - 1e-6
    # the mean of uniform [0.35, 1] is 0.675; cutting what sticks out takes a little from the largest
    assert math.isclose(sum(shares) / len(shares), 0.675, abs_tol=0.03)


def test_random_keys_depend_on_every_part():
    keys = {draw_key(*parts) for parts in [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a/1")]}
    assert len(keys) == 7
    assert not torch.equal(permutation(50, 0, 0), permutation(50, 0, 1))


def test_an_epoch_is_a_permutation_and_can_begin_anywhere(tmp_path):
    data = load(pictures(tmp_path, each=12), holdout=0.25, validation=0.0)

    def epoch(number: int, batch_size: int, start: int = 0) -> list[torch.Tensor]:
        return [x for x, *_ in data.train_batches(seed=3, epoch=number, batch_size=batch_size, device=CPU, start=start)]

    whole = epoch(0, 6)
    assert len(whole) == data.steps(6) == 3
    assert torch.equal(torch.cat(epoch(0, 6, start=1)), torch.cat(whole[1:]))
    assert epoch(0, 6, start=3) == []
    assert not torch.equal(torch.cat(epoch(1, 6)), torch.cat(whole))
    assert torch.equal(torch.cat(epoch(0, 2)), torch.cat(whole)), "augmentation must not depend on the batch size"


def test_every_training_image_is_seen_once(tmp_path):
    data = load(pictures(tmp_path), crop="none", flip=False)
    (seen,) = (x for x, *_ in data.train_batches(seed=0, epoch=0, batch_size=len(data.train), device=CPU))
    everything = data.normalised(data.train.images)
    rows = {tuple(image.flatten().tolist()) for image in everything}
    assert {tuple(image.flatten().tolist()) for image in seen} == rows


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_files_give_what_memory_gives_with_any_number_of_workers(tmp_path, crop, monkeypatch):
    pictures(tmp_path, shape=(20, 20, 3))
    memory = load(tmp_path, size=20, crop="none", flip=True)
    monkeypatch.setattr("skipway.data.source_reader.MEMORY_BYTES", 0)
    alone, helped = (load(tmp_path, size=20, crop=crop, flip=True, workers=workers) for workers in (0, 2))
    assert isinstance(alone.train, FileDataset)
    batches = [
        [x for x, *_ in data.train_batches(seed=0, epoch=0, batch_size=5, device=CPU)] for data in (alone, helped)
    ]
    assert torch.equal(torch.cat(batches[0]), torch.cat(batches[1]))
    if crop == "none":
        first, second = (next(data.evaluation_batches("test", batch_size=2, device=CPU))[2] for data in (memory, alone))
        assert torch.equal(first, second)
        raw = [next(data.test.fetch([torch.arange(2)], CPU, None)) for data in (memory, alone)]
        assert torch.equal(raw[0], raw[1])


def test_workers_that_are_started_afresh_can_be_told_what_to_decode(tmp_path):
    """Python 3.14 and macOS send the data set to a worker as bytes."""
    data = load(pictures(tmp_path), size=224)
    work = DecodeTask(data.train.store, data.train.names, DecodeSpec(3, 8), torch.rand(len(data.train), DRAWS).numpy())
    row = np.zeros((8, 8, 3), np.uint8)
    assert pickle.loads(pickle.dumps(work))(1, row) == ""
    assert row.any()


def damage(root: Path, *files: str) -> None:
    for file in files:
        (root / file).write_bytes(b"<html>")


@pytest.mark.parametrize("size", [12, 224])
def test_damaged_images_are_left_out_and_named(tmp_path, size):
    pictures(tmp_path)
    damage(tmp_path, "class0/1.png", "class1/4.png")
    data = load(tmp_path, size=size, most_unreadable=0.2)
    assert sorted(data.unreadable) == [
        ("class0/1.png", "not an image but HTML"),
        ("class1/4.png", "not an image but HTML"),
    ]
    assert len(data.splits.samples) == 10
    with pytest.raises(UnreadableImage, match=r"class./..png: not an image but HTML"):
        load(tmp_path, size=size, unreadable="stop")
    with pytest.raises(DataError, match="2 of 12 images cannot be read, .* most_unreadable=0.01 of all"):
        load(tmp_path, size=size)


def test_a_class_must_not_be_left_empty(tmp_path):
    pictures(tmp_path, each=3)
    damage(tmp_path, *(f"class1/{number}.png" for number in range(3)))
    with pytest.raises(DataError, match="class 'class1' has no readable training image; 3 files cannot be read"):
        load(tmp_path)


def test_nothing_readable_at_all(tmp_path):
    pictures(tmp_path, each=2)
    damage(tmp_path, *(f"class{label}/{number}.png" for label in (0, 1) for number in (0, 1)))
    with pytest.raises(DataError, match="none of 4 images"):
        load(tmp_path)


def test_a_file_that_changes_later_is_named(tmp_path):
    data = load(pictures(tmp_path), size=224)
    damage(tmp_path, *data.train.names)
    with pytest.raises(UnreadableImage, match="changed while training: not an image but HTML"):
        next(data.train_batches(seed=0, epoch=0, batch_size=2, device=CPU))


def test_the_folder_is_never_written_to(tmp_path):
    pictures(tmp_path)
    damage(tmp_path, "class0/1.png")
    before = tree_hash(tmp_path)
    for size in (12, 224):
        data = load(tmp_path, size=size)
        list(data.train_batches(seed=0, epoch=0, batch_size=4, device=CPU))
    assert tree_hash(tmp_path) == before


def test_what_is_not_used_is_said(tmp_path):
    for part in ("train", "test", "Testing", "extra"):
        pictures(tmp_path / part, seed=len(part))
    (tmp_path / "train/class0/notes.txt").touch()
    for file in (tmp_path / "test/class1").iterdir():
        file.unlink()
    remarks = load(tmp_path).remarks
    assert remarks == (
        "24 files left out, in a folder that is not used: 'Testing/class0/0.png', …",
        "1 file left out, an empty file: 'train/class0/notes.txt'",
        "not used: 'extra': its name is none of train, val, test",
        "not used: 'Testing': 'test' is the test split",
        "no test image of class 'class1'",
    )


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load()
    assert len(data.splits.samples) == 1797
    number = int(data.train.names[5].split("/")[1])
    source = load_digits()
    assert int(data.train.labels[5]) == source.target[number]
    assert np.array_equal(data.train.images[5, ..., 0], np.round(source.images[number] * 255 / 16))
    assert not data.augmentation.flip
    assert json.loads(json.dumps(data.train.names)) == data.train.names


def test_the_digits_in_another_shape():
    data = load(size=16, channels=3)
    assert data.train.images.shape[1:] == (16, 16, 3)
    with pytest.raises(DataError, match="crop='resized' needs image files"):
        load(crop="resized")


def test_the_digits_are_read_without_their_package_or_else_by_it(monkeypatch):
    """To import it takes longer than to read them."""
    by_package = read_table.__wrapped__(Path("gone"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    read_table.cache_clear()
    images, names = digits()
    assert torch.equal(images.flatten(1), by_package[:, :-1].mul(255 / 16).round().to(torch.uint8))
    assert [int(name[0]) for name in names] == by_package[:, -1].tolist()


def test_without_scikit_learn_there_is_a_line_to_type(monkeypatch):
    monkeypatch.setattr(sys.modules["skipway.data.digits"], "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'skipway\[digits\]'"):
        load()


def test_progress_counts_every_file(tmp_path):
    seen: list[tuple[int, int]] = []
    load(pictures(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
