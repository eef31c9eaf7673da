"""Values that are not finite never reach weights, EMA or optimizer, and the right place is named."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.peers import import_timm, import_transformers
from skipway.checkpoint import files as storage
from skipway.checkpoint.files import read_json, read_tensors
from skipway.checkpoint.store import Checkpoints
from skipway.errors import DivergedError
from skipway.probes.nonfinite import Culprit, find_culprit
from skipway.recipe import Recipe
from skipway.tracing.chain import chain
from skipway.training import clock, loop, recovery
from skipway.training import step as steps
from skipway.training.distributed import Ranks
from skipway.training.loop import train
from skipway.training.reporter import SilentReporter
from skipway.training.run import Run

pytestmark = pytest.mark.usefixtures("few_digits")
RECIPE = Recipe(depth=8, width=4, epochs=2, batch_size=14, device="cpu", precision="float32", ema=0.9, save_every=4)
STEPS = 10  # in an epoch of 142 images


def poison(run: Run, kind: str, step: int, value: float) -> str:
    """Let a number go wrong at a step of the first epoch; returns what has to be named."""
    connections = list(chain(run.model))
    target = connections[step % len(connections)]

    def now() -> bool:
        return run.progress.epoch == 0 and run.progress.step == step

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
def test_thirty_injections(tmp_path, monkeypatch, kind):
    """Six steps for each of five kinds: the first and the last of an epoch, and at each of the three connections both
    values. Named correctly each time, and nothing is spoilt.
    """
    real, seen = loop.build_run, []
    monkeypatch.setattr(loop, "build_run", lambda *given, **options: seen.append(real(*given, **options)) or seen[-1])
    begun = loop.report_preflight
    for step in (0, 1, 2, 4, 5, 9):
        expected: list[str] = []
        value = math.nan if step % 2 else math.inf

        def arm(run, *rest, step=step, value=value, expected=expected):
            begun(run, *rest)
            expected.append(poison(run, kind, step, value))

        monkeypatch.setattr(loop, "report_preflight", arm)
        out = tmp_path / str(step)
        with pytest.raises(DivergedError) as caught:
            train(RECIPE, out)
        run = seen[-1]
        assert expected[0] in str(caught.value)
        assert f"step {step + 1} of {STEPS}" in str(caught.value)
        about = read_json(out / "bundle/about.json")
        assert len(about["files"]) == RECIPE.batch_size
        assert (out / "bundle/batch.safetensors").exists()
        states = [value for state in run.optimizer.state.values() for value in state.values()]
        kept = [*run.ema.tensors.values(), *(each for each in states if isinstance(each, torch.Tensor))]
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


def spoil_once(monkeypatch, step: int) -> list[Run]:
    """Let the loss go wrong at this step of an epoch, the first time that it is taken; returns the runs."""
    begun, armed = loop.report_preflight, []

    def arm(run, *rest):
        begun(run, *rest)
        left = [1]
        real = run.loss

        def loss(logits, targets):
            if run.progress.step == step and left[0]:
                left[0] -= 1
                return real(logits, targets) * math.nan
            return real(logits, targets)

        run.loss = loss
        armed.append(run)

    monkeypatch.setattr(loop, "report_preflight", arm)
    return armed


def test_a_fault_that_passes_is_overcome(tmp_path, monkeypatch):
    """One bad step: the run goes back to its last checkpoint and ends, at half the rate."""

    class Late(SilentReporter):
        def message(self, label, text):
            if label == "diverged":  # measured between the checkpoint and the bad step
                armed[0].folder.append_health({"step": 999, "connections": {}})

    armed = spoil_once(monkeypatch, 6)
    outcome = train(replace(RECIPE, diverged="retry"), tmp_path / "run", reporter=Late())
    assert outcome.finished
    assert (armed[0].progress.lr_scale, armed[0].progress.retries) == (0.5, 1)
    rows = outcome.folder.read_steps()
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert all(row["step"] <= 2 * STEPS for row in outcome.folder.read_health())


def test_a_run_that_was_made_longer_goes_back_to_the_longer_plan(tmp_path, monkeypatch):
    recipe = replace(RECIPE, save_every=None, diverged="retry")
    train(replace(recipe, epochs=1), tmp_path / "run")
    armed = spoil_once(monkeypatch, 2)
    outcome = train(recipe, tmp_path / "run", resume=True)
    assert (outcome.finished, outcome.epoch, armed[0].progress.retries) == (True, 2, 1)


@pytest.mark.parametrize("save_every", [4, None])
def test_weights_that_go_wrong_in_the_last_update_of_an_epoch_are_taken_back(tmp_path, monkeypatch, save_every):
    """The loss of the last step is finite, and its update is not: nothing of it is validated or written."""
    real, left = steps.update_weights, [1]

    def update(run, is_finite):
        updated = real(run, is_finite)
        if run.progress.step == STEPS and left[0]:
            left[0] = 0
            with torch.no_grad():
                next(run.model.parameters()).fill_(math.nan)
        return updated

    monkeypatch.setattr(steps, "update_weights", update)
    outcome = train(replace(RECIPE, diverged="retry", save_every=save_every), tmp_path / "run")
    assert (outcome.finished, outcome.epoch, left) == (True, 2, [0])
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(outcome.folder.best)[0].values())
    assert [row["epoch"] for row in outcome.folder.read_metrics()] == [1, 2]


def test_all_processes_go_back_to_the_same_checkpoint(tmp_path, monkeypatch):
    """The first one writes in the background: what another one finds when they meet is what the first one loads."""
    seen, point = [], storage.fault_point
    monkeypatch.setattr(storage, "fault_point", lambda name: (name == "verified" and time.sleep(0.3), point(name)))
    armed = spoil_once(monkeypatch, 9)

    def meet(ranks):
        if armed and armed[0].progress.step >= 9:
            seen.append(Checkpoints(armed[0].folder.checkpoints).newest()[0].step)

    monkeypatch.setattr(Ranks, "barrier", meet)
    real = recovery.load_newest_checkpoint

    def load(run):
        found = real(run)
        seen.append(run.global_step)
        return found

    monkeypatch.setattr(recovery, "load_newest_checkpoint", load)
    begun = loop.build_run

    def build(*given, **options):
        run = begun(*given, **options)
        run.checkpoints.background = True
        return run

    monkeypatch.setattr(loop, "build_run", build)
    assert train(replace(RECIPE, epochs=1, diverged="retry"), tmp_path / "run").finished
    assert seen[:2] == [8, 8]


def test_the_time_is_estimated_once(tmp_path, monkeypatch):
    """A retry does not change how long the steps take that are left."""

    class Counting(SilentReporter):
        estimates = 0

        def estimate(self, seconds):
            self.estimates += 1

    monkeypatch.setattr(clock, "TIMED_STEPS", 2)
    spoil_once(monkeypatch, 6)
    reporter = Counting()
    assert train(replace(RECIPE, diverged="retry"), tmp_path / "run", reporter=reporter).finished
    assert reporter.estimates == 1


class Spoiler(torch.autograd.Function):
    """The identity, whose output or gradient is multiplied by `value`."""

    @staticmethod
    def forward(context, x, value, backward):
        context.value = value if backward else 1.0
        return x * (1.0 if backward else value)

    @staticmethod
    def backward(context, gradient):
        return gradient * context.value, None, None


class Block(nn.Module):
    """A block of somebody's network with two connections; `spoil` is where and how it goes wrong."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.mlp = nn.Linear(width, width), nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.spoil: tuple[int, float, bool] | None = None

    def forward(self, x):
        for number, branch in enumerate(((self.norm1, self.mix), (self.norm2, self.mlp))):
            h = branch[0](x)
            if self.spoil is not None and self.spoil[0] == number:
                h = Spoiler.apply(h, *self.spoil[1:])
            x = x + branch[1](h)
        return x


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["forward", "gradient"])
@pytest.mark.parametrize("k", range(6))
def test_the_connection_is_named_in_anybodys_network(k, kind, value):
    model = nn.Sequential(nn.Linear(4, 8), *(Block() for _ in range(3)), nn.LayerNorm(8), nn.Linear(8, 2))
    model[1 + k // 2].spoil = (k % 2, value, kind == "gradient")
    x = torch.randn(5, 4)
    culprit = find_culprit(model, x, lambda: model(x).square().sum())
    assert (culprit.kind, culprit.name) == (kind, f"{1 + k // 2}:{1 + k % 2}")
    assert str(culprit).startswith(
        f"first in the {'forward pass' if kind == 'forward' else 'gradient'} of {culprit.name}"
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model[1 + k // 2].spoil = None
    assert find_culprit(model, x, lambda: model(x).square().sum()).kind == "gone"


def test_stem_and_head_and_overflow_are_named():
    model = nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    hook = model[3].register_forward_hook(lambda _, given, out: out * math.inf)
    assert find_culprit(model, x, lambda: model(x).sum()) == Culprit("forward", "3")
    hook.remove()
    hook = model[0].register_forward_hook(lambda _, given, out: out * math.nan)
    assert find_culprit(model, x, lambda: model(x).sum()) == Culprit("forward", "0")
    hook.remove()
    with torch.no_grad():
        model[2].mlp[0].weight.fill_(3e38)
    assert find_culprit(model, x, lambda: model(x).sum()) == Culprit("forward", "2:2", "2.mlp.0")
    assert (
        str(find_culprit(model, x, lambda: model(x).sum())) == "first in the forward pass of 2:2, in its module 2.mlp.0"
    )


def test_a_network_that_cannot_be_watched_is_searched_by_module():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.one(x)
            if self.training:  # other additions than in evaluation mode
                x = self.two(x) * math.inf
            return x + self.two(x)

    model = Reader().train()
    x = torch.randn(3, 4)
    culprit = find_culprit(model, x, lambda: model(x).sum())
    assert culprit.kind == "forward"


def test_timm_and_transformers():
    try:
        timm, transformers = import_timm(), import_transformers()
    except ImportError:
        pytest.skip("timm or transformers is not installed")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4)
    x = torch.randn(2, 3, 32, 32)
    hook = model.blocks[2].mlp.fc1.register_forward_hook(lambda _, given, out: out * math.nan)
    assert find_culprit(model, x, lambda: model(x).sum()) == Culprit("forward", "blocks.2:2", "blocks.2.mlp.fc1")
    hook.remove()
    config = transformers.GPT2Config(
        n_layer=3, n_embd=16, n_head=2, vocab_size=50, n_positions=32, activation_function="gelu"
    )
    model, ids = transformers.GPT2LMHeadModel(config), torch.randint(50, (2, 7))

    def spoil(module, given, out):
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * math.inf)

    model.transformer.h[1].mlp.c_fc.register_forward_hook(spoil)
    culprit = find_culprit(model, {"input_ids": ids}, lambda: model(ids, labels=ids).loss)
    assert (culprit.kind, culprit.name) == ("gradient", "transformer.h.1:2")


def test_a_complex_value_that_is_not_finite_is_found():
    class Rotated(nn.Module):
        def forward(self, x):
            return torch.complex(x, x / 0)

    model, x = nn.Sequential(nn.Linear(2, 2), Rotated()), torch.randn(3, 2)
    assert find_culprit(model, x, lambda: model(x).real.sum() * torch.nan) == Culprit("forward", "1")
