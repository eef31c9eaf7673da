"""The ConvNeXt family, v1 and v2: one network and one config."""

from skipway.models.convnext import aliases, variants
from skipway.models.convnext.config import ConvNeXtConfig
from skipway.models.convnext.network import CONVNEXT_KIT, ConvNeXt, ConvNeXtStem

__all__ = ["CONVNEXT_KIT", "ConvNeXt", "ConvNeXtConfig", "ConvNeXtStem", "aliases", "variants"]
