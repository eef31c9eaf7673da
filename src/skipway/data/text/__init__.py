"""Text to train on: files, folders, tables and data sets, or the standard library of Python.

data = skipway.data.text.load_text(Path("book.txt"), tokenizer="chars", context=64)
ids, targets = data.train_batch(epoch=0, step=0, batch_size=12)
"""

from __future__ import annotations

from skipway.data.text.choices import TextChoices
from skipway.data.text.loader import load_text
from skipway.data.text.text_data import TextData
from skipway.data.text.token_split import IGNORED, TokenSplit
from skipway.data.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from skipway.data.text.tokenizer_choice import tokenizer_from_json
from skipway.data.text.tokenizer_file import FileTokenizer

__all__ = [
    "IGNORED",
    "ByteTokenizer",
    "CharTokenizer",
    "FileTokenizer",
    "TextChoices",
    "TextData",
    "TokenSplit",
    "Tokenizer",
    "load_text",
    "tokenizer_from_json",
]
