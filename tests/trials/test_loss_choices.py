"""Kind: two options of the loss that act on each other without a word.

| trial | input | right value |
|---|---|---|
| A1 | class weights with label smoothing | w[y] times the smoothed cross-entropy of the image |
| A1 | 400 dark and 8 bright images, both options | near 100 % for both classes |
| | class weights with mixup or CutMix | the classes' weights in the shares of the mixture |
| | class weights with a batch in parts | the same gradient as in one part |
| | label smoothing | what is added to the loss of a perfect network is said |
| | class weights, and validation images nearly all of one class | it is said that accuracy chooses the epoch |
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.trials.reporting import Notes
from torch import nn

import skipway as sw
from skipway.training import step
from skipway.training.image_task import ImageClassification
from skipway.training.run import Run

SMALL = {"model": "resnet8", "width": 4, "device": "cpu", "workers": 0, "precision": "float32", "health": 0.0}


def loss_of(logits, targets, weights=None, smoothing=0.0):
    run = SimpleNamespace(
        recipe=SimpleNamespace(label_smoothing=smoothing), class_weights=weights, task=ImageClassification()
    )
    return Run.loss(run, logits, targets)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_image_has_the_weight_of_its_own_class(smoothing, mixed):
    """Against the definition, in float64: w of the target times -Σ t' log p, t' = (1 - s) t + s / K."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    weights = torch.tensor([0.1, 5.0, 1.0, 2.0])
    labels = torch.tensor([0, 1, 2, 3, 0, 0])
    target = nn.functional.one_hot(labels, 4).double()
    if mixed:
        target = 0.3 * target + 0.7 * target[[1, 0, 3, 2, 5, 4]]
    smoothed = (1 - smoothing) * target + smoothing / 4
    expected = (-(smoothed * logits.double().log_softmax(1)).sum(1) * (target @ weights.double())).mean()
    found = loss_of(logits, target.float() if mixed else labels, weights, smoothing)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_smoothing_does_not_move_the_best_output_of_a_rare_class():
    """The gradient at the smoothed target vanishes for every class, whatever the weights of the others."""
    weights, smoothing = torch.tensor([0.01, 100.0]), 0.1
    for label in (0, 1):
        best = torch.full((1, 2), smoothing / 2)
        best[0, label] = 1 - smoothing / 2
        logits = best.log().requires_grad_()
        loss_of(logits, torch.tensor([label]), weights, smoothing).backward()
        assert logits.grad is not None
        assert logits.grad.abs().max() < 1e-5 * 100


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_has_the_gradient_of_the_batch(parts):
    """Also where the parts hold different classes."""
    model = nn.Linear(5, 3, dtype=torch.float64)
    inputs, labels = torch.randn(8, 5, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])

    def gradient(count):
        run = SimpleNamespace(
            recipe=SimpleNamespace(label_smoothing=0.1, seed=0),
            class_weights=torch.tensor([0.2, 3.0, 7.0]),
            steps_per_epoch=1,
            progress=SimpleNamespace(accumulation=count, before=0, step=0, epoch=0),
            ranks=SimpleNamespace(rank=0),
            optimizer=torch.optim.SGD(model.parameters()),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            network=model,
            task=ImageClassification(),
            autocast=torch.enable_grad,
            kernels=nullcontext,
        )
        run.loss = lambda logits, targets: Run.loss(run, logits, targets)  # type: ignore[arg-type]
        step.backward(run, SimpleNamespace(inputs=inputs, targets=labels, labels=labels))  # type: ignore[arg-type]
        assert model.weight.grad is not None
        return model.weight.grad.clone()

    assert torch.allclose(gradient(parts), gradient(1), atol=1e-7)


def brightness(root, dark: int, bright: int):
    rng = np.random.default_rng(0)
    for name, level, count in (("dark", 40, dark), ("bright", 210, bright)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(level, 15, (16, 16, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_class_weights_with_label_smoothing_learn_both_classes(tmp_path):
    data = brightness(tmp_path / "d", 400, 8)
    notes = Notes()
    recipe = sw.Recipe(
        data, epochs=4, size=16, model="resnet8", class_weights="balanced", label_smoothing=0.1, device="cpu", workers=0
    )
    outcome = sw.train(recipe, tmp_path / "run", reporter=notes)
    assert outcome.evaluation is not None
    assert outcome.evaluation.accuracy >= 0.97
    assert notes.said("the training loss is at least 0.20, the validation loss is without it")
    assert notes.said("classes are weighted in the loss, but the epoch is chosen by the accuracy over all validation")
