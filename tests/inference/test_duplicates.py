"""Copies that were planted among random pictures, and pictures that only have much in common."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from skipway.errors import SkipwayError
from skipway.inference.duplicates import find_duplicates, thumbnails

SIDE, TRAIN, TEST = 48, 60, 20
SPLITS = (torch.arange(TRAIN + TEST) >= TRAIN).long()


def compressed(image: Image.Image) -> Image.Image:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=40)
    return Image.open(stored).convert("RGB")


CHANGES = {
    "compressed": compressed,
    "resized": lambda image: image.resize((SIDE // 2, SIDE // 2)).resize((SIDE, SIDE)),
    "brighter": lambda image: image.point(lambda value: min(255, int(0.8 * value) + 20)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


def pictures(cells: int = 6) -> list[Image.Image]:
    """Smooth random images."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (TRAIN + TEST, cells, cells, 3)).astype(np.uint8)
    return [Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in coarse]


def small(images: list[Image.Image]) -> torch.Tensor:
    return thumbnails(torch.from_numpy(np.stack([np.asarray(each) for each in images])))


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found_and_no_others(change):
    images = pictures()
    for number in range(5):
        images[TRAIN + 2 * number] = CHANGES[change](images[7 * number])
    found = find_duplicates(small(images), SPLITS)
    assert {pair[:2] for pair in found} == {(TRAIN + 2 * number, 7 * number) for number in range(5)}
    assert [pair[2] for pair in found] == sorted((pair[2] for pair in found), reverse=True)
    assert all(0.95 <= pair[2] <= 1 + 1e-5 for pair in found)


def test_what_all_images_have_in_common_makes_no_copies():
    """Portraits, say, or goods on white: every two of these correlate by more than 0.99."""
    common = 8 * small(pictures(cells=3))[0]
    images = common + 0.25 * small(pictures())
    images[-1] = 0.7 * images[4] + 30
    rows = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
    assert float(torch.corrcoef(rows).min()) > 0.99
    assert [pair[:2] for pair in find_duplicates(images, SPLITS)] == [(TRAIN + TEST - 1, 4)]


def test_copies_within_a_split_are_none_and_each_image_has_one_in_a_split_before():
    images = pictures()
    images[1] = images[2] = images[TRAIN] = images[TRAIN + 1] = images[0]
    splits = SPLITS.clone()
    splits[TRAIN + 1 :] = 2
    found = find_duplicates(small(images), splits)
    assert sorted(pair[0] for pair in found) == [TRAIN, TRAIN + 1]
    assert all(splits[copy] < splits[image] for image, copy, _ in found)


def test_even_and_unread_images_have_no_copies():
    images = small(pictures())
    images[[0, TRAIN]] = 255.0
    images[[1, TRAIN + 1]] = torch.nan
    assert find_duplicates(images, SPLITS) == []
    assert find_duplicates(torch.full((4, 16, 16), torch.nan), torch.arange(4)) == []


@pytest.mark.parametrize("most", [1, 100])
def test_blocks_make_no_difference(monkeypatch, most):
    images = pictures()
    images[-1] = images[5]
    expected = find_duplicates(small(images), SPLITS)
    monkeypatch.setattr("skipway.inference.duplicates.MOST_ELEMENTS", most)
    assert [pair[:2] for pair in find_duplicates(small(images), SPLITS)] == [pair[:2] for pair in expected]


def test_numbers_of_another_length_are_refused():
    with pytest.raises(SkipwayError, match="the rule is thumbnails"):
        find_duplicates(torch.zeros(3, 16, 16), torch.zeros(2))
