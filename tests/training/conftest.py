"""What the tests of training share."""

from __future__ import annotations

import pytest
from tests.training.few_digits import every_ninth

from skipway.data import loader


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without data takes every ninth of the embedded digits."""
    monkeypatch.setattr(loader, "digits", every_ninth)
