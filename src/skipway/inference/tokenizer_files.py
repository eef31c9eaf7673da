"""The files of a tokenizer beside a language model in transformers' layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import singledispatch
from pathlib import Path
from typing import Any

from skipway.checkpoint.files import encode_json
from skipway.data.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from skipway.data.text.tokenizer_file import FileTokenizer
from skipway.errors import CheckpointError, printable
from skipway.weights.stored_config import read_config

__all__ = ["TOKENIZER_FILES", "tokenizer_files"]

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)
"""What is copied from a folder of transformers: these say how texts become tokens and when a text ends."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
END, UNKNOWN = "<|endoftext|>", "<unk>"


def tokenizer_files(source: Tokenizer | Path | None, vocab: int, context: int) -> tuple[dict[str, bytes], dict]:
    """The files of a tokenizer by name, and the fields of `config.json` that belong to it.

    Args:
        source: a tokenizer, or a folder of transformers whose files are copied; None: there are none.
        vocab: tokens that the network tells apart.
        context: tokens that it is made for.

    Raises:
        CheckpointError: a folder without a tokenizer, or a tokenizer that has more tokens than the network.
    """
    if source is None:
        return {}, {}
    if isinstance(source, Path):
        files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
        if not files:
            raise CheckpointError(f"{printable(source)} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
        described = read_config(source) or {}
        return files, {name: described[name] for name in SPECIAL if name in described}
    if source.size > vocab:
        raise CheckpointError(
            f"the tokenizer has {source.size} tokens, the network vocab={vocab}: the rule is a tokenizer of the network"
        )
    numbers = {"eos_token": source.separator, "unk_token": source.unknown}
    special = {name: special_name(source, number) for name, number in numbers.items() if number is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    added = [added_token(number, special[name]) for name, number in numbers.items() if number is not None]
    content = {"version": "1.0", "added_tokens": added, **tokenizer_parts(source)}
    files = {"tokenizer.json": encode_json(content), "tokenizer_config.json": encode_json(config)}
    return files, {} if source.separator is None else dict.fromkeys(SPECIAL[:2], source.separator)


def special_name(tokenizer: Tokenizer, number: int) -> str:
    """The text of the token between documents, or of the unknown one."""
    if isinstance(tokenizer, FileTokenizer):
        return tokenizer.library_tokenizer.id_to_token(number)
    return END if number == tokenizer.separator else UNKNOWN


def added_token(number: int, text: str) -> dict[str, Any]:
    """A special token as a file of `tokenizers` lists it."""
    choices = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **choices, "special": True}


@singledispatch
def tokenizer_parts(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """The parts of a file of `tokenizers` that encodes and decodes as a tokenizer of ours does.

    Raises:
        CheckpointError: there are none for this kind.
    """
    raise CheckpointError(
        f"a {type(tokenizer).__name__} has no counterpart in transformers; leave it out, tokenizer=None, and encode "
        "texts with Skipway"
    )


@tokenizer_parts.register
def byte_parts(tokenizer: ByteTokenizer) -> Mapping[str, Any]:
    """Bytes, in the letters that byte-level BPE (GPT-2) writes them in, and no merges."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {END if byte == tokenizer.separator else letters[byte]: byte for byte in range(256)}
    return {"pre_tokenizer": level, "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": []}}


@tokenizer_parts.register
def char_parts(tokenizer: CharTokenizer) -> Mapping[str, Any]:
    """One word for each character; others have the name of the unknown one, without which they are refused."""
    vocab = {letter: number for number, letter in enumerate(tokenizer.characters)}
    vocab |= {} if tokenizer.separator is None else {END: tokenizer.separator}
    vocab |= {} if tokenizer.unknown is None else {UNKNOWN: tokenizer.unknown}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    words = {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN}
    return {"pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": words}


@tokenizer_parts.register
def file_parts(tokenizer: FileTokenizer) -> Mapping[str, Any]:
    """The file itself, but that no tokens are put around a text and nothing is cut off: the network saw none."""
    return json.loads(tokenizer.content) | dict.fromkeys(("post_processor", "truncation", "padding"))
