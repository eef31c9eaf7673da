"""The CaiT family."""

from skipway.models.cait import variants
from skipway.models.cait.config import CaiTConfig
from skipway.models.cait.network import CaiT

__all__ = ["CaiT", "CaiTConfig", "variants"]
