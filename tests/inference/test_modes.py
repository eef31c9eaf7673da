"""Modes of modules, which an evaluation leaves as they are; outputs that are no numbers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.data import Batch
from skipway.inference.evaluation import evaluate
from skipway.inference.generate import generate
from skipway.inference.modes import eval_mode
from skipway.inference.run_evaluation import doubts
from skipway.inference.text_evaluation import evaluate_text

LABELS = torch.tensor([0, 1, 2, 0])


def batches(fails=False):
    yield Batch(torch.randn(4, 3, 2, 2), LABELS, LABELS, torch.arange(4))
    if fails:
        raise OSError("the disk is gone")


@pytest.mark.parametrize("fails", [False, True])
def test_a_frozen_part_stays_in_its_mode(fails):
    """A frozen norm, whose statistics would move in the steps after the evaluation."""
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Flatten(), nn.Linear(12, 3), nn.Dropout())
    with pytest.raises(OSError, match="the disk") if fails else nullcontext():
        evaluate(model, batches(fails), classes=3, autocast=nullcontext)
    assert [module.training for module in model.modules()] == [True, False, True, True, True]


@pytest.mark.parametrize("call", ["evaluate", "generate"])
def test_a_frozen_part_of_a_decoder_stays_in_its_mode(call):
    model, ids = sw.build("gpt", depth=1, dim=8, heads=2, vocab=9, context=4), torch.tensor([[1, 2, 3]])
    model.stem.eval()
    before = [module.training for module in model.modules()]
    if call == "generate":
        generate(model, ids, 2, temperature=0)
    else:
        evaluate_text(model, [(ids, ids)], scored_bytes=3, autocast=nullcontext)
    assert [module.training for module in model.modules()] == before


def test_answers_that_are_no_numbers_are_said():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert not list(doubts(evaluate(model, batches(), classes=3, autocast=nullcontext)))
    nn.init.constant_(model[1].bias, float("nan"))
    (said,) = doubts(evaluate(model, batches(), classes=3, autocast=nullcontext))
    assert "the mean loss is nan" in said


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_of_the_contexts_of_several_threads_the_last_one_restores(first_ends_first):
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    first, second = eval_mode(model), eval_mode(model)
    first.__enter__()
    second.__enter__()
    one, other = (first, second) if first_ends_first else (second, first)
    one.__exit__(None, None, None)
    assert not any(module.training for module in model.modules()), "the other one is still at it"
    other.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_within_a_context_the_mode_that_was_set_comes_back():
    model = nn.Dropout()
    with eval_mode(model):
        model.train()
        with eval_mode(model):
            assert not model.training
        assert model.training
    assert model.training
