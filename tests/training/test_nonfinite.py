"""Numbers that are not finite never reach weights, average or optimiser, and the right place is blamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from skipway.checkpoint.files import read_json
from skipway.errors import DivergedError
from skipway.recipe import Recipe
from skipway.tracing.chain import chain
from skipway.training import loop
from skipway.training.loop import train
from skipway.training.run import Run

RECIPE = Recipe(depth=8, width=4, epochs=2, batch_size=128, device="cpu", precision="float32", ema=0.9, save_every=4)
STEPS = 10  # in an epoch of 1,295 images


def poison(run: Run, kind: str, step: int, value: float) -> str:
    """Let a number go wrong at a step of the first epoch; returns what has to be blamed."""
    connections = list(chain(run.model))
    target = connections[step % len(connections)]

    def now() -> bool:
        return run.position.epoch == 0 and run.position.step == step

    if kind == "input":
        real = type(run.data).train_batches

        def batches(**given) -> Iterator:
            for number, batch in enumerate(real(run.data, **given), start=given["start"]):
                wrong = given["epoch"] == 0 and number == step
                yield batch._replace(inputs=batch.inputs.clone().fill_(value)) if wrong else batch

        object.__setattr__(run.data, "train_batches", batches)
        return "the images themselves"
    if kind == "activation":
        target.residual.register_forward_hook(lambda _, given, out: out * value if now() else None)
        return f"first in the forward pass of {target.name}"
    if kind == "gradient":

        def spoil(_, given, out):
            if now():
                out.register_hook(lambda grad: grad * value)

        target.residual.scale.register_forward_hook(spoil)
        return f"first in the gradient of {target.name}"
    if kind == "loss":
        real_loss = run.loss
        run.loss = lambda logits, targets: real_loss(logits, targets) * (value if now() else 1.0)  # type: ignore[method-assign]
        return "the network's output is finite, the loss is not"
    name, parameter = list(run.model.named_parameters())[3 * (step % len(connections)) + 4]

    def before(module, given):
        if now():
            with torch.no_grad():
                parameter.view(-1)[0] = value

    run.model.register_forward_pre_hook(before)
    return f"the weight {name} is not finite"


@pytest.mark.parametrize("kind", ["input", "activation", "gradient", "loss", "weight"])
def test_fifty_injections(tmp_path, monkeypatch, kind):
    """Ten steps for each of five kinds: blamed rightly each time, and nothing is spoilt."""
    real, seen = loop.assemble, []
    monkeypatch.setattr(loop, "assemble", lambda *given: seen.append(real(*given)) or seen[-1])
    begun = loop.introduce
    for step in range(10):
        expected: list[str] = []
        value = math.nan if step % 2 else math.inf

        def arm(run, *rest, step=step, value=value, expected=expected):
            begun(run, *rest)
            expected.append(poison(run, kind, step, value))

        monkeypatch.setattr(loop, "introduce", arm)
        out = tmp_path / str(step)
        with pytest.raises(DivergedError) as caught:
            train(RECIPE, out)
        run = seen[-1]
        assert expected[0] in str(caught.value)
        assert f"step {step + 1} of {STEPS}" in str(caught.value)
        about = read_json(out / "bundle/about.json")
        assert len(about["files"]) == 128
        assert (out / "bundle/batch.safetensors").exists()
        states = [value for state in run.optimizer.state.values() for value in state.values()]
        kept = [*run.average.tensors.values(), *(each for each in states if isinstance(each, torch.Tensor))]
        if kind != "weight":
            kept += list(run.model.parameters())
        assert all(bool(torch.isfinite(tensor).all()) for tensor in kept)
        snapshot, _ = run.checkpoints.newest()
        stored = [tensor for part in snapshot.tensors.values() for tensor in part.values()]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in stored)


def test_going_back_with_half_the_rate(tmp_path):
    """A rate that overflows at once is halved three times; still too high, it is an error that says so."""
    with pytest.raises(DivergedError):
        train(replace(RECIPE, lr=1e30, warmup=0.0, diverged="retry"), tmp_path / "hopeless")


def test_a_fault_that_passes_is_overcome(tmp_path, monkeypatch):
    """One bad step: the run goes back to its last checkpoint and ends, at half the rate."""
    begun, armed = loop.introduce, []

    def arm(run, *rest):
        begun(run, *rest)
        left = [1]
        real = run.loss

        def loss(logits, targets):
            if run.position.step == 6 and left[0]:
                left[0] -= 1
                return real(logits, targets) * math.nan
            return real(logits, targets)

        run.loss = loss
        armed.append(run)

    monkeypatch.setattr(loop, "introduce", arm)
    outcome = train(replace(RECIPE, diverged="retry"), tmp_path / "run")
    assert outcome.finished
    assert (armed[0].position.rate, armed[0].position.retries) == (0.5, 1)
    rows = outcome.folder.read_steps()
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
