"""One small task, done as each library's documentation says: the programs that `peers` kills, damages and deceives.

Digits of 8x8 pixels, shifted at random; a small residual network with dropout; SGD with a rate that falls every step;
three epochs of eleven steps. Every program is one command that starts and continues: it looks for a checkpoint in its
folder and goes on from there, with a checkpoint every four steps where the library can resume within an epoch. At the
end it leaves `final.safetensors`. None of them knows of the others, or of what is done to it.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["PEERS", "Peer"]

EPOCHS, BATCH, SAVE_EVERY, SEED, RATE = 3, 128, 4, 0, 0.05
State = dict[str, Tensor]


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's training digits as (1, 8, 8), each shifted by up to a pixel by torch's own random numbers."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        self.images = torch.from_numpy(found.images[:1437]).float().div(16).unsqueeze(1)
        self.labels = torch.from_numpy(found.target[:1437])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        right, down = torch.randint(-1, 2, (2,)).tolist()
        return self.images[index].roll((down, right), (-2, -1)), int(self.labels[index])


class Named(Dataset[dict[str, Any]]):
    """The same under the names that a Hugging Face model has for its inputs."""

    def __init__(self) -> None:
        self.digits = Digits()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.digits[index]
        return {"pixel_values": image, "labels": label}


class Block(nn.Module):
    """x + F(x), F two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))


class Net(nn.Module):
    """Three blocks, 14,490 parameters."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)))


class NetForTrainer(nn.Module):
    """The same with a loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def parts(steps: int) -> tuple[Net, torch.optim.Optimizer, Any]:
    """Network, optimizer and schedule."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def loader() -> DataLoader[tuple[Tensor, int]]:
    """Shuffled complete batches."""
    return DataLoader(Digits(), BATCH, shuffle=True, drop_last=True)


def seeded(seed: int) -> None:
    """Every library's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def momenta(optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's tensors by name."""
    return {
        f"optimizer.{number}.{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


# --- plain torch ---------------------------------------------------------------------------------------------------


def plain_save(path: Path, **state: Any) -> None:
    """https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html, "a general checkpoint"."""
    torch.save(state, path)


def plain_load(path: Path, net: nn.Module, optimizer: Any, schedule: Any) -> tuple[int, int]:
    """The other half of it."""
    checkpoint = torch.load(path)
    net.load_state_dict(checkpoint["model_state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    schedule.load_state_dict(checkpoint["scheduler_state_dict"])
    return checkpoint["epoch"], checkpoint["step"]


def plain(out: Path, save_every: int = SAVE_EVERY) -> None:
    """A loop of one's own: torch.save to one file, in place; resumed by skipping the batches that were seen."""
    seeded(SEED)
    batches = loader()
    net, optimizer, schedule = parts(EPOCHS * len(batches))
    path, first, seen = out / "checkpoint.pt", 0, 0
    if path.exists():
        first, seen = plain_load(path, net, optimizer, schedule)
    for epoch in range(first, EPOCHS):
        net.train()
        start, seen = seen, 0
        for step, (images, labels) in enumerate(itertools.islice(batches, start, None), start=start + 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
            if step % save_every == 0:
                plain_save(
                    path,
                    epoch=epoch,
                    step=step,
                    model_state_dict=net.state_dict(),
                    optimizer_state_dict=optimizer.state_dict(),
                    scheduler_state_dict=schedule.state_dict(),
                )
    save_file(net.state_dict(), out / "final.safetensors")


def plain_state(out: Path) -> State:
    """What a resumed run would start from."""
    net, optimizer, schedule = parts(EPOCHS * 11)
    plain_load(out / "checkpoint.pt", net, optimizer, schedule)
    return {**net.state_dict(), **momenta(optimizer)}


# --- Accelerate ----------------------------------------------------------------------------------------------------


def accelerate_folder(out: Path) -> Path | None:
    """As examples/complete_cv_example.py: the folder that changed last."""
    folders = [entry for entry in out.iterdir() if entry.is_dir() and entry.name.startswith("step_")]
    return max(folders, key=os.path.getctime) if folders else None


def accelerate(out: Path, save_every: int = SAVE_EVERY) -> None:
    """examples/complete_cv_example.py: save_state to step_N, load_state, skip_first_batches; a seedable sampler."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(SEED)
    batches = loader()
    net, optimizer, schedule = parts(EPOCHS * len(batches))
    net, optimizer, batches, schedule = accelerator.prepare(net, optimizer, batches, schedule)
    first, seen, done = 0, 0, 0
    folder = accelerate_folder(out)
    if folder is not None:
        accelerator.load_state(str(folder))
        done = int(folder.name.replace("step_", ""))
        first, seen = divmod(done, len(batches))
    for epoch in range(first, EPOCHS):
        net.train()
        batches.set_epoch(epoch)
        active = accelerator.skip_first_batches(batches, seen) if epoch == first and seen else batches
        for images, labels in active:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(net(images), labels))
            optimizer.step()
            schedule.step()
            done += 1
            if done % save_every == 0:
                accelerator.save_state(str(out / f"step_{done}"))
    accelerator.end_training()
    save_file(accelerator.unwrap_model(net).state_dict(), out / "final.safetensors")


def accelerate_state(out: Path) -> State:
    """What a resumed run would start from."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    net, optimizer, schedule = parts(EPOCHS * 11)
    net, optimizer, _, _ = accelerator.prepare(net, optimizer, loader(), schedule)
    accelerator.load_state(str(accelerate_folder(out)))
    return {**accelerator.unwrap_model(net).state_dict(), **momenta(optimizer.optimizer)}


# --- Hugging Face Trainer ------------------------------------------------------------------------------------------


def trainer_of(out: Path, save_every: int) -> Any:
    """transformers' Trainer, with its own defaults but for the task."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        dataloader_drop_last=True,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        optim="sgd",
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        seed=SEED,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    torch.manual_seed(SEED)
    return Trainer(model=NetForTrainer(), args=arguments, train_dataset=Named())


def trainer(out: Path, save_every: int = SAVE_EVERY) -> None:
    """examples/pytorch/image-classification: get_last_checkpoint, then resume_from_checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint

    made = trainer_of(out, save_every)
    folder = out / "trainer"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    made.train(resume_from_checkpoint=last)
    save_file(made.model.state_dict(), out / "final.safetensors")


def trainer_state(out: Path) -> State:
    """What a resumed run starts from: a Trainer resumes, and is stopped before its first step.

    By the documented way in: `train(resume_from_checkpoint=...)` loads weights, optimizer, schedule and state.
    """
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    found: State = {}

    class Stopped(Exception):
        pass

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            optimizer = given["optimizer"]
            found.update({**given["model"].state_dict(), **momenta(getattr(optimizer, "optimizer", optimizer))})
            raise Stopped

    made = trainer_of(out, SAVE_EVERY)
    made.add_callback(Stop())
    try:
        made.train(resume_from_checkpoint=get_last_checkpoint(str(out / "trainer")))
    except Stopped:
        return {name: tensor.clone() for name, tensor in found.items()}
    raise AssertionError("the run was over")


# --- timm ----------------------------------------------------------------------------------------------------------


def timm(out: Path, save_every: int = SAVE_EVERY) -> None:
    """train.py: CheckpointSaver after every epoch, recovery files between them, --resume last.pth.tar."""
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver, random_seed

    random_seed(SEED, 0)
    batches = loader()
    net, optimizer, _ = parts(EPOCHS * len(batches))
    saver = CheckpointSaver(net, optimizer, checkpoint_dir=str(out), recovery_dir=str(out), max_history=2)
    last, first = out / "last.pth.tar", 0
    if last.exists():
        first = int(resume_checkpoint(net, str(last), optimizer, log_info=False) or 0)
    for epoch in range(first, EPOCHS):
        net.train()
        for step, (images, labels) in enumerate(batches):
            done = epoch * len(batches) + step
            # timm's schedules are functions of the step, as this one
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * done / (EPOCHS * len(batches)))) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            if (step + 1) % save_every == 0:
                saver.save_recovery(epoch, batch_idx=step)
        saver.save_checkpoint(epoch, metric=None)
    save_file(net.state_dict(), out / "final.safetensors")


def timm_state(out: Path) -> State:
    """What a resumed run would start from."""
    from timm.models import resume_checkpoint

    net, optimizer, _ = parts(EPOCHS * 11)
    resume_checkpoint(net, str(out / "last.pth.tar"), optimizer, log_info=False)
    return {**net.state_dict(), **momenta(optimizer)}


# --- Skipway -------------------------------------------------------------------------------------------------------


def skipway(out: Path, save_every: int = SAVE_EVERY) -> None:
    """One command."""
    from skipway.cli import main

    status = main(
        [
            *("train", "--out", str(out / "run"), "--resume", "--quiet", "--device", "cpu", "--precision", "float32"),
            *("--model", "resnet20", "--depth", "8", "--width", "8", "--scheme", "skipinit + stochasticdepth(0.2)"),
            *("--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--lr", str(RATE), "--health", "0"),
            *("--save-every", str(save_every), "--validation", "0"),
        ]
    )
    if status:
        raise SystemExit(status)
    save_file(load_file(out / "run" / "last.safetensors"), out / "final.safetensors")


def skipway_state(out: Path) -> State:
    """What a resumed run starts from; that an older checkpoint has to be taken is said, and counts as noticed."""
    from skipway.checkpoint.store import Checkpoints

    snapshot, damaged = Checkpoints(out / "run" / "checkpoints").newest()
    if damaged:
        raise ValueError(damaged[0])
    return {f"{stem}.{name}": tensor for stem, tensors in snapshot.tensors.items() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Peer:
    """A library and how it does the task.

    Args:
        name: for the table.
        train: start or continue in a folder, with a checkpoint every so many steps.
        state: load the newest checkpoint of the folder as a resumed run does; raises if something is noticed.
        newest: the files of the newest checkpoint.
        saver: what writes a checkpoint: (owner, name of the function) once the library is imported.
        libraries: to import before processes are forked.
    """

    name: str
    train: Callable[..., None]
    state: Callable[[Path], State]
    newest: Callable[[Path], list[Path]]
    saver: Callable[[], tuple[Any, str]]
    libraries: tuple[str, ...] = ()


def files_in(folder: Path) -> list[Path]:
    """All files of a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def trainer_newest(out: Path) -> list[Path]:
    """Those of the checkpoint with the highest number."""
    from transformers.trainer_utils import get_last_checkpoint

    return files_in(Path(str(get_last_checkpoint(str(out / "trainer")))))


def saver_of(module: str, *names: str) -> Callable[[], tuple[Any, str]]:
    """Where a function that saves is found."""

    def find() -> tuple[Any, str]:
        from importlib import import_module

        owner: Any = import_module(module)
        for name in names[:-1]:
            owner = getattr(owner, name)
        return owner, names[-1]

    return find


def peers() -> Iterator[Peer]:
    """In the order of the table."""
    here = __name__
    yield Peer("plain torch", plain, plain_state, lambda out: [out / "checkpoint.pt"], saver_of(here, "plain_save"))
    yield Peer(
        *("Accelerate", accelerate, accelerate_state, lambda out: files_in(accelerate_folder(out) or out)),
        *(saver_of("accelerate", "Accelerator", "save_state"), ("accelerate", "accelerate.utils")),
    )
    yield Peer(
        *("HF Trainer", trainer, trainer_state, trainer_newest),
        *(saver_of("transformers", "Trainer", "_save_checkpoint"), ("transformers.trainer", "transformers")),
    )
    yield Peer(
        *("timm", timm, timm_state, lambda out: [out / "last.pth.tar"]),
        *(saver_of("timm.utils.checkpoint_saver", "CheckpointSaver", "_save"), ("timm", "timm.utils", "timm.data")),
    )
    yield Peer(
        *("Skipway", skipway, skipway_state),
        lambda out: files_in(max((out / "run" / "checkpoints").glob("step-*"))),
        saver_of("skipway.checkpoint.store", "Checkpoints", "save"),
    )


PEERS = tuple(peers())
