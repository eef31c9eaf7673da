"""A transaction changes a model completely or not at all: after any exception, Ctrl-C included, all is as before."""

from __future__ import annotations

import copy
import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType

import pytest
import torch
from tests.surgery.test_depth import Net, X
from torch import Tensor, nn

import skipway as sw
from skipway.probes.mixing_matrix import depth_mixing
from skipway.surgery import (
    Operation,
    checkpointed,
    deepen,
    fold_gains,
    influence,
    lesion,
    remove_norm,
    rescheme,
    reversible,
    shorten,
    skip_compute,
)
from skipway.surgery.operation import Journal
from skipway.surgery.sample_axes import awake
from skipway.surgery.transaction import transaction

OPERATIONS: dict[str, Callable[[nn.Module], object]] = {
    "rescheme": lambda m: rescheme(m, X, "layerscale + stochasticdepth"),
    "rescheme, divide": lambda m: rescheme(m, X, "skipinit(init=0.5)", start="divide"),
    "rescheme, scheme": lambda m: rescheme(m, X, "zeroinit", start="scheme"),
    "fold": lambda m: remove_norm(m, X, how="fold"),
    "calibrate": lambda m: remove_norm(m, X, how="fold", calibrate=True),
    "skipinit": lambda m: remove_norm(m, X),
    "normfree": lambda m: remove_norm(m, X, how="normfree"),
    "lesion": lambda m: lesion(m, X, ["blocks.0", "blocks.1"]),
    "influence": lambda m: influence(m, X),
    "shorten": lambda m: shorten(m, X, to=1),
    "deepen": lambda m: deepen(m, X, by=2),
    "skip_compute": lambda m: skip_compute(m, X, rate=0.5),
    "checkpointed": lambda m: checkpointed(m, X, segments=2),
    "reversible": lambda m: reversible(m, X),
    "accelerate": lambda m: sw.accelerate(m, X),
    "fold_gains": lambda m: fold_gains(m, X),
}
PLACES = tuple(str(Path(sw.__file__).parent / part) for part in ("surgery", "tracing/restoration.py"))


def network(name: str = "") -> Net:
    """A network whose modes, statistics, hooks and frozen parameters are not the default ones."""
    torch.manual_seed(0)
    net = Net(2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_var.uniform_(0.5, 2)
    net.blocks[0].bn1.eval()
    net.stem[0].weight.requires_grad_(False)
    net.blocks[1].conv1.register_forward_hook(lambda *_: None)
    if name == "fold_gains":
        rescheme(net, X, "layerscale", start="divide")
    return net


def snapshot(model: nn.Module) -> list[object]:
    """Everything that a module holds: classes, tables in their order, attributes, hooks, and copies of the values."""
    found: list[object] = [list(model.state_dict()), torch.is_grad_enabled()]
    for name, module in model.named_modules():
        held = {key: list(value) if isinstance(value, dict) else value for key, value in sorted(vars(module).items())}
        tensors = (*module._parameters.items(), *module._buffers.items())
        own = [(key, id(t), t.requires_grad, t.grad, t.detach().clone()) for key, t in tensors if t is not None]
        found.append((name, type(module), held, list(map(id, module._modules.values())), own))
    return found


def assert_equal(found: object, expected: object) -> None:
    """Equal to the bit, tensors by value."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@contextmanager
def interrupted(*numbers: int) -> Iterator[list[tuple[str, int]]]:
    """Raise KeyboardInterrupt at some of the lines of surgery and of what puts states back, counted from the start.

    At the end of a `with` statement and at `try:`, a NOP that no handler covers, Python does not look for signals, and
    what a callback of a weak reference raises is lost, so these are no places to raise at.
    """
    lines: list[tuple[str, int]] = []

    def follow(frame, event, argument):
        code = frame.f_code
        return line if code.co_filename.startswith(PLACES) and code.co_name != "<lambda>" else None

    def line(frame, event, argument):
        if event == "line" and not ends_with(frame.f_code, frame.f_lasti, frame.f_lineno):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) in numbers:
                raise KeyboardInterrupt
        return line

    sys.settrace(follow)
    try:
        yield lines
    finally:
        sys.settrace(None)


ENDS: dict[tuple[int, int], bool] = {}
"""What `ends_with` has found, by the identity of the code: its hash is that of all of its instructions."""


def ends_with(code: CodeType, instruction: int, number: int) -> bool:
    """Whether an instruction ends a `with` statement, or does nothing."""
    found = ENDS.get((id(code), instruction))
    if found is None:
        name = dis.opname[code.co_code[instruction]]
        within = source(code.co_filename)[number - 1].lstrip().startswith("with ")
        found = name == "NOP" or (within and name in ("LOAD_CONST", "PUSH_EXC_INFO"))
        ENDS[id(code), instruction] = found
    return found


@cache
def source(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def stopped(operate: Callable[[nn.Module], object], model: nn.Module, *numbers: int) -> str:
    """Interrupt an operation; returns the last line that ran before, or "" if it ran to its end."""
    try:
        with interrupted(*numbers) as lines:
            operate(model)
    except KeyboardInterrupt:
        path, number = lines[numbers[0] - 1]
        return f"{Path(path).name}:{number}"
    return ""


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(name):
    """At lines spread over each operation, and once more while the first interrupt rolls back, at half of them only in
    the latter case.
    """
    operate = OPERATIONS[name]
    operate(network(name))  # classes and kernels are made once
    model = network(name)
    twin = copy.deepcopy(model)
    with interrupted() as lines:
        operate(twin)
    before, total = snapshot(model), len(lines)
    for place in range(8):
        number = total * (2 * place + 1) // 16
        for numbers in ((number, number + 3 + place), (number,))[: 1 + place % 2]:
            assert stopped(operate, model, *numbers), "the operation ran to its end"
            assert_equal(snapshot(model), before)
    operation = operate(model)
    if isinstance(operation, Operation):
        operation.undo()
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_within_the_forward_pass_leaves_the_model_as_it_was(name):
    operate, model = OPERATIONS[name], network(name)
    countdown = [10**6]

    def count(*_: object) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt

    model.blocks[1].register_forward_hook(count)
    before = snapshot(model)
    operation = operate(model)
    if isinstance(operation, Operation):
        operation.undo()
    calls = 10**6 - countdown[0]
    for number in sorted({1, 2, calls // 2, calls - 1, calls} - {0}):
        countdown[0] = number
        with pytest.raises(KeyboardInterrupt):
            operate(model)
        assert_equal(snapshot(model), before)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "influence"])
def test_an_interrupted_undo_is_finished_by_the_next_one(name):
    model = network(name)
    before = snapshot(model)
    operation = OPERATIONS[name](model)
    assert isinstance(operation, Operation)
    with interrupted() as lines:
        operation.undo()
    for number in range(2, len(lines), max(1, len(lines) // 6)):
        operation = OPERATIONS[name](model)
        assert isinstance(operation, Operation)
        stopped(lambda _, operation=operation: operation.undo(), model, number)
        if not operation.undone:
            operation.undo()
        assert_equal(snapshot(model), before)


def test_a_step_is_run_again_after_an_interrupt_and_others_after_a_failure():
    journal, ran, stops = Journal(), [], [KeyboardInterrupt(), KeyboardInterrupt()]

    def step(name: str, *problems: BaseException) -> None:
        ran.append(name)
        if problems or (name == "second" and stops):
            raise (problems or (stops.pop(),))[0]

    journal.steps = [lambda: step("first"), lambda: step("second"), lambda: step("third", OSError("no room"))]
    with pytest.raises(KeyboardInterrupt):
        journal.undo()
    assert ran == ["third", "second", "second", "second", "first"]
    assert not journal.steps


def test_what_is_not_committed_is_put_back_in_its_old_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    before = snapshot(model)
    with transaction(model, title="a trial") as trial:
        trial.remove_module(model, "1")
        trial.set_submodule("0", nn.Identity())
        trial.set_submodule("3", nn.Linear(2, 2))
        trial.set_attribute(model, "note", 1)
        trial.set_parameter(model[1], "weight", None)
        assert list(model._modules) == ["0", "2", "3"]
    assert_equal(snapshot(model), before)


def test_a_transaction_within_another_goes_with_it():
    model = network()
    before = snapshot(model)
    with transaction(model, title="a trial"):
        inner = rescheme(model, X, "layerscale")
    assert inner.undone
    assert_equal(snapshot(model), before)
    with transaction(model, title="two operations") as change:
        inner = remove_norm(model, X, how="fold")
        rescheme(model, X, "fixup")
        outer = change.commit()
    outer.undo()
    assert_equal(snapshot(model), before)
    with pytest.raises(sw.SkipwayError, match="undone already"):
        inner.undo()
    other = network()
    with transaction(model, title="a trial"):
        kept = rescheme(other, X, "layerscale")
    assert not kept.undone


def test_what_was_learned_since_stays():
    model = network()
    operation = rescheme(model, X, "layerscale")
    with torch.no_grad():
        model.head.weight.fill_(3.0)
    model.train()
    handle = model.blocks[0].bn2.register_forward_hook(lambda *_: None)
    operation.undo()
    assert model.head.weight.eq(3.0).all()
    assert model.training
    assert handle.id in model.blocks[0].bn2._forward_hooks


def test_an_operation_cannot_be_changed_and_fits_on_a_screen_at_any_depth():
    with transaction(network(), X, title="many") as change:
        change.touched.update((f"blocks.{number}", "done") for number in range(3000))
        change.refused.update((f"layers.{number}", f"reason {number % 30}") for number in range(3000))
        change.report.update((f"blocks.{number}", 0.1) for number in range(3000))
        operation = change.commit()
    with pytest.raises(AttributeError):
        operation.title = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        operation.touched["blocks.0"] = "undone"  # type: ignore[index]
    change.touched.clear()
    assert len(operation.touched) == 3000
    assert len(str(operation).splitlines()) < 15
    assert max(map(len, str(operation).splitlines())) < 200
    assert str(operation).startswith("many: 3000 changed; difference 0,")
    assert repr(operation) == str(operation)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_example_is_a_tensor_a_tuple_a_mapping_or_a_loader(name):
    """A loader that shuffles is read once, so that outputs before and after are those of one batch."""
    data = torch.utils.data.TensorDataset(torch.cat([X, X + 1]), torch.zeros(16))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    for example in ((X,), {"x": X}, loader):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.surgery.test_transaction.X", example)
            model = network() if name != "fold_gains" else network(name)
            assert OPERATIONS[name](model) is not None


@pytest.mark.parametrize(
    "operate",
    [
        lambda m, x: skip_compute(m, x, 0.5),
        reversible,
        depth_mixing,
    ],
)
def test_numbers_are_drawn_on_the_cpu_wherever_new_tensors_lie(operate):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 3, 8)
    with torch.device("meta"):
        operate(model, x)


def test_a_network_that_was_moved_gets_nothing_back_from_another_device():
    net = Net().eval()
    takes = shorten(net, X, to=1)
    net.to("meta")
    with pytest.raises(sw.SkipwayError, match=r"moved to meta since, .* stayed on cpu; .* model\.to\('cpu'\)"):
        takes.undo(force=True)
    assert not takes.undone
    other = Net().eval()
    keeps = rescheme(other, X, "layerscale")
    other.to("meta")
    keeps.undo(force=True)
    assert {parameter.device.type for parameter in other.parameters()} == {"meta"}


def test_nothing_is_put_back_of_another_type_or_by_a_transaction_within():
    net = Net().eval()
    with transaction(net, X, title="both") as change:
        shorten(net, X, to=1)
        both = change.commit()
    net.to("meta", torch.float64)
    with pytest.raises(sw.SkipwayError, match=r"to meta, torch.float64 .* model\.to\('cpu', torch.float32\)"):
        both.undo(force=True)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).bfloat16())
    with transaction(net, title="two kinds") as change:
        change.set_submodule("2", nn.Identity())
        takes = change.commit()
    net.float()
    with pytest.raises(sw.SkipwayError, match=r"stayed in torch.bfloat16; give each part the device and type"):
        takes.undo(force=True)
    net[1].bfloat16()
    takes.undo()


@pytest.mark.parametrize("place", [torch.bfloat16, torch.device("meta")], ids=str)
def test_a_part_of_a_network_that_was_moved_gets_nothing_back_from_another_place(place):
    net = Net().eval()
    takes = shorten(net, X, to=1)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.to(place)
    with pytest.raises(sw.SkipwayError, match=f"a part of the network was moved to {place} since, .* move the network"):
        takes.undo(force=True)
    assert not takes.undone
    other = Net().eval()
    takes = shorten(other, X, to=1)
    other.register_parameter("extra", nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))  # nothing was moved
    takes.undo()


@pytest.mark.parametrize("operate", [lambda m: sw.remove_norm(m, X), lambda m: shorten(m, X, to=1)])
def test_what_is_put_back_takes_the_mode_and_the_freezing_of_the_network_since(operate):
    for training in (True, False):
        net = Net().train(training)
        net.blocks[0].bn1.eval()
        net.blocks[1].conv1.weight.requires_grad_(False)
        modes = {name: module.training for name, module in net.named_modules()}
        trained = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
        operate(net).undo()
        assert {name: module.training for name, module in net.named_modules()} == modes
        assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == trained
        operation = operate(net)
        net.train(not training).requires_grad_(False)
        operation.undo()
        assert {module.training for module in net.modules()} == {not training}
        assert not any(parameter.requires_grad for parameter in net.parameters())


def test_what_is_put_back_is_left_alone_by_a_change_elsewhere():
    net = Net().train()
    operation = sw.remove_norm(net, X)
    net.blocks[0].eval().requires_grad_(False)
    operation.undo()
    assert [net.blocks[number].bn1.training for number in (0, 1)] == [False, True]
    assert [net.blocks[number].bn1.weight.requires_grad for number in (0, 1)] == [False, True]
    assert net.norm.training
    assert net.norm.weight.requires_grad


class Plain(nn.Module):
    """A norm at the root that a map takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.body, self.head = nn.Sequential(nn.ReLU(), Net().blocks), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.norm(self.stem(x))).mean((2, 3)))


def test_a_norm_at_the_root_is_as_frozen_as_all_else_after_a_linear_probe():
    net = Plain().eval()
    operation = sw.remove_norm(net, X, how="fold")
    assert not list(net.norm.parameters())  # nothing stands in its place that could be frozen
    net.train().requires_grad_(False)
    net.head.requires_grad_(True)
    operation.undo()
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learning == {"head.weight", "head.bias"}


def test_a_classifier_that_is_put_back_after_a_linear_probe_learns():
    net = Net()
    operation = sw.surgery.replace_classifier(net, X, 3)
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    operation.undo()
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learning == {"head.weight", "head.bias"}


def test_an_old_classifier_is_trained_again_after_the_whole_network_is():
    net = Net().requires_grad_(False)
    operation = sw.surgery.replace_classifier(net, X, 3)
    net.requires_grad_(True)
    assert operation.undo(force=True) is net
    assert net.head.weight.requires_grad


def test_flags_go_with_blocks_that_are_numbered_anew():
    blocks = [nn.Linear(2, 2) for _ in range(4)]
    net = nn.Sequential(*blocks)
    with transaction(net, title="shorter") as change:
        change.set_modules(net, {"0": blocks[0], "1": blocks[2], "2": blocks[3]})
        shorter = change.commit()
    blocks[2].requires_grad_(False).eval()
    shorter.undo()
    assert list(net) == blocks
    assert [module.weight.requires_grad for module in net] == [True, True, False, True]
    assert [module.training for module in net] == [True, True, False, True]


def test_random_weights_do_not_stay_after_an_interrupt_at_any_line():
    def operate(model: nn.Module) -> None:
        with awake(model):
            pass

    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with interrupted() as lines:
        operate(model)
    for number in range(1, len(lines) + 1):
        stopped(operate, model, number)
        assert not any(parameter.any() for parameter in model.parameters()), lines[number - 1]
