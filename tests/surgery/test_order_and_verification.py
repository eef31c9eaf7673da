"""Operations are undone in reverse order, and a comparison that compares nothing verifies nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.surgery.test_depth import Net, X
from torch import Tensor, nn

import skipway as sw
from skipway.surgery.verification import difference
from skipway.tracing.containers import tensors_in


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
    assert difference([torch.complex(one, one)], [torch.complex(one, one * 2)]) == 1.0
    assert difference([one > 0], [one < 0]) == 1.0
    assert len(list(tensors_in(Output([one, one])))) == 2
    masked = torch.tensor([1.0, float("-inf"), float("nan")])
    assert difference([masked[:2]], [masked[:2].clone()]) == 0.0
    assert difference([masked[:1]], [masked[2:]]) == float("inf")


def test_nothing_to_compare_is_said():
    with pytest.raises(sw.SkipwayError, match="nothing can be compared"):
        sw.rescheme(Net().eval(), X[:0], "layerscale")
