"""Sources of images: class folders, lists, tar shards, Hugging Face data sets. Each is read into a `SourceIndex`."""

from __future__ import annotations

from skipway.data.sources.detect import index_source
from skipway.data.sources.index import SourceIndex
from skipway.data.sources.readers import ImageStore

__all__ = ["ImageStore", "SourceIndex", "index_source"]
