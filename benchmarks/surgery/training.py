"""Trained networks before surgery, right after, and after one more epoch.

    python -m benchmarks.surgery.training       # ten minutes on one core

On the embedded digits (1,438 to train on, 359 to test), 600 steps of 64 images, AdamW for ViT and SGD for ResNet; one
more epoch is 23 steps at a tenth of the rate. Test accuracy in percent; one seed, so that a point is noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipway as sw
from benchmarks.trainability import nets
from benchmarks.trainability.tasks import digits, shuffled
from skipway.data import load
from skipway.diagnosis import Settings
from skipway.surgery import Operation, deepen, remove_norm, rescheme, shorten

__all__ = ["main"]

STEPS, EPOCH = 600, 23
GREY = {"channels": 1, "classes": 10}


def test_images() -> tuple[Tensor, Tensor]:
    """The held-out digits, standardised like the others."""
    data = load(validation=0.0)
    seen, images = (split.images.permute(0, 3, 1, 2).float() for split in (data.train, data.test))
    return (images - seen.mean()) / seen.std(), data.test.labels


def learn(model: nn.Module, settings: Settings, steps: int, seed: int = 0) -> nn.Module:
    """Train with a rate that falls to 0 along a cosine."""
    images, labels = digits()
    optimizer = settings.make(model.train())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = shuffled(images, labels, seed, 64)
    for _ in range(steps):
        x, y = next(stream)
        loss = F.cross_entropy(model(x), y)
        if not bool(loss.isfinite()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Percent of the held-out digits."""
    images, labels = test_images()
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def operate(title: str, model: nn.Module, settings: Settings, operation: Callable[[nn.Module], Operation]) -> None:
    """A copy of a trained network: before, right after, after one more epoch."""
    patient = copy.deepcopy(model)
    before = accuracy(patient)
    done = operation(patient)
    after = accuracy(patient)
    learn(patient, settings.at(settings.rate / 10), EPOCH, seed=1)
    print(f"| {title} | {before:.1f} | {after:.1f} | {accuracy(patient):.1f} | {done.report['difference']:.1e} |")


def main() -> None:
    """Everything, as a table."""
    torch.manual_seed(0)
    images, _ = digits()
    batch = images[:64]
    sgd, adam = Settings(lr=0.1), Settings(optimizer="adamw", lr=1e-3)
    resnet = learn(sw.build("resnet20", **GREY), sgd, STEPS)
    vit = sw.build("vit-tiny-16", dim=32, heads=2, patch=2, image=8, blocks=12, pooling="mean", **GREY)
    learn(vit, adam, STEPS)
    print("| operation | before | right after | one epoch later | change of the output |\n|---|---|---|---|---|")
    operate("ResNet-20, BatchNorm folded", resnet, sgd, lambda m: remove_norm(m, batch, how="fold"))
    operate("ResNet-20, BatchNorm → SkipInit", resnet, sgd, lambda m: remove_norm(m, batch, how="skipinit"))
    operate("ResNet-20, 6 → 4 blocks", resnet, sgd, lambda m: shorten(m, batch, 4))
    operate("ResNet-20, 3 blocks more", resnet, sgd, lambda m: deepen(m, batch, 3))
    operate("ViT, 24 → 16 sublayers", vit, adam, lambda m: shorten(m, batch, 16))
    operate("ViT, 24 → 8 sublayers (12 → 4 blocks' worth)", vit, adam, lambda m: shorten(m, batch, 8))
    operate("ViT, 8 sublayers more", vit, adam, lambda m: deepen(m, batch, 8))
    operate("ViT, LayerScale at 1", vit, adam, lambda m: rescheme(m, batch, "layerscale"))
    print("\nA network of someone else's that does not train (100 layers, no norm, no scale), after 300 steps at 0.1:")
    torch.manual_seed(0)
    stranger = nets.ResidualConvNet(100, 1.0)
    dressed = copy.deepcopy(stranger)
    rescheme(dressed, batch, "skipinit(init='depth')", start="scheme")
    print(f"as it is {accuracy(learn(stranger, sgd, 300)):.1f}, ", end="")
    print(f"with SkipInit at 1/√L {accuracy(learn(dressed, sgd, 300)):.1f}")


if __name__ == "__main__":
    main()
