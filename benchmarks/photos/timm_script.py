"""A fine-tuning script of timm's parts: AdamW with layer decay, warm-up and a cosine, crops and flips."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from benchmarks.peers import import_timm
from benchmarks.photos.trunk import SIZE, create_network, parser, report


@torch.no_grad()
def accuracy(network: nn.Module, loader: DataLoader, half: bool) -> float:
    """Share of the images of a loader that are right."""
    network.eval()
    right = count = 0
    for images, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = network(images.to(memory_format=torch.channels_last))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def start() -> None:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--layer-decay", type=float, default=0.8)
    options.add_argument("--weight-decay", type=float, default=0.05)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--scale", type=float, default=0.35, help="smallest area of a random crop [0.35]")
    options.add_argument("--smoothing", type=float, default=0.1)
    options.add_argument("--batch-norms", action="store_true", help="train with the statistics of batches")
    options.add_argument("--bfloat16", action="store_true")
    given = options.parse_args()
    timm = import_timm()
    from sklearn.model_selection import train_test_split
    from timm.layers import freeze_batch_norm_2d
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from torchvision.datasets import ImageFolder

    torch.manual_seed(given.seed)
    network = create_network(given.weights, num_classes=10, drop_rate=0.2)
    if not given.batch_norms:
        network = freeze_batch_norm_2d(network)
    network = network.to(memory_format=torch.channels_last)
    config = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}, model=network)
    plain = timm.data.create_transform(**config)
    varied = timm.data.create_transform(**config, is_training=True, scale=(given.scale, 1.0), color_jitter=None)
    images = ImageFolder(str(given.data / "train"), varied)
    train, validation = train_test_split(
        range(len(images)), test_size=0.1, stratify=images.targets, random_state=given.seed
    )
    same = ImageFolder(str(given.data / "train"), plain)
    choices = {"num_workers": given.workers, "persistent_workers": True}
    steps = DataLoader(Subset(images, train), given.batch_size, shuffle=True, drop_last=True, **choices)
    evaluation = DataLoader(Subset(same, validation), 64, num_workers=given.workers, persistent_workers=True)
    optimizer = create_optimizer_v2(
        network, "adamw", lr=given.lr, weight_decay=given.weight_decay, layer_decay=given.layer_decay
    )
    total = given.epochs * len(steps)
    scheduler = CosineLRScheduler(
        optimizer, total, warmup_t=total // 10, warmup_lr_init=1e-6, warmup_prefix=True, t_in_epochs=False
    )
    loss_function, done = nn.CrossEntropyLoss(label_smoothing=given.smoothing), 0
    for _ in range(given.epochs):
        network.train()
        for batch, labels in steps:
            scheduler.step_update(done)
            with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
                logits = network(batch.to(memory_format=torch.channels_last))
            optimizer.zero_grad()
            loss_function(logits.float(), labels).backward()
            optimizer.step()
            done += 1
        report(validation=accuracy(network, evaluation, given.bfloat16))
    unseen = DataLoader(ImageFolder(str(given.data / "test"), plain), 64, num_workers=given.workers)
    report(test=accuracy(network, unseen, given.bfloat16))


if __name__ == "__main__":
    start()
