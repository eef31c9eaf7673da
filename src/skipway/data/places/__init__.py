"""Where images are: class folders, lists, tar shards, Hugging Face data sets. All give the same `Found`."""

from __future__ import annotations

from skipway.data.places.finding import find
from skipway.data.places.found import Found
from skipway.data.places.stores import Store

__all__ = ["Found", "Store", "find"]
