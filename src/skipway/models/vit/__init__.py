"""The Vision Transformer family."""

from skipway.models.vit import variants
from skipway.models.vit.config import ViTConfig
from skipway.models.vit.network import TokenStem, ViT

__all__ = ["TokenStem", "ViT", "ViTConfig", "variants"]
