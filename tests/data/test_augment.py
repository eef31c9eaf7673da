"""Policies against Pillow, weights against the Beta distribution, mixing and erasing against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from skipway.data.augment import colours
from skipway.data.augment.erase import ERASING_DRAWS, erase_rectangles
from skipway.data.augment.mix import MIXING_DRAWS, beta, mix_images, partners
from skipway.data.augment.policy import OPERATIONS, POLICY_DRAWS, apply_policy, rotation, shear_x, shift_y, warp


def pictures(channels: int = 3, side: int = 24) -> torch.Tensor:
    """Smooth, so that neighbouring pixels differ little, and of limited range, so that stretching does something."""
    waves = torch.rand(5, channels, 4, 4)
    images = torch.nn.functional.interpolate(waves, (side, side), mode="bicubic", antialias=True)
    return (40 + 170 * images).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def pillow(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.squeeze(-1).numpy()) for image in images]


ENHANCED = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
OPERATED = {
    "posterize": (lambda image, amount: ImageOps.posterize(image, 8 - round(amount)), 3.0),
    "solarize": (lambda image, amount: ImageOps.solarize(image, 255 - amount), 120.0),
    "autocontrast": (lambda image, amount: ImageOps.autocontrast(image), 0.0),
    "equalize": (lambda image, amount: ImageOps.equalize(image), 0.0),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*ENHANCED, *OPERATED])
def test_colour_operations_are_pillows(name, channels):
    images = pictures(channels)
    for amount in (0.75, -0.625) if name in ENHANCED else (OPERATED[name][1],):
        strength = torch.full((len(images), 1, 1, 1), amount)
        ours = getattr(colours, name)(images.float(), strength)
        for image, out in zip(pillow(images), ours, strict=True):
            theirs = ENHANCED[name](image).enhance(1 + amount) if name in ENHANCED else OPERATED[name][0](image, amount)
            difference = np.abs(np.asarray(theirs, np.int64).reshape(out.shape) - out.numpy())
            assert difference.max() <= 1
            assert difference.mean() < 0.02


def test_equalize_of_one_value_stays():
    flat = torch.full((1, 6, 6, 1), 7.0)
    for operation in (colours.equalize, colours.autocontrast):
        assert torch.equal(operation(flat, torch.zeros(1, 1, 1, 1)), flat)


@pytest.mark.parametrize(
    ("make", "amount", "matrix"),
    [
        (rotation, 30.0, (math.cos(math.pi / 6), -math.sin(math.pi / 6), math.sin(math.pi / 6), math.cos(math.pi / 6))),
        (shear_x, 0.3, (1, 0.3, 0, 1)),
    ],
)
def test_geometry_is_pillows_affine_transform(make, amount, matrix):
    images, side, centre = pictures(), 24, 12
    out = warp(images, make(torch.full((len(images),), amount)), torch.zeros(3))
    a, b, c, d = matrix
    # Pillow maps the output's places to the input's, in pixels from the corner
    data = (a, b, centre - a * centre - b * centre, c, d, centre - c * centre - d * centre)
    for image, moved_image in zip(pillow(images), out, strict=True):
        theirs = np.asarray(image.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))
        inside = (slice(9, 15), slice(9, 15))
        assert np.abs(theirs[inside].astype(int) - moved_image.numpy()[inside]).max() <= 2


def test_what_comes_in_from_outside_has_the_fill_colour():
    images = pictures()
    out = warp(images, shift_y(torch.full((5,), 0.25)), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(out[:, :18], images[:, 6:])
    assert (out[:, 18:] == torch.tensor([9, 8, 7])).all()


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_an_image_is_varied_alike_in_every_batch(policy):
    images, draws = pictures().repeat(8, 1, 1, 1), torch.rand(40, POLICY_DRAWS)
    whole = apply_policy(images, draws, torch.full((3,), 100.0), policy)
    assert whole.dtype == torch.uint8
    halves = [apply_policy(images[s], draws[s], torch.full((3,), 100.0), policy) for s in (slice(0, 13), slice(13, 40))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, images)


def test_operations_are_chosen_uniformly_and_identity_leaves_the_image():
    images = pictures()[:1].repeat(14, 1, 1, 1)
    draws = torch.full((14, POLICY_DRAWS), 0.99)
    draws[:, 0] = (torch.arange(14) + 0.5) / 14
    out = apply_policy(images, draws, torch.zeros(3), "trivial")
    same = [bool(torch.equal(a, b)) for a, b in zip(images, out, strict=True)]
    assert same == [name == "identity" for name in OPERATIONS]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_weights_follow_the_beta_distribution(alpha):
    generator = torch.Generator().manual_seed(1)
    weights = beta(torch.rand(20_000, 4, generator=generator), alpha)
    reference = stats.beta(alpha, alpha)
    # float32 tells numbers apart near 0 and not near 1, and the distribution is symmetric
    for quantile in np.linspace(0.05, 0.5, 10):
        assert abs(float((weights.double() < reference.ppf(quantile)).double().mean()) - quantile) < 0.012
    assert abs(float(weights.mean()) - 0.5) < 0.012
    assert abs(float(weights.var()) - 1 / (8 * alpha + 4)) < 0.005


def test_mixup_blends_neighbours_and_their_targets():
    inputs, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 1])
    draws = torch.rand(6, MIXING_DRAWS)
    images, targets = mix_images(inputs, labels, draws, classes=3, mixup=0.4, cutmix=0.0)
    weight = beta(draws[:, -4:], 0.4)
    other = [1, 0, 3, 2, 5, 4]
    for n in range(6):
        assert torch.allclose(images[n], weight[n] * inputs[n] + (1 - weight[n]) * inputs[other[n]], atol=1e-6)
        expected = torch.zeros(3)
        expected[labels[n]] += weight[n]
        expected[labels[other[n]]] += 1 - weight[n]
        assert torch.allclose(targets[n], expected, atol=1e-6)
    assert partners(3).tolist() == [1, 0, 2]


def test_cutmix_weighs_by_the_area_that_is_left():
    inputs = torch.arange(32.0)[:, None, None, None].expand(32, 1, 12, 12)
    labels = torch.arange(32)
    images, targets = mix_images(inputs, labels, torch.rand(32, MIXING_DRAWS), classes=32, mixup=0.0, cutmix=1.0)
    own = (images == inputs).float().mean((1, 2, 3))
    assert torch.allclose(targets[torch.arange(32), labels], own)
    assert torch.allclose(targets.sum(1), torch.ones(32))
    assert torch.allclose(targets[torch.arange(32), labels ^ 1], 1 - own, atol=1e-6)
    assert 0.2 < float((own < 1).float().mean()) <= 1


def test_both_mixings_share_the_images_evenly():
    inputs = torch.arange(2000.0)[:, None, None, None].expand(2000, 1, 6, 6)
    images, _ = mix_images(
        inputs, torch.zeros(2000).long(), torch.rand(2000, MIXING_DRAWS), classes=2, mixup=1, cutmix=1
    )
    blended = (images % 1 != 0).flatten(1).all(1).float().mean()
    assert 0.45 < float(blended) < 0.55


def test_erasing_has_the_probability_and_the_areas_of_the_paper():
    images = torch.ones(4000, 20, 20, 1, dtype=torch.uint8)
    out = erase_rectangles(images, torch.rand(4000, ERASING_DRAWS), torch.zeros(1), 0.3)
    gone = (out == 0).float().mean((1, 2, 3))
    hit = gone > 0
    assert abs(float(hit.float().mean()) - 0.3) < 0.03
    # sides are whole pixels, and what would stick out is cut
    assert 0.01 < float(gone[hit].min()) < 0.04
    assert float(gone[hit].max()) < 0.43
    assert abs(float(gone[hit].mean()) - 0.2) < 0.025
    rows = (out == 0).any(2).flatten(1).sum(1)
    columns = (out == 0).any(1).flatten(1).sum(1)
    assert torch.equal((rows * columns)[hit].float() / 400, gone[hit]), "the erased part is a rectangle"
