"""Operations are undone in reverse order, and a comparison that compares nothing verifies nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.surgery.test_depth import Net, X
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import skipway as sw
from skipway.surgery.checks import EQUAL, ComparisonRule, EqualTraining
from skipway.surgery.parameter_values import summarise
from skipway.surgery.training_pass import TrainingPass
from skipway.surgery.transaction import transaction
from skipway.surgery.verification import difference
from skipway.tracing.containers import tensors_in
from skipway.tracing.samples import agrees


def test_an_earlier_operation_is_not_undone_before_a_later_one():
    model = Net().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = sw.rescheme(model, X, "layerscale")
    second = sw.checkpointed(model, X)
    with pytest.raises(sw.SkipwayError, match=r"a later operation builds on it; undo .* first"):
        first.undo()
    second.undo()
    first.undo()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_operations_on_parts_and_wholes_keep_their_order():
    inner = Net().eval()
    outer = nn.Sequential(inner, nn.Identity())
    first = sw.rescheme(inner, X, "layerscale")
    second = sw.accelerate(outer)
    with pytest.raises(sw.SkipwayError, match="undo .* first"):
        first.undo()
    second.undo()
    first.undo()


def test_checkpointed_blocks_are_not_checkpointed_again():
    model = Net().eval()
    operation = sw.checkpointed(model, X)
    with pytest.raises(sw.SkipwayError, match="already; undo that first"):
        sw.checkpointed(model, X)
    operation.undo()
    sw.checkpointed(model, X).undo()


@dataclass
class Output:
    """What some models return: no tree, and its tensors in a list."""

    maps: list[Tensor]


def test_every_kind_of_output_is_compared():
    one = torch.ones(3)
    assert difference([one.long()], [one.long() + 1]) == 1.0
    assert difference([torch.tensor([7, 2**24, 1])], [torch.tensor([7, 2**24 + 1, 1])]) == pytest.approx(1 / 3)
    assert difference([one.double()], [one.double() * (1 + 1e-12)]) == pytest.approx(1e-12, rel=1e-3)
    assert difference([torch.complex(one, one)], [torch.complex(one, one * 2)]) == 1.0
    assert difference([one > 0], [one < 0]) == 1.0
    assert len(list(tensors_in(Output([one, one])))) == 2
    masked = torch.tensor([1.0, float("-inf"), float("nan")])
    assert difference([masked[:2]], [masked[:2].clone()]) == 0.0
    assert difference([masked[:1]], [masked[2:]]) == float("inf")


def test_nothing_to_compare_is_said():
    with pytest.raises(sw.SkipwayError, match="nothing can be compared"):
        sw.rescheme(Net().eval(), X[:0], "layerscale")


def training_pass(gradient: float) -> TrainingPass:
    """A pass of a network of one parameter, whose gradient is given."""
    return TrainingPass([torch.ones(2)], [], {"gain": GAIN}, {"gain": 0}, {"gain": torch.tensor([gradient])}, {})


GAIN = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("after", "rounded", "equal"),
    [(1.005, None, True), (1.03, None, False), (1.03, 1.0301, False), (1.03, 1.035, True), (1.3, 1.9, False)],
)
def test_a_gradient_may_change_as_far_as_rounding_changes_it_and_no_further_than_a_tenth(after, rounded, equal):
    """ResNet-50 at small batches: the gradient of the first norm's bias is what is left of large sums."""
    measured = None if rounded is None else lambda: training_pass(rounded)
    rule, passes = ComparisonRule(1e-3, rounded=measured), (training_pass(1.0), training_pass(after))
    if equal:
        assert ("rounding of the weights changes gain by up to" in EqualTraining().compare(*passes, rule)) == (
            after > 1.01
        )
    else:
        with pytest.raises(sw.SkipwayError, match=r"the gradient of gain changed by 0\.0?3"):
            EqualTraining().compare(*passes, rule)


def test_rounding_is_measured_on_a_copy():
    """Outputs change by the size of roundings; the network stays as it is, its parameters' versions too."""
    model = Net().eval()
    with transaction(model, X, title="nothing", tolerance=1e-3, checks=EQUAL) as change:
        versions = dict(change.versions)
        check = next(check for check in change.checks if isinstance(check, EqualTraining))
        before, rounded = change.before[check], change.measure_rounded(check)
        assert 0 < difference(before.outputs, rounded.outputs) < 1e-4
        assert {parameter: parameter._version for parameter in model.parameters()} == versions
        change.commit()


class WithoutFloat64(TorchFunctionMode):
    """Within it, tensors are on a device that has no float64, as Apple's, until they are moved to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[Tensor] = []  # held, so that no address is used twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = any(each is args[0] for each in self.moved)
        if func == Tensor.device.__get__:
            return torch.device("cpu" if here else "mps")
        if not here and torch.float64 in (*args[1:], *kwargs.values()):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and (here or func == Tensor.cpu):
            made = made.view_as(made)
            self.moved.append(made)
        return made


def test_values_are_summarised_on_devices_without_float64():
    parameter = nn.Parameter(torch.randn(3, 4))
    expected = summarise(parameter)
    with WithoutFloat64():
        assert summarise(parameter) == expected
        assert agrees(torch.ones(4, 2), torch.ones(2, 2), 0)


def test_outputs_that_torch_conjugates_late_are_compared():
    outputs = torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert difference([outputs.conj()], [outputs.conj().resolve_conj()]) == 0
