"""The pages in docs/schemes are made from the schemes' own docstrings and fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipway.schemes import all_schemes, card
from skipway.schemes.cards import overview, raised

FOLDER = Path(__file__).parents[2] / "docs" / "schemes"


@pytest.mark.parametrize("name", list(all_schemes()))
def test_card_is_up_to_date(name):
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == raised(card(name)), "run scripts/cards"


def test_no_card_of_a_scheme_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.md")} == {*all_schemes(), "index"}


def test_the_overview_is_up_to_date():
    assert (FOLDER / "index.md").read_text(encoding="utf-8") == overview(), "run scripts/cards"
