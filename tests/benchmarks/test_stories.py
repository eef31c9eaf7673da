"""The rebuilt stories: the diagnosis names the cause that the story turned out to have."""

from __future__ import annotations

import pytest

from benchmarks.stories.catalogue import STORIES
from benchmarks.stories.networks import CompressingDecoder
from skipway.diagnosis.measurement import measure
from skipway.diagnosis.outlook import Outlook
from skipway.diagnosis.rule_context import Context
from skipway.diagnosis.rules import RULES
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject


def causes(attempt) -> set[str]:
    """The rules that fire on an attempt before any trial step."""
    x, y = attempt.batches[0]
    subject = Subject(attempt.model, x, y, attempt.loss)
    context = Context(measure(subject), Settings(**attempt.settings), subject, Outlook("undecided", 0.5))
    return {finding.rule for rule in RULES for finding in rule(context)}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "story", [story for story in STORIES if "rate" not in story.cause], ids=lambda story: story.name
)
def test_the_cause_is_named_and_gone_where_the_advice_is_followed(story):
    assert story.cause in causes(story.attempt())
    if story.advice is not None:
        assert story.cause not in causes(story.advice())


def test_a_shifted_decoder_sees_no_later_byte():
    import torch

    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    other = torch.where(torch.arange(32) < 17, ids, (ids + 1) % 256)
    for shifted in (True, False):
        model = CompressingDecoder(shifted=shifted).eval()
        same = torch.allclose(model(ids)[:, :17], model(other)[:, :17], atol=1e-5)
        assert same is shifted
