"""The Swin family, V1 and V2."""

from skipway.models.swin import variants
from skipway.models.swin.config import SwinConfig
from skipway.models.swin.network import Swin, SwinStem

__all__ = ["Swin", "SwinConfig", "SwinStem", "variants"]
