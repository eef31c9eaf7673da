"""Where images are: class folders, lists, tar shards, Hugging Face data sets. All give the same `Found`."""

from __future__ import annotations

from skipway.data.sources.detect import find
from skipway.data.sources.index import Found
from skipway.data.sources.readers import Store

__all__ = ["Found", "Store", "find"]
