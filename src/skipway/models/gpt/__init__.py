"""The GPT family: decoders for text."""

from skipway.models.gpt import variants
from skipway.models.gpt.config import GPTConfig
from skipway.models.gpt.network import GPT, TextStem

__all__ = ["GPT", "GPTConfig", "TextStem", "variants"]
