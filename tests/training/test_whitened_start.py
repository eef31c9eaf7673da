"""`start="whitened"`: the outputs of the first convolution are uncorrelated on the images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.hardware import precision
from skipway.recipe import Recipe
from skipway.training import whitened_start
from skipway.training.whitened_start import first_convolution, whiten_

NETWORKS = {
    "resnet": lambda: sw.build("resnet-patch8", width=8, stem_width=12, classes=3),
    "vit": lambda: sw.build("vit", depth=1, dim=24, heads=2, patch=4, image=16, classes=3),
    "other": lambda: nn.Sequential(nn.Conv2d(3, 70, 3, stride=2), nn.Flatten(), nn.LazyLinear(3)),
}


def correlated_images():
    """Smooth images whose channels agree, as in photos."""
    noise = torch.randn(400, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise + noise.mean(1, keepdim=True), 5, stride=1)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_outputs_are_white_and_come_in_pairs(make):
    model, images = make(), correlated_images()
    assert "random weights, but for" in whiten_(model, images)
    _, convolution = first_convolution(model, images[:2])
    with torch.no_grad():
        outputs = nn.functional.conv2d(images, convolution.weight, convolution.bias, convolution.stride)
    pairs = min(len(convolution.weight) // 2, convolution.weight[0].numel())
    outputs = outputs.transpose(0, 1).flatten(1)[: 2 * pairs]
    assert torch.allclose(outputs[::2], -outputs[1::2], atol=1e-5)
    covariance = outputs[::2].cov()
    # smaller than 1 by ε where a direction has little variance
    assert torch.allclose(covariance - covariance.diag().diag(), torch.zeros(pairs, pairs), atol=1e-3)
    assert covariance.diag()[0] == pytest.approx(1, abs=0.01)
    assert covariance.diag().max() < 1.01


@pytest.mark.parametrize("values", [1, 5_000, 1 << 23])
def test_the_covariance_of_parts_is_that_of_the_whole(values, monkeypatch):
    """Sums over one image, some, and all at a time; `unfold` is asked for no more than fits."""
    monkeypatch.setattr(whitened_start, "VALUES", values)
    convolution, images = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2)), 5 + correlated_images()[:50]
    kernel = {"dilation": convolution.dilation, "stride": convolution.stride}
    whole = nn.functional.unfold(images, convolution.kernel_size, **kernel).transpose(1, 2).flatten(0, 1)
    sizes, unfold = [], nn.functional.unfold

    def counted(*args, **kwargs):
        sizes.append(len(args[0]))
        return unfold(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "unfold", counted)
    found = whitened_start.patch_covariance(convolution, images)
    assert torch.allclose(found, whole.double().T.cov(), rtol=1e-10, atol=1e-12)
    assert sum(sizes) == 50
    assert max(sizes) == (1 if values == 1 else max(1, min(50, values * 50 // whole.numel())))


def test_the_covariance_is_exact_on_a_device_without_float64(monkeypatch):
    """Of patches far from 0, which are differences of large sums."""
    monkeypatch.setattr(precision, "widest_type", lambda device: torch.float32)
    convolution, images = nn.Conv2d(3, 4, 2), 1000 + correlated_images()[:50]
    whole = nn.functional.unfold(images, convolution.kernel_size).transpose(1, 2).flatten(0, 1)
    found = whitened_start.patch_covariance(convolution, images)
    assert torch.allclose(found.double(), whole.double().T.cov(), rtol=1e-6, atol=1e-6)


def test_images_smaller_than_the_filters_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.Flatten())
    with pytest.raises(SkipwayError, match="smaller than the 7 x 7 filters"):
        whiten_(model, torch.randn(2, 3, 4, 4))


def test_filters_beyond_the_directions_stay():
    model = NETWORKS["other"]()
    before = model[0].weight.detach().clone()
    whiten_(model, correlated_images())  # 27 directions, 70 filters
    assert torch.equal(model[0].weight[54:], before[54:])
    assert not torch.isclose(model[0].weight[:54], before[:54]).all(dim=(1, 2, 3)).any()


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten())],
    ids=["no convolution", "groups"],
)
def test_a_network_that_begins_otherwise_is_refused(model):
    with pytest.raises(SkipwayError, match="start='whitened': the rule is a network that begins with a convolution"):
        whiten_(model, correlated_images())


def test_text_is_refused():
    with pytest.raises(SkipwayError, match="start='whitened': a start for images, and book.txt holds text"):
        Recipe(start="whitened").check_kind("text", "book.txt")
