"""Networks that write into what they are given: operations run them on copies."""

from __future__ import annotations

import pytest
import torch
from tests.surgery.test_depth import Net, X
from tests.surgery.test_survival import OPERATIONS
from torch import Tensor, nn

from skipway.surgery import influence, remove_norm
from skipway.surgery.classifier import find_classifiers
from skipway.surgery.padded_batch import padded_example
from skipway.tracing.samples import find_sample_axes


class Scaling(Net):
    """Divides its input by 2, in place."""

    def forward(self, x: Tensor) -> Tensor:
        x /= 2
        return super().forward(x)


OPERATIONS = {
    **OPERATIONS,
    "calibrate": lambda m, x: remove_norm(m, x, calibrate=True),
    "influence": influence,
    "find_classifiers": find_classifiers,
    "find_sample_axes": find_sample_axes,
}


@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
def test_the_example_stays_what_it_was(operate):
    torch.manual_seed(0)
    x = X.clone()
    operate(Scaling().eval(), x)
    assert torch.equal(x, X)


def test_every_measurement_is_made_on_the_same_input():
    torch.manual_seed(0)
    scaling, plain = Scaling().eval(), Net().eval()
    plain.load_state_dict(scaling.state_dict())
    assert influence(scaling, X.clone()) == pytest.approx(influence(plain, X / 2))


def test_a_batch_with_padding_stays_what_it_was():
    class Masked(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x *= 2
            if attention_mask is not None:
                attention_mask += 1
            return x

    x = torch.ones(2, 4)
    padded = padded_example(Masked(), x)
    assert padded is not None
    assert torch.equal(x, torch.ones(2, 4))
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
