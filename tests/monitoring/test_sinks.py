"""Where records go: files that can be read back, loggers of others by what they can do, callbacks of trainers."""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.cli import main
from skipway.errors import SkipwayError
from skipway.monitoring import read_history
from skipway.monitoring.journal import WatchJournal
from skipway.monitoring.rules import Evidence
from skipway.monitoring.sinks import as_sinks


def train(sink: Any, steps: int = 20, spoil: int = -1) -> sw.monitoring.Watch:
    """A short training of a small network."""
    torch.manual_seed(0)
    model = sw.build("vit-tiny-16", depth=2, dim=8, heads=2, patch=4, image=8, classes=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with sw.monitor(model, optimizer, every=5, budget=None, sink=sink, on_warning=lambda warning: None) as watch:
        for step in range(steps):
            loss = F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            watch.log(loss=loss * (math.nan if step == spoil else 1.0))
    return watch


def test_a_file_holds_what_memory_holds(tmp_path):
    """Standard JSON, also of numbers that are not finite; a cut last line and a running training are read."""
    path = tmp_path / "runs/watch.jsonl"
    watch = train(path, spoil=15)
    read = read_history(path)
    assert list(read.losses) == pytest.approx(list(watch.losses), rel=1e-5, nan_ok=True)
    assert math.isnan(read.losses[15])
    assert list(read.norms) == pytest.approx(list(watch.norms), rel=1e-5)
    assert [each["step"] for each in read.samples] == [each["step"] for each in watch.samples] == [1, 6, 11, 16]
    name, row = next(iter(watch.samples[-1]["rows"].items()))
    assert read.samples[-1]["rows"][name] == pytest.approx(row, rel=1e-5)
    assert [each["text"] for each in read.warnings] == [each["text"] for each in watch.warnings]
    assert any(each["rule"] == "not finite" for each in read.warnings)
    text = path.read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    path.write_text(text[: text.rindex('"kind": "steps"')])
    assert len(read_history(path).losses) == 16


def test_a_continued_training_takes_back_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "watch.jsonl"
    train(path, steps=20)
    assert read_history(path).end
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sw.monitor(model, optimizer, sink=path, step=10, on_warning=print) as watch:
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        watch.log(loss=7.0)
        assert not read_history(path).end  # its page says that it goes on
    read = read_history(path)
    assert read.end
    assert (len(read.losses), read.losses[-1], read.steps) == (11, 7.0, 11)
    assert [each["step"] for each in read.samples] == [1, 6, 11]


@pytest.mark.parametrize("name", ["add_scalar", "log_metrics", "log", "function"])
def test_loggers_of_others(name):
    """TensorBoard's SummaryWriter, MLflow, Weights & Biases, a function."""
    seen: dict[tuple[str, int], float] = {}

    def add_scalar(name: str, value: float, step: int) -> None:
        seen[name, step] = value

    def take(table: dict[str, float], *, step: int | None = None) -> None:
        at = int(table["step"]) if step is None else step
        seen.update({(key, at): value for key, value in table.items() if key != "step"})

    sink = take if name == "function" else SimpleNamespace(**{name: add_scalar if name == "add_scalar" else take})
    watch = train(sink)
    connection, row = next(iter(watch.samples[1]["rows"].items()))
    assert seen[f"skipway/{connection}/ratio", 6] == pytest.approx(row["ratio"])
    assert seen["skipway/loss", 16] == pytest.approx(watch.losses[15])
    assert all(math.isfinite(value) for value in seen.values())


def test_a_sink_that_fails_does_not_end_the_training(tmp_path):
    def full(table: dict[str, float]) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "watch.jsonl"
    with pytest.warns(UserWarning, match="a sink is left out from here on: OSError: .*No space left"):
        watch = train([full, path])
    assert len(watch.losses) == len(read_history(path).losses) == 20
    with pytest.raises(SkipwayError, match="sink=object"):
        as_sinks(object())


def test_the_page_is_written_while_a_training_runs_and_afterwards(tmp_path, capsys):
    path = tmp_path / "watch.jsonl"
    watch = train(path, spoil=18)
    page = sw.report.save(watch, tmp_path / "own.html").read_text()
    assert main(["monitor", str(path), "--out", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    for title in ("Loss", "Norm of all gradients", "Branch over stream", "Backward gain", "Relative update", "logit"):
        assert title in page
        assert title in text
    assert text.count("<svg") >= 8
    assert "the loss is nan" in text
    assert "blocks.0.attention, step 6: " in text
    assert main(["monitor", str(tmp_path / "wacth.jsonl")]) == 2
    assert f"wacth.jsonl does not exist; did you mean {path}?" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text('{"loss": 1}\n')
    assert main(["monitor", str(tmp_path / "other.jsonl")]) == 2
    assert "holds no record of a monitor" in capsys.readouterr().err
    with pytest.raises(SkipwayError, match="of a monitor the rule is a page"):
        sw.report.save(watch, tmp_path / "own.png")


class Network(nn.Module):
    """A network with its loss, as transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(loss=self.net(x).square().mean())


def test_the_callback_for_transformers():
    """The calls that `Trainer` makes, with an optimizer that is wrapped as Accelerate wraps it."""
    import_transformers()
    callback = importlib.import_module("skipway.monitoring.trainer_callback").TrainerMonitor(on_warning=print)
    model, state = Network(), SimpleNamespace(global_step=7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback.on_train_begin(None, state, None, model=model, optimizer=SimpleNamespace(optimizer=optimizer))
    for _ in range(2):
        model(torch.randn(4, 3, 8)).loss.backward()
        optimizer.step()
    callback.on_train_end(None, state, None)
    assert callback.watch.step == 9
    assert callback.watch.losses[-1] > 0
    assert len(callback.watch.samples[0]["rows"]) == 4
    assert not model._forward_hooks


class SharedLoss(Network):
    """Divides by the items of all accumulated batches, as transformers' models do where they are told them."""

    def forward(self, x: torch.Tensor, num_items_in_batch: Any = None) -> Any:
        loss = self.net(x).square()
        return SimpleNamespace(loss=loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch)


@pytest.mark.parametrize("told", [True, False])
def test_losses_of_accumulated_batches_of_transformers_are_those_of_the_whole(told):
    """The mean over all items of the step, whether the model is told their number or not."""
    import_transformers()
    callback = importlib.import_module("skipway.monitoring.trainer_callback").TrainerMonitor(on_warning=print)
    model, state = SharedLoss(), SimpleNamespace(global_step=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    x = torch.randn(8, 3, 8)
    for _ in range(2):
        for part in x.chunk(4):
            model(x=part, num_items_in_batch=torch.tensor(x.numel()) if told else None).loss.backward()
        callback.on_pre_optimizer_step(None, state, None)
        optimizer.step()
    callback.on_train_end(None, state, None)
    with torch.no_grad():
        assert list(callback.watch.losses) == pytest.approx([float(model(x).loss)] * 2)


def test_the_callback_for_lightning(monkeypatch):
    """The calls that Lightning's Trainer makes; the only child is what `training_step` calls."""
    stub = types.ModuleType("lightning.pytorch")
    stub.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", stub)
    monkeypatch.delitem(sys.modules, "skipway.monitoring.lightning_callback", raising=False)
    made = importlib.import_module("skipway.monitoring.lightning_callback").LightningMonitor
    callback, module = made(on_warning=print), nn.Module()
    module.net = Network().net
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    trainer = SimpleNamespace(global_step=0, optimizers=[optimizer], precision_plugin=SimpleNamespace(scaler=None))
    trainer.accumulate_grad_batches = 2
    callback.on_train_start(trainer, module)
    losses = []
    for number in range(4):
        x = torch.randn(4, 3, 8)

        def closure(x=x):
            loss = module.net(x).square().mean()
            (loss / 2).backward()
            losses.append(loss.detach())

        optimizer.step(closure) if number % 2 else closure()
        # Lightning's ClosureResult divides by the accumulated batches
        callback.on_train_batch_end(trainer, module, {"loss": losses[-1] / 2}, None, 0)
    callback.on_train_end(trainer, module)
    assert [each["step"] for each in callback.watch.samples] == [1]
    assert len(callback.watch.samples[0]["rows"]) == 4
    means = [float(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert list(callback.watch.losses) == pytest.approx(means)
    with pytest.raises(SkipwayError, match="network='body'"):
        made("body").find_network(module)
    sys.modules.pop("skipway.monitoring.lightning_callback")


def test_without_lightning_its_callback_says_what_is_missing(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "skipway.monitoring.lightning_callback", raising=False)
    module = importlib.import_module("skipway.monitoring.lightning_callback")
    with pytest.raises(SkipwayError, match="pip install lightning"):
        module.LightningMonitor()
    sys.modules.pop("skipway.monitoring.lightning_callback")


def test_a_training_that_was_killed_while_it_wrote_and_goes_on_is_read_to_its_end(tmp_path):
    """The half line does not swallow what comes after it, whoever wrote the file."""
    path = tmp_path / "watch.jsonl"
    train(path, 6)
    path.write_bytes(path.read_bytes()[:-20])
    train(path, 6)
    history = read_history(path)
    assert len(history.losses) == 6
    assert history.end
    assert history.remarks[-1] == "left out of the file: 1 line that cannot be read"
    path.write_text(path.read_text() + '{"kind": "ste')
    assert read_history(path).remarks == history.remarks  # a last line that is being written is no fault


def test_notes_are_written_and_raise_no_warning():
    """Logits of attention and spikes of the gradient are as frequent in trainings that learn."""
    warned: list[Any] = []
    journal = WatchJournal([], warned.append)
    row = {"stream": 1.0, "gradient": 1.0}
    journal.warn(9, Evidence({"a": row | {"logits": 9.0}}, {"a": row | {"logits": 99.0}}))
    journal.warn(9, Evidence(norms=[50.0], spikes={"gradient norm": 8.0}, recent_spikes=3))
    assert warned == journal.history.warnings == []
    assert [text.partition(":")[0] for text in journal.history.remarks] == ["step 9", "step 9"]
