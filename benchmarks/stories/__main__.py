"""Diagnose every story, train it as reported and as mended, and print the table of benchmarks/stories/stories.md.

    python -m benchmarks.stories [NAME…]       # all of them: about five minutes on one core

The score is the share of the loss of the best constant answer that training removes: 0 is a network that knows the
mean of the targets or the frequencies of the classes, 1 one that is always right. It is measured on batches that were
trained on, with each sample's own target, and with random bytes in the place of those that a decoder may not see.
"""

from __future__ import annotations

import copy
import sys

import torch

import skipway as sw
from benchmarks.stories.catalogue import STORIES, Attempt, Story
from skipway.diagnosis import Settings
from skipway.optim.schedules import set_lr

__all__ = ["diagnose_story", "main", "score", "train_attempt"]

STEPS, MEASURED = 300, 8


def diagnose_story(story: Story) -> tuple[Attempt, sw.Diagnosis]:
    """The rebuilt network with its diagnosis, on fresh batches."""
    torch.manual_seed(0)
    attempt = story.attempt()
    planned = {"steps": STEPS, "allowance": 0.2, **attempt.settings}
    return attempt, sw.diagnose(attempt.model, attempt.batches, loss=attempt.loss, **planned)


def train_attempt(attempt: Attempt, settings: Settings, steps: int = STEPS) -> None:
    """Train the network of an attempt, in place, until a loss is not finite."""
    attempt.model.train()
    optimizer = settings.make(attempt.model)
    for step in range(steps):
        x, y = attempt.batches[step % len(attempt.batches)]
        loss = attempt.loss(attempt.model(x), y)
        if not bool(loss.isfinite()):
            return
        optimizer.zero_grad()
        loss.backward()
        set_lr(optimizer, settings.factor(step))
        optimizer.step()


@torch.no_grad()
def score(attempt: Attempt) -> float:
    """Share of the best constant answer's loss that the network of an attempt removes; NaN where it has diverged."""
    measure, total, constant = attempt.yardstick or attempt.loss, 0.0, 0.0
    for x, y in attempt.batches[:MEASURED]:
        constant += constant_loss(attempt, y) / MEASURED
        if attempt.disturb is None:
            total += float(measure(attempt.model(x), y)) / MEASURED
            continue
        seen = attempt.disturb(x)
        for place, inputs in zip(range(8, 24, 2), seen, strict=True):
            part = attempt.model(inputs)[:, place : place + 1]
            total += float(measure(part, y[:, place : place + 1])) / MEASURED / len(seen)
    return 1 - total / constant


def constant_loss(attempt: Attempt, targets: torch.Tensor) -> float:
    """The loss of the best answer that is the same for all inputs: the entropy of the classes, or the variance."""
    if targets.is_floating_point():
        return float(torch.cat([y.flatten() for _, y in attempt.batches]).var(correction=0))
    counts = torch.cat([y.flatten() for _, y in attempt.batches]).bincount().double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def tell(story: Story) -> str:
    """A row of the table."""
    attempt, found = diagnose_story(story)
    named = [finding.rule for finding in found.findings]
    before = copy.copy(attempt)
    if story.advice is None:
        # where the loss falls all the same no remedy is tried, and the finding names its own
        named_by = next((finding.remedies[:1] for finding in found.findings if finding.rule == story.cause), ())
        treatment = found.fix(*(() if found.offers else named_by))
        after = Attempt(**{**vars(attempt), "model": treatment.model})
        settings, did = treatment.settings, "; ".join(map(str, treatment.applied))
    else:
        torch.manual_seed(0)
        after, settings, did = story.advice(), found.settings, "as the finding says"
    train_attempt(before, found.settings)
    train_attempt(after, settings)
    cause = f"**{story.cause}**" if story.cause in named else f"{story.cause} missed: {', '.join(named) or 'none'}"
    verdict = f"{found.verdict} ({found.odds:.0%})".replace("%", " %")
    return (
        f"| [{story.name}]({story.thread}) | {verdict} | {cause} | {did} | {score(before):.2f} → {score(after):.2f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    print("| story | verdict (odds) | cause named | what mended it | score before → after |")
    print("|---|---|---|---|---|")
    for story in STORIES:
        if not wanted or any(each in story.name for each in wanted):
            print(tell(story), flush=True)


if __name__ == "__main__":
    main()
