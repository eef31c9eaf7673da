"""The monitor in anybody's loop: it changes nothing, and reads what the training's own passes do."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import skipway as sw
from skipway.monitoring import EarlyWarning, Watch
from skipway.monitoring.attention import largest_logit
from skipway.monitoring.ranks import SamplingRanks, count_copies, find_ranks
from skipway.monitoring.updates import WeightSample
from skipway.probes import Probe


class Encoder(nn.Module):
    """Blocks of torch, with dropout."""

    def __init__(self, dropout: float = 0.1, checkpointed: bool = False) -> None:
        super().__init__()
        blocks = [nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks, self.head, self.checkpointed = nn.ModuleList(blocks), nn.Linear(16, 4), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x.mean(1))


class OwnLoss(nn.Module):
    """Returns its loss and its logits, as transformers' models do."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.net, self.reduction = Encoder(0.0), reduction

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return F.cross_entropy(logits, labels, reduction=self.reduction), logits


def resnet() -> nn.Module:
    return sw.build("resnet-cifar", depth=8, width=4, classes=4, scheme="stochasticdepth(0.3)")


def batch(step: int, kind: type | None = None, count: int = 40) -> tuple[Tensor, Tensor]:
    shape = (count, 5, 16) if kind is Encoder else (count, 3, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)), torch.arange(count) % 4


def train(
    make: Callable[[], nn.Module], *, watched: bool, steps: int = 12, accumulate: int = 1, compiled: str = "",
    autocast: bool = False, scaled: bool = False,
) -> tuple[list[Any], Watch | None]:  # fmt: skip
    """A plain loop; what it ends with."""
    torch.manual_seed(0)
    model = make().train()
    kind = type(model)
    called: Any = torch.compile(model, backend="eager") if compiled == "wrapper" else model
    if compiled == "in place":
        model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
    context = sw.monitor(called, optimizer, every=3, budget=None, scaler=scaler if scaled else None, on_warning=print)
    with context if watched else nullcontext() as watch:
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(accumulate):
                x, labels = batch(accumulate * step + part, kind)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(called(x), labels)
                scaler.scale(loss / accumulate).backward()
            scaler.step(optimizer)
            scaler.update()
            if watch is not None:
                watch.log(loss=loss)
    state = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    state += [value for each in optimizer.state_dict()["state"].values() for value in each.values()]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    return [*state, torch.get_rng_state()], watch


@pytest.mark.parametrize(
    ("make", "choices"),
    [
        (resnet, {}),
        (resnet, {"accumulate": 2, "autocast": True}),
        (Encoder, {"scaled": True}),
        (Encoder, {"compiled": "wrapper"}),
        (Encoder, {"compiled": "in place"}),
        (lambda: Encoder(checkpointed=True), {}),
    ],
    ids=["BatchNorm", "accumulation, AMP", "GradScaler", "compiled", "compiled in place", "checkpointed"],
)
def test_a_training_is_the_same_bit_for_bit(make, choices):
    """Weights, buffers, gradients, optimizer and random state; samples were taken meanwhile."""
    plain, _ = train(make, watched=False, **choices)
    seen, watch = train(make, watched=True, **choices)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert watch is not None
    assert (len(watch.losses), len(watch.norms)) == (12, 12)
    assert [each["step"] for each in watch.samples] == [1, 4, 7, 10]
    assert not watch.remarks
    rows = watch.samples[0]["rows"]
    assert all({"stream", "ratio", "gradient", "update"} <= row.keys() for row in rows.values())


def watched_step(model: nn.Module, call: Callable[[], Tensor], lr: float = 0.0) -> Watch:
    """One step under the monitor."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    with sw.monitor(model, optimizer, on_warning=print) as watch:
        call().backward()
        optimizer.step()
    return watch


@pytest.mark.parametrize("own", [False, True])
def test_a_sample_is_what_the_training_did(own):
    """Without dropout, of a batch of 32: sizes and gradients are those of the step itself, whatever the loss is.

    A model that returns its loss beside its logits does not count the gradient twice.
    """
    torch.manual_seed(0)
    model: nn.Module = OwnLoss() if own else Encoder(0.0)
    x, labels = batch(0, Encoder, 32)
    example = (x, labels) if own else x
    connections = sw.chain(model, example)

    def loss() -> Tensor:
        return model(x, labels=labels)[0] if own else (F.cross_entropy(model(x), labels) * 3).exp()

    with Probe(model, connections, ["stream", "skip", "branch", "gradient_after", "gradient_before"]) as probe:
        loss().backward()
    expected = probe.readings().connections
    watch = watched_step(model, loss)
    rows = watch.samples[0]["rows"]
    assert list(rows) == list(expected)
    for name, row in expected.items():
        assert rows[name]["stream"] == pytest.approx(row["stream"], rel=1e-6)
        assert rows[name]["ratio"] == pytest.approx(row["branch"] / row["skip"], rel=1e-6)
        assert rows[name]["forward_gain"] == pytest.approx(row["stream"] / row["skip"], rel=1e-6)
        assert rows[name]["gradient"] == pytest.approx(row["gradient_after"], rel=1e-5)
        if "gradient_before" in row:
            gain = row["gradient_before"] / row["gradient_after"]
            assert rows[name]["backward_gain"] == pytest.approx(gain, rel=1e-5)
    if own:
        assert watch.losses[0] == pytest.approx(float(loss().detach()))
    else:
        assert math.isnan(watch.losses[0]), "nobody told it"


@pytest.mark.parametrize("own", ["", "mean", "sum"])
def test_of_a_large_batch_the_first_samples_are_read(own):
    """The gradient is that of the loss over the whole batch, at 32 samples of it, whether it is a mean or a sum."""
    torch.manual_seed(0)
    model: nn.Module = OwnLoss(own) if own else Encoder(0.0)
    x, labels = batch(0, Encoder, 64)
    taken: list[Tensor] = []
    block = (model.net if own else model).blocks[1]
    handle = block.register_full_backward_hook(lambda module, given, out: taken.append(out[0][:32]))
    loss = model(x, labels)[0] if own else F.cross_entropy(model(x), labels)
    loss.backward()
    handle.remove()
    watch = watched_step(model, lambda: model(x, labels)[0] if own else F.cross_entropy(model(x), labels))
    row = list(watch.samples[0]["rows"].values())[-1]
    # the model's own loss over 32 samples has other logits' mean than over 64, but the same gradient at each sample
    assert row["gradient"] == pytest.approx(float(taken[0].square().mean().sqrt()), rel=1e-4)


def test_updates_and_norms_are_those_of_the_step():
    """SGD changes w by lr · ∂L/∂w; the norm is that of all gradients (torch.nn.utils.get_total_norm)."""
    torch.manual_seed(0)
    model, (x, labels) = Encoder(0.0), batch(0, Encoder)
    before = copy.deepcopy(dict(model.named_parameters()))
    watch = watched_step(model, lambda: F.cross_entropy(model(x), labels), lr=0.5)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert watch.norms[0] == pytest.approx(float(torch.nn.utils.get_total_norm(list(grads.values()))), rel=1e-6)
    names = [f"blocks.1.{each}" for each in ("norm2", "linear1", "linear2")]
    own = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    change, size = (
        math.sqrt(sum(float(values[name].detach().square().sum()) for name in own)) for values in (grads, before)
    )
    (name,) = (each for each in watch.samples[0]["rows"] if each.startswith("blocks.1") and each.endswith(":2"))
    assert watch.samples[0]["rows"][name]["update"] == pytest.approx(0.5 * change / size, rel=1e-5)


def attention_by_hand(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)


class Attention(nn.Module):
    """x + attention(x), fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(8, 24), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else attention_by_hand(q, k) @ v
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("fused", [True, False])
def test_logits_of_attention(fused):
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(fused), Attention(fused)), torch.randn(4, 6, 8)
    watch = watched_step(model, lambda: model(x).square().sum())
    for block, row in zip(model, watch.samples[0]["rows"].values(), strict=True):
        q, k, _ = block.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        assert row["logits"] == pytest.approx(float((q @ k.mT).detach().abs().max()) / 2, rel=1e-5)
        x = block(x)


def test_logits_with_grouped_keys():
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    expected = max(float((query[:, h] @ key[:, h // 2].mT).abs().max()) for h in range(4)) / math.sqrt(8)
    assert largest_logit(query, key).item() == pytest.approx(expected)


def test_labels_are_read_from_the_gradient():
    """The best constant answer of a cross-entropy, from p − y: labels 0 three times as often as 1."""
    model, x = Encoder(0.0), torch.randn(32, 5, 16)
    labels = (torch.arange(32) % 4 == 0).long()
    watch = watched_step(model, lambda: F.cross_entropy(model(x), labels))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert watch.best_constant() == pytest.approx(entropy + 1 / 64)
    watch = watched_step(model, lambda: model(x).square().mean())
    assert math.isnan(watch.best_constant()), "another loss"
    rare = torch.tensor([0.01, 1.0, 1.0, 1.0])
    watch = watched_step(model, lambda: F.cross_entropy(model(x), labels, weight=rare))
    assert watch.best_constant() == pytest.approx(entropy + 1 / 64), "a weighted mean is one"
    watch = watched_step(model, lambda: F.cross_entropy(model(x), labels, reduction="sum"))
    assert math.isnan(watch.best_constant()), "a sum, with which the entropy of a label cannot be compared"


def test_a_value_that_is_not_finite_is_named_before_the_weights_change():
    torch.manual_seed(0)
    model, seen = Encoder(0.0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sw.monitor(model, optimizer, on_warning=seen.append) as watch:
        for step in range(4):
            x, labels = batch(step, Encoder)
            if step == 2:
                with torch.no_grad():
                    model.blocks[1].linear1.weight.fill_(1e25)
                    model.blocks[1].linear2.weight.fill_(1e25)
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            watch.log(loss=loss)
        reading = watch.deep()
    (warning,) = [each for each in seen if each.rule == "not finite"]
    assert isinstance(warning, EarlyWarning)
    assert warning.step == 3
    assert "first in the forward pass of blocks.1" in warning.text
    assert reading.culprit.startswith("the weight"), "by then the optimizer has stepped"
    assert len(reading.gradients) == 10
    assert watch.history.deep[0]["step"] == 4


def closure_steps(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], given: str) -> Watch:
    """Three steps, with or without a closure."""
    torch.manual_seed(0)
    model = OwnLoss()
    optimizer = optimizer_of(model)
    with sw.monitor(model, optimizer, every=1, budget=None, on_warning=print) as watch:
        for step in range(3):
            x, labels = batch(step, Encoder)

            def closure(x: Tensor = x, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                loss, _ = model(x, labels)
                loss.backward()
                return loss

            if given == "keyword":
                optimizer.step(closure=closure)
            elif given == "place":
                optimizer.step(closure)
            else:
                closure(), optimizer.step()
    return watch


@pytest.mark.parametrize("given", ["keyword", "place"])
def test_a_closure_is_seen_as_the_loop_that_it_is(given):
    """Losses, norms and samples belong to their own steps, with or without a closure."""

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    plain, seen = closure_steps(sgd, "not"), closure_steps(sgd, given)
    assert list(seen.losses) == list(plain.losses)
    assert list(seen.norms) == list(plain.norms)
    assert [each["rows"] for each in seen.samples] == [each["rows"] for each in plain.samples]
    assert seen.samples[0]["step"] == 1


def test_of_several_calls_of_a_closure_the_first_one_is_that_of_the_step():
    """L-BFGS evaluates several times in a step; the first loss of the second step is that before it."""
    passes: dict[float, list[float]] = {}  # by batch; those of the samples are among them, after the first one

    def note(module: nn.Module, args: Any, out: Any) -> None:
        if len(args[0]) == 40:
            passes.setdefault(float(args[0].sum()), []).append(float(out[0].detach()))

    def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
        model.register_forward_hook(note)
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    watch = closure_steps(lbfgs, "place")
    assert len(watch.losses) == 3
    assert all(len(each) > 1 for each in passes.values())
    assert list(watch.losses) == pytest.approx([each[0] for each in passes.values()])


def test_a_closure_that_fails_leaves_the_step_out():
    model, (x, labels) = Encoder(0.0), batch(0, Encoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fails() -> float:
        raise OSError("the batch is lost")

    with sw.monitor(model, optimizer, on_warning=print) as watch:
        with pytest.raises(OSError, match="lost"):
            optimizer.step(fails)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert len(watch.norms) == 1


def test_several_optimizers_make_one_step():
    model, (x, labels) = Encoder(0.0), batch(0, Encoder)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.blocks, model.head)]
    with sw.monitor(model, optimizers, every=1, budget=None, on_warning=print) as watch:
        for _ in range(3):
            F.cross_entropy(model(x), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert len(watch.norms) == 3
    assert all(row["update"] > 0 for row in watch.samples[0]["rows"].values())


class Odd(nn.Module):
    """A network whose additions depend on values, and which counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.passes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        adds = float(x.detach().sum()) > 0
        for layer in self.maps:
            x = layer(x) + x if adds else layer(x)
        return x


def loop_of_12(
    model: nn.Module, optimizer: torch.optim.Optimizer, call: Callable[[], Tensor]
) -> tuple[Watch, list[str]]:
    """A loop, and what was said aloud of it."""
    with warnings.catch_warnings(record=True) as said, sw.monitor(model, optimizer, on_warning=print) as watch:
        warnings.simplefilter("always")
        for _ in range(12):
            call().square().mean().backward()
            optimizer.step()
    return watch, [str(each.message) for each in said]


def test_what_cannot_be_sampled_is_said_and_the_training_goes_on():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    watch = watched_step(model, lambda: model(torch.randn(4, 8)).square().mean())
    assert list(watch.samples[0]["rows"]) == ["0", "2"]
    assert any("no residual connection was found" in text and text.endswith("of 0, 2") for text in watch.remarks)
    model, x = Encoder(0.0), batch(0, Encoder)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, said = loop_of_12(model, optimizer, lambda: model.head(model.blocks[0](x)))
    assert len(watch.norms) == 12
    assert said[0].startswith("the loop does not call Encoder itself with gradients, so nothing is sampled")
    odd = Odd()
    watch, _ = loop_of_12(
        odd, torch.optim.SGD(odd.parameters(), lr=1e-3), lambda: odd(torch.full((4, 8), 0.5 - (odd.passes > 5)))
    )
    assert len(watch.norms) == 12
    assert odd.passes == 12, "the monitor's own passes are not counted"
    assert [next(iter(each["rows"])) for each in watch.samples] == [":1", "maps.0"]
    assert watch.remarks[0].startswith("the connections cannot be measured: the additions of this pass are not those")


def test_a_compiled_model_whose_inside_is_watched_is_said():
    model, x = Encoder(0.0), batch(0, Encoder)[0]
    compiled, optimizer = torch.compile(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.1)
    _, said = loop_of_12(model, optimizer, lambda: compiled(x))
    assert said[0].endswith("give monitor() the module that the loop calls, compiled or wrapped as it is")


def test_copies_of_the_model_are_not_watched():
    """An average of weights is a copy; its hooks do nothing."""
    model, x = Encoder(0.0), batch(0, Encoder)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sw.monitor(model, optimizer, on_warning=print) as watch:
        copied, other = copy.deepcopy((model, optimizer))
        copied(x).sum().backward()
        other.step()
        assert watch.recorder is not None
        assert watch.recorder.last is None
        assert watch.step == 0
        model(x).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("choices", "rule"),
    [
        ({"every": 0}, "every=0"),
        ({"budget": 2.0}, "budget=2.0"),
        ({"step": -1}, "step=-1"),
        ({"sink": 3}, "sink=int"),
    ],
)
def test_wrong_choices_are_refused(choices, rule):
    model = nn.Linear(2, 2)
    with pytest.raises(sw.SkipwayError, match=rule):
        sw.monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), **choices)
    with pytest.raises(sw.SkipwayError, match="optimizer=Linear"):
        sw.monitor(model, [model])  # type: ignore[list-item]


WORKER = """
import os, sys, torch
import torch.distributed as dist
from contextlib import nullcontext
from pathlib import Path
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import skipway as sw

torch.set_num_threads(1)
child = os.fork()  # so that torch is imported once
place, rank = Path(sys.argv[1]), int(child == 0)
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)

def train(sharded, watched):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for each in (*model[0].layers, model):
            fully_shard(each, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    with sw.monitor(model, optimizer, every=3, budget=0.5, on_warning=print) if watched else nullcontext() as watch:
        for step in range(8):
            x = torch.randn(8, 5, 16)
            loss = (model(x) - x.flip(1)).square().mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            if watch: watch.log(loss=loss)
        if watch: watch.deep()
    whole = [getattr(each, "full_tensor", lambda each=each: each)() for each in model.state_dict().values()]
    return whole, watch

found = []
for sharded in (False, True):
    plain, _ = train(sharded, False)
    weights, watch = train(sharded, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, weights)), sharded
    assert len(watch.norms) == 8 and not watch.remarks, watch.remarks
    assert bool(watch.samples) == (sharded or rank == 0)
    found.append(list(watch.norms))
assert torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4), found  # the norm over all shards
dist.barrier()
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0
os._exit(ended)  # threads of gloo now and then abort while the interpreter goes down
"""


def test_several_processes_neither_hang_nor_change(tmp_path):
    """DDP and FSDP2 on two processes."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, watches: list[Watch], count: int = 6) -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(32) % 4)
        loss.backward()
        optimizer.step()
        for watch in watches:
            watch.log(loss=loss)


def test_two_monitors_and_a_diagnosis_do_not_see_each_others_passes():
    model = plain_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"every": 2, "budget": None}
    with sw.monitor(model, optimizer, **options) as first, sw.monitor(model, optimizer, **options) as second:
        take_steps(model, optimizer, [first, second])
        call = first.recorder.last if first.recorder is not None else None
        sw.diagnose(model, torch.randn(16, 8), targets=torch.arange(16) % 4, steps=20, remedies=0)
        assert first.recorder is not None
        assert first.recorder.last is call
    with sw.monitor(plain := plain_network(), alone := torch.optim.SGD(plain.parameters(), lr=0.1), **options) as third:
        take_steps(plain, alone, [third])
    assert list(first.losses) == list(second.losses) == list(third.losses)
    assert first.samples[-1]["rows"].keys() == third.samples[-1]["rows"].keys()
    gradients = [[row["gradient"] for row in watch.samples[-1]["rows"].values()] for watch in (first, second, third)]
    assert gradients[0] == gradients[1] == gradients[2]


def test_parameters_that_are_unfrozen_later_count():
    """As long as they are frozen no gradient arrives at the layer, which is no gradient that is not finite."""
    model = plain_network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with sw.monitor(model, optimizer) as watch:
        take_steps(model, optimizer, [watch], 2)
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters())})
        take_steps(model, optimizer, [watch], 2)
    total = math.sqrt(sum(float(each.grad.square().sum()) for each in model.parameters() if each.grad is not None))
    assert watch.norms[-1] == pytest.approx(total, rel=1e-5)


def test_an_optimizer_of_another_model_is_said():
    model, other = plain_network(), plain_network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with sw.monitor(model, optimizer):
            pass
    assert any("holds no parameter of Sequential" in str(each.message) for each in said)


def test_a_deep_reading_before_the_backward_pass_blames_nothing():
    model = plain_network()
    with warnings.catch_warnings(), sw.monitor(model, torch.optim.SGD(model.parameters(), lr=0.1)) as watch:
        warnings.simplefilter("ignore")
        model(torch.randn(4, 8))
        assert watch.deep().culprit == ""


@pytest.mark.parametrize("loss", [None, {"loss": 1.0}, torch.ones(0), "high"])
def test_a_loss_that_is_no_number_is_refused(loss):
    model = plain_network()
    with sw.monitor(model, torch.optim.SGD(model.parameters(), lr=0.1)) as watch:
        take_steps(model, watch.optimizers[0], [watch], 1)
        with pytest.raises(sw.SkipwayError, match="the rule is one number"):
            watch.log(loss=loss)


@pytest.mark.parametrize("wrong", [{"budget": "2 %"}, {"constant": "log 4"}, {"on_warning": 3}, {"sink": sys.stderr}])
def test_arguments_of_a_monitor_are_checked_before_the_training(wrong):
    model = plain_network()
    with pytest.raises(sw.SkipwayError, match=f"{next(iter(wrong))}(=| is )"):
        sw.monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), **wrong)


def test_a_step_that_the_scaler_skips_is_not_judged():
    """A fused optimizer skips it itself, within its step: no warning, no norm, and no sample of an update of 0."""
    model, seen = Encoder(0.0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-116)
    with sw.monitor(model, optimizer, scaler=scaler, every=1, budget=None, on_warning=seen.append) as watch:
        for step in range(3):
            x, labels = batch(step, Encoder)
            optimizer.zero_grad()
            scaler.scale(1e3 * F.cross_entropy(model(x), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert math.isnan(watch.norms[0])
    assert all(map(math.isfinite, watch.norms[1:]))
    assert [each["step"] for each in watch.samples][:1] == [2]
    assert not [each for each in seen if "finite" in each.rule or each.rule == "small update"]


class Wrapper:
    """An optimizer that steps with a scaler, as Accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        self.optimizer, self.scaler = optimizer, scaler

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("told", ["before the step", "after the step"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_losses_of_a_step_that_the_scaler_leaves_out_do_not_count(told, wrapped):
    """Two of five steps overflow; what is told of them is the loss of no step, and the scaler is left as it was."""
    model = Encoder(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapper = Wrapper(optimizer, scaler)
    choices = {} if wrapped else {"scaler": scaler}
    with sw.monitor(
        model, wrapper if wrapped else optimizer, every=1, budget=None, on_warning=print, **choices
    ) as watch:
        for number in range(5):
            x, labels = batch(number, Encoder)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), labels) * (math.inf if number in (0, 3) else 1.0)).backward()
            if told == "before the step":
                watch.log(loss=number)
            wrapper.step()
            if told == "after the step":
                watch.log(loss=number)
    assert list(watch.losses) == [1, 2, 4]
    assert "step" not in vars(scaler)
    with sw.monitor(model, optimizer, on_warning=print) as plain:
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    largest = [max(row["gradient"] for row in each.samples[-1]["rows"].values()) for each in (watch, plain)]
    assert largest[0] == pytest.approx(largest[1], rel=1e-4), "the scale is divided out"


def test_a_step_that_one_of_two_optimizers_takes_counts():
    """The scaler leaves out one of them, at whose weights the gradient is not finite; the step keeps its loss."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sw.monitor(model, optimizers, scaler=scaler, on_warning=lambda warning: None) as watch:
        for number in range(4):
            model.zero_grad()
            scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            for layer in model if number == 2 else model[number : number + 1] if number < 2 else ():
                layer.weight.grad.fill_(math.inf)
            watch.log(loss=number)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    assert list(watch.losses) == [0, 1, 3]


def test_a_loss_that_is_told_after_the_step_replaces_the_models_own():
    model = OwnLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sw.monitor(model, optimizer, on_warning=print) as watch:
        for step in range(2):
            model(*batch(step, Encoder))[0].backward()
            optimizer.step()
            watch.log(loss=step + 1)
            watch.log(loss=step + 2)
    assert list(watch.losses) == [1.5, 2.5]


class Contrast(nn.Module):
    """Returns embeddings and a temperature, as CLIP does, in some order and form."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.image, self.text, self.scale = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.tensor(1.0))
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.image(x), self.text(x), self.scale.exp())


def contrast(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * image @ text.T, torch.arange(len(image)))


@pytest.mark.parametrize(
    ("form", "of", "known"),
    [
        (lambda i, t, s: (i, t, s), lambda out: contrast(*out), False),
        (lambda i, t, s: (s, i, t), lambda out: contrast(*out[1:], out[0]), False),
        (lambda i, t, s: {"scale": s, "i": i, "t": t}, lambda out: contrast(out["i"], out["t"], out["scale"]), False),
        (lambda i, t, s: {"image": i, "loss": contrast(i, t, s)}, lambda out: out["loss"], True),
        (lambda i, t, s: (contrast(i, t, s), i, t, s), lambda out: out[0] / 3, True),
        (lambda i, t, s: (contrast(i, t, s).reshape(1), *i.chunk(2)), lambda out: out[0].mean(), True),
        (lambda i, t, s: (i.mT.chunk(3), contrast(i, t, s)), lambda out: out[1] + out[0][2].square().mean(), False),
        (lambda i, t, s: (i, contrast(i, t, s)), lambda out: out[1], True),  # logits and loss, as nanoGPT's
        (contrast, lambda out: out, True),
        (contrast, lambda out: -out, False),  # what is maximised is no loss
        (lambda i, t, s: (contrast(i, t, s), i.square().mean()), lambda out: out[0] + out[1], False),
        (lambda i, t, s: (contrast(i, t, s), i), lambda out: out[1].square().mean(), False),
    ],
)
def test_a_number_that_a_model_returns_is_its_loss_where_the_training_minimises_it(form, of, known):
    model, x = Contrast(form), torch.randn(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sw.monitor(model, optimizer, on_warning=print) as watch:
        for _ in range(3):
            of(model(x)).backward()
            optimizer.step()
    expected = contrast(model.image(x), model.text(x), model.scale.exp()).item() if known else math.nan
    assert list(watch.losses) == pytest.approx([expected] * 3, nan_ok=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_tensors_of_one_operator_of_which_one_is_used(compiled):
    """Those that are not used receive no gradient, None; all outputs of a compiled network are of one operator."""
    model: Any = Contrast(lambda image, text, scale: (contrast(image, text, scale), image))
    called = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sw.monitor(called, optimizer, on_warning=print) as watch:
        for _ in range(2):
            called(torch.randn(6, 4))[0].backward()
            optimizer.step()
    assert all(map(math.isfinite, watch.losses))


def test_one_gradient_that_is_not_a_number_does_not_make_the_loss_unknown():
    model = Contrast(contrast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sw.monitor(model, optimizer, on_warning=lambda _: None) as watch:
        for step in range(3):
            (model(torch.randn(6, 4)) * (math.nan if step == 0 else 1.0)).backward()
            optimizer.zero_grad()
            model(torch.randn(6, 4)).backward()
            optimizer.step()
    assert math.isfinite(watch.losses[-1])


def test_a_parameter_that_is_returned_is_left_without_hooks():
    model = Contrast(lambda image, text, scale: (image, text, model.scale))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sw.monitor(model, optimizer, on_warning=print):
        contrast(*model(torch.randn(6, 4))).backward()
        optimizer.step()
    assert not model.scale._backward_hooks


@pytest.mark.parametrize(("placed", "copies"), [((Replicate(), Shard(0)), 2), ((Shard(0), Shard(1)), 1), (None, 0)])
def test_a_norm_counts_each_part_of_a_sharded_gradient_once(placed, copies, monkeypatch):
    """Two groups of three processes, of which each holds the same numbers."""
    parameter = SimpleNamespace(placements=placed, device_mesh=SimpleNamespace(size=(2, 3).__getitem__))
    assert count_copies(parameter, 6) == copies
    monkeypatch.setattr("torch.distributed.all_reduce", lambda each: each.mul_(6))
    ranks = SamplingRanks(0, 6, True, (copies, 0))
    parts = {2: 3, 1: 6, 0: 1}[copies]
    total = ranks.total_norms([torch.tensor([2.0, 1.0])])
    assert float(total) == pytest.approx((parts * 4 + 1) ** 0.5)


@pytest.mark.parametrize(
    ("axes", "placed", "copies"), [("tp", (Shard(0),), 2), (("dp", "tp"), (Replicate(), Shard(0)), 2)]
)
def test_copies_of_a_part_are_counted_outside_of_its_own_mesh_too(axes, placed, copies):
    """Tensor parallelism within data parallelism: each of two groups holds all parts, on a mesh of the group alone."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh[axes], placed, src_data_rank=None))
        assert find_ranks(nn.Linear(1, 1), [weight]).copies == (copies,)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("told", [True, False])
def test_a_residual_warmup_that_is_told_its_step_does_not_stand_still(told):
    model, seen = sw.build("resnet-cifar", depth=8, width=4, classes=4, scheme="prores(30)"), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sw.monitor(model, optimizer, every=2, budget=None, on_warning=seen.append):
        for step in range(12):
            x, labels = batch(step, count=8)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            if told:
                sw.set_step(model, step + 1)
    assert ("warm-up" in [each.rule for each in seen]) is not told


@pytest.mark.parametrize("size", [1e200, 1.7e308])
def test_losses_near_the_largest_number_end_no_training(size):
    model, seen = nn.Linear(2, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sw.monitor(model, optimizer, on_warning=seen.append) as watch:
        for step in range(260):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            watch.log(loss=size * (1 - step / 2600))
            watch.log(loss=size)
    assert len(watch.losses) == 260


def test_updates_of_complex_weights_count_both_parts():
    weight = nn.Parameter(torch.tensor([3 + 4j]))
    sample = WeightSample({"block": [weight]})
    weight.data.add_(1j)
    assert sample.relative_updates()["block"] == pytest.approx(0.2)


def test_a_pass_that_writes_into_a_parameter_is_remarked_on_once():
    class Counting(nn.Linear):
        def forward(self, x):
            self.weight.data.copy_(self.weight)
            with torch.no_grad():
                self.bias.mul_(0.99)
            return super().forward(x)

    net = nn.Sequential(nn.Linear(4, 4), Counting(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with sw.monitor(net, optimizer, every=1, budget=None) as watch:
        for _ in range(3):
            loss = net(torch.ones(8, 4)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.log(loss=loss)
    assert [each for each in watch.remarks if "into the parameter 1.bias" in each] == [
        each for each in watch.remarks if "into the parameter" in each
    ]
    assert sum("into the parameter" in each for each in watch.remarks) == 1
