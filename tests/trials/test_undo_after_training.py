"""Kind: what is undone after training is a mixture of old and learned weights, without a word.

Which parameters an operation puts in, writes into, takes out or leaves alone is read from its definition; the values
before the operation and those that training made are the right ones.

| trial | input | right value |
|---|---|---|
| no parameters | `lesion`, `skip_compute`, `checkpointed`, `reversible`, `accelerate` | all that was learned stays |
| put in | gains, copies, biases that were trained | refused by name; `force` drops them, the others stay |
| written into | `remove_norm`, `start="divide"`, `start="scheme"`, `fold_gains` | refused by name; `force` puts back |
| taken out | `shorten`, `replace_classifier` | refused by name of what would come back; `force` |
| not trained | every operation, without training or after a training pass alone | undone exactly |
| reloaded | every operation, training, then the state dict from before it | undone exactly |
| order | two operations, trained in between | the first is refused, the second undone |
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.surgery.test_depth import Net, X
from torch import nn

import skipway as sw
from skipway import SkipwayError
from skipway.surgery import (
    checkpointed,
    deepen,
    fold_gains,
    lesion,
    remove_norm,
    replace_classifier,
    rescheme,
    reversible,
    shorten,
    skip_compute,
    undo,
)

KEEPING: dict[str, Any] = {
    "lesion": lambda m: lesion(m, X, ["blocks.1"]),
    "skip_compute": lambda m: skip_compute(m, X, 0.5),
    "checkpointed": lambda m: checkpointed(m, X, 2),
    "reversible": lambda m: reversible(m, X),
    "accelerate": lambda m: sw.accelerate(m, X),
    "stochastic depth": lambda m: rescheme(m, X, "stochasticdepth(0.2)"),
}
# a name in the message, after every parameter was trained
REFUSED: dict[str, tuple[Any, str]] = {
    "layerscale": (lambda m: rescheme(m, X, "layerscale"), "blocks.0.bn2.residual_scale.gain"),
    "skipinit": (lambda m: rescheme(m, X, "skipinit"), "residual_scale.gain"),
    "divide": (lambda m: rescheme(m, X, "skipinit(init=0.5)", start="divide"), "blocks.0.bn2.weight"),
    "scheme": (lambda m: rescheme(m, X, "zeroinit", start="scheme"), "stem.0.weight"),
    "deepen": (lambda m: deepen(m, X, 2), "residual_scale.conv1.weight"),
    "fold": (lambda m: remove_norm(m, X, how="fold"), "stem.0.weight"),
    "calibrate": (lambda m: remove_norm(m, X, how="fold", calibrate=True), "stem.0.weight"),
    "remove_norm": (lambda m: remove_norm(m, X), "stem.0.weight"),
    "normfree": (lambda m: remove_norm(m, X, how="normfree"), "blocks.0.conv1.weight"),
    "shorten": (lambda m: shorten(m, X, 2), "put blocks."),
    "replace_classifier": (lambda m: replace_classifier(m, X, 3), "head.weight"),
    "fold_gains": (lambda m: (rescheme(m, X, "skipinit"), fold_gains(m, X))[1], "blocks.0.bn2.weight"),
}
ALL = {**KEEPING, **{name: operate for name, (operate, _) in REFUSED.items()}}


def network() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(X).square().mean().backward()
        optimizer.step()
    model.eval()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", KEEPING)
def test_what_holds_no_parameters_is_undone_with_all_that_was_learned(name):
    model = network()
    before, operation = values(model), KEEPING[name](model)
    train(model)
    learned = values(model)
    operation.undo()
    assert equal(values(model), learned)
    assert not equal(learned, before)
    assert [type(module) for module in model.modules()] == [type(module) for module in network().modules()]


@pytest.mark.parametrize("name", REFUSED)
def test_a_mixture_is_refused_and_can_be_had(name):
    operate, named = REFUSED[name]
    model = network()
    shape = copy.deepcopy(model)
    if name == "fold_gains":
        rescheme(shape, X, "skipinit")
    before, operation = values(shape), operate(model)
    after = values(model)
    train(model)
    learned, classes = values(model), [type(module) for module in model.modules()]
    with pytest.raises(SkipwayError, match="changed since") as problem:
        undo(operation)
    assert named in str(problem.value)
    assert "undo(force=True)" in str(problem.value)
    assert equal(values(model), learned)
    assert [type(module) for module in model.modules()] == classes
    assert not operation.undone
    undo(operation, force=True)
    mixed = values(model)
    assert mixed.keys() == before.keys()
    untouched = [key for key in before if key in after and torch.equal(before[key], after[key])]
    for key in mixed:  # of those that hold equal values before and after, some were written into all the same
        assert torch.equal(mixed[key], before[key]) or (key in untouched and torch.equal(mixed[key], learned[key]))


@pytest.mark.parametrize("how", ["at once", "after a pass", "after loading"])
@pytest.mark.parametrize("name", ALL)
def test_what_was_not_trained_is_undone_exactly(name, how):
    model = network()
    expected = model(X).detach()
    before, operation = values(model), ALL[name](model)
    state = copy.deepcopy(model.state_dict())
    if how == "after a pass":
        model.train()(X).sum().backward()
    elif how == "after loading":
        train(model)
        model.load_state_dict(state)
    operation.undo()
    if name != "fold_gains":  # there the gains are back
        assert equal(values(model), before)
    if how == "at once":
        assert torch.equal(model.eval()(X), expected)


def test_gains_that_were_not_trained_go_and_the_rest_stays():
    model = network()
    operation = rescheme(model, X, "layerscale")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("residual_scale" not in name)
    train(model)
    learned = {name: value for name, value in values(model).items() if "residual_scale" not in name}
    operation.undo()
    assert equal(values(model), learned)


def test_a_later_operation_is_undone_and_an_earlier_one_that_was_trained_is_not():
    model = network()
    first = rescheme(model, X, "layerscale")
    train(model)
    second = deepen(model, X, 1)
    second.undo()
    with pytest.raises(SkipwayError, match="residual_scale"):
        first.undo()


def test_several_operations_as_one():
    model = network()
    with sw.surgery.transaction.transaction(model, X, title="both") as change:
        rescheme(model, X, "layerscale")
        deepen(model, X, by=1)
        operation = change.commit()
    train(model)
    with pytest.raises(SkipwayError, match="'both': .*changed since"):
        operation.undo()
    operation.undo(force=True)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("force", [False, True])
def test_another_type_is_no_value_that_can_be_put_back(dtype, force):
    model = network()
    operation = remove_norm(model, X)
    model.to(dtype)
    with pytest.raises(SkipwayError, match=f"moved to {dtype} since, .* stayed in torch.float32"):
        operation.undo(force=force)


def test_values_written_by_one_of_several_operations_as_one():
    model = network()
    with sw.surgery.transaction.transaction(model, X, title="both") as change:
        rescheme(model, X, "zeroinit", start="scheme")
        operation = change.commit()
    train(model)
    with pytest.raises(SkipwayError, match="'both': stem.0.weight.* changed since"):
        operation.undo()


def test_values_that_are_no_numbers_are_values_too():
    model = network()
    operation = deepen(model, X, 1)
    with torch.no_grad():
        next(model.blocks.children()).conv1.weight.fill_(float("nan"))
    operation.undo()
