"""Devices without float64, as MPS: nothing that runs on the device asks for it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skipway as sw
from skipway.data import Batch
from skipway.data.augment.colours import contrast
from skipway.diagnosis.measurement import measure
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import Trial
from skipway.hardware import precision
from skipway.inference.evaluation import evaluate
from skipway.inference.generate import Sampling
from skipway.inference.text_evaluation import evaluate_text
from skipway.probes.objective import compute_loss


class NoFloat64(TorchDispatchMode):
    """Refuses tensors of float64, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in tree_leaves(result)):
            raise TypeError(f"{func}: no float64 here")
        return result


@pytest.fixture(params=["float64", "float32"])
def device(request, monkeypatch):
    """A context in which a device has float64, or has not."""
    if request.param == "float64":
        return nullcontext
    monkeypatch.setattr(precision, "widest_type", lambda device: torch.float32)
    return NoFloat64


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def test_images_are_evaluated(device):
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(4, (8,))
    with device():
        found = evaluate(
            classifier(), [Batch(images, labels, labels, torch.arange(8))], classes=4, autocast=nullcontext
        )
    assert found is not None
    assert found.total == 8


def test_images_are_augmented(device):
    """Of whole numbers both types have the same mean grey."""
    images = torch.randint(256, (2, 16, 16, 1)).float()
    with device():
        found = contrast(images, torch.full((2, 1, 1, 1), -1.0))
    assert torch.equal(found, (images.double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float().expand_as(images))


def test_texts_are_evaluated_and_continued(device):
    ids = torch.randint(16, (2, 8))
    model = sw.build("gpt-nano", depth=1, dim=12, vocab=16, context=8)
    with device():
        found = evaluate_text(model, [(ids, ids)], scored_bytes=16, autocast=nullcontext)
        drawn = Sampling(top_k=4, top_p=0.9)(torch.randn(3, 16))
    assert found is not None
    assert found.total == 16
    assert drawn.shape == (3,)


@pytest.mark.parametrize("loss", [None, lambda output, targets: nn.functional.mse_loss(output, targets)])
def test_networks_are_measured_and_tried(device, loss):
    images = torch.randn(16, 3, 2, 2)
    targets = torch.randint(4, (16,)) if loss is None else torch.randn(16, 4)
    subject = Subject(classifier(), images, targets, loss)
    assert len(subject.chain) == 0  # traced, which is done on the CPU
    with device():
        found = measure(subject)
        trial = Trial(subject, Settings()).advance(3)
    assert found.finite
    assert found.curvature.sharpness != 0
    assert trial.result().predicted > 0
    assert trial.constant is not None


def test_streams_and_distributions_are_measured(device):
    model = sw.build("vit-tiny-16", scheme="mhc(n=2)", depth=1, dim=8, heads=2, patch=4, image=8, classes=4)
    images = torch.randn(4, 3, 8, 8)
    with device():
        assert sw.stream_health(model, images)
        assert sw.depth_mixing(model, images)
        assert compute_loss(torch.randn(4, 3), torch.full((4, 3), 1 / 3)).isfinite()
