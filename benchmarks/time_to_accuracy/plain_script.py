"""The script to compare with: timm and torch, as one writes it today. One line of JSON for each epoch."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

__all__ = ["NETWORKS", "plain"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SMOOTHING, DECAY = 0.1, 5e-4


def loaders(given: Namespace) -> tuple[Any, Any]:
    """Training and test batches: timm's folders, torchvision's transforms on PIL images, worker processes."""
    from timm.data import create_dataset
    from torch.utils.data import DataLoader
    from torchvision import transforms

    normalize = transforms.Normalize(MEAN, STD)
    varied = [
        transforms.RandomCrop(32, padding=given.shift),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        normalize,
    ]
    found = []
    for split, steps in (("train", varied), ("test", [transforms.ToTensor(), normalize])):
        images = create_dataset("", root=str(given.data / split), transform=transforms.Compose(steps))
        choices = {"num_workers": given.workers, "persistent_workers": True}
        training = split == "train"
        found.append(DataLoader(images, given.batch_size, shuffle=training, drop_last=training, **choices))
    return found[0], found[1]


def strided_network(width: int) -> Any:
    """timm's ResNet with three stages: a 4 x 4 stem of stride 2, no max-pooling, ResNet-D's shortcuts."""
    from timm.models.resnet import BasicBlock, ResNet
    from torch import nn

    channels = (width, 2 * width, 4 * width)
    net: Any = ResNet(BasicBlock, (1, 1, 1), num_classes=10, channels=channels, avg_down=True)
    net.conv1, net.maxpool = nn.Conv2d(3, channels[0], 4, 2, 1, bias=False), nn.Identity()
    net.layer4 = nn.Identity()  # which its forward pass calls
    return net


def pooled_network(width: int) -> Any:
    """timm's blocks, each behind a convolution and max-pooling: the network of `resnet-pool11`."""
    from timm.layers import SelectAdaptivePool2d
    from timm.models.resnet import BasicBlock
    from torch import nn

    dim = 3 * width // 8
    layers = [nn.Conv2d(3, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
    for channels in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(dim, channels, 3, 1, 1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), BasicBlock(channels, channels)]
        dim = channels
    return nn.Sequential(*layers, SelectAdaptivePool2d(flatten=True), nn.Linear(dim, 10))


NETWORKS = {"strided": strided_network, "pooled": pooled_network}


def plain(given: Namespace) -> None:
    """Train, and append a line to `given.rows` after each epoch."""
    import torch
    from torch import nn

    from benchmarks.peers import import_timm

    import_timm()
    from timm.optim import create_optimizer_v2

    from skipway.hardware.device import cpu_has_bfloat16

    torch.manual_seed(given.seed)
    train_loader, test_loader = loaders(given)
    net: Any = NETWORKS[given.network](given.width).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(net, opt="sgd", lr=given.lr, weight_decay=DECAY, momentum=0.9)
    steps = given.epochs * len(train_loader)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, given.lr, total_steps=steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
    )
    half = cpu_has_bfloat16()
    for epoch in range(1, given.epochs + 1):
        net.train()
        loss_sum = 0.0
        for images, labels in train_loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = net(images.to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            loss_sum += loss.item()
        net.eval()
        correct = 0
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            for images, labels in test_loader:
                images = images.to(memory_format=torch.channels_last)
                correct += int(((net(images) + net(images.flip(-1))).argmax(1) == labels).sum())
        accuracy = correct / len(test_loader.dataset)
        row = {"epoch": epoch, "validation_accuracy": accuracy, "train_loss": loss_sum / len(train_loader)}
        with given.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
