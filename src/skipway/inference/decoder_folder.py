"""Folders of transformers with a decoder that the family gpt computes: read as our network, and written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skipway.checkpoint.files import copy_to_host, describe_os_error, encode_json, file_aside, refuse_other_files
from skipway.data.text import Tokenizer
from skipway.data.text.tokenizer_file import read_tokenizer
from skipway.errors import CheckpointError, SkipwayError, counted, first_line, printable
from skipway.inference.text_inputs import TextInputs
from skipway.inference.tokenizer_files import TOKENIZER_FILES, tokenizer_files
from skipway.models.gpt import GPT
from skipway.surgery.fusion import fuse
from skipway.tracing import preserved_state
from skipway.weights import export_names, load_state, read_weights
from skipway.weights.decoder_classes import CLASSES
from skipway.weights.decoder_config import read_decoder_config, write_decoder_config
from skipway.weights.hub import local_path
from skipway.weights.stored_config import CONFIG, read_config
from skipway.zoo import import_library

__all__ = ["find_decoder_folder", "load_decoder", "read_text_inputs", "write_transformers_folder"]

FILES = (CONFIG, "model.safetensors", *TOKENIZER_FILES)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of logits, as a share of the largest, up to which two networks count as one; else `LOOSE`."""
LOOSE = 0.1
"""The same for 16 bits, where another order of sums changes the second digit."""
MOST_TOKENS = 5_000
"""Tokens of a vocabulary that are written as a text and read back."""
TRIAL = 32
"""Tokens of the texts on which networks are compared."""


def find_decoder_folder(path: str | Path) -> Path | None:
    """A folder of transformers, or one from the hub, with a decoder that the family computes; None: it is none."""
    folder = local_path(path, (CONFIG, *TOKENIZER_FILES))
    described = read_config(folder) if folder.is_dir() else None
    return None if described is None or described["model_type"] not in CLASSES else folder


def load_decoder(folder: Path, *, remark: Callable[[str], None] = warnings.warn) -> GPT:
    """The network of a folder of transformers as one of the family gpt, in evaluation mode, in float32.

    Its `text` is the tokenizer in the folder with the context, where there is one and `tokenizers` is installed.

    Args:
        folder: holds a `config.json` (model type gpt2, llama, mistral, qwen2 or qwen3) and weights, in one file or in
            shards.
        remark: called with a sentence about what of the config is not followed, such as dropout.

    Raises:
        CheckpointError: a config that the family cannot express, or weights that do not fit it.
    """
    described, tensors = read_config(folder), read_weights(folder, remark=remark)
    if described is None:
        raise CheckpointError(f"{printable(folder)} holds no {CONFIG} of transformers")
    config = read_decoder_config(described, printable(folder / CONFIG), remark)
    if config.branches > len(tensors):  # a file may name any number of layers
        raise CheckpointError(f"{printable(folder)}: {CONFIG} describes {config.blocks} blocks, the weights have fewer")
    with torch.device("meta"):
        model = GPT(config)
    load_state(model.to_empty(device="cpu"), tensors, names="huggingface", remark=remark)
    text = read_text_inputs(folder, config.context)
    if text is not None:
        model.text = text  # type: ignore[assignment]
    return model.eval()


def read_text_inputs(folder: Path, context: int) -> TextInputs | None:
    """The tokenizer of a folder of transformers; None: it has none in the form of `tokenizers`, or that is missing."""
    if not (folder / "tokenizer.json").is_file() or find_spec("tokenizers") is None:
        return None
    return TextInputs(read_tokenizer(folder), context)


def write_transformers_folder(
    model: nn.Module, folder: str | Path, *, tokenizer: Tokenizer | str | Path | None = None
) -> float | None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; the model is left alone.

    The class is GPT-2, Llama, Qwen2 or Qwen3, by what the network computes. Gains and constants of a scheme are
    multiplied into the weights (`fuse`); biases that the network has not and the class has, and connections that
    `shorten` took out, are written as zeros. What is written is compared with the network: built by us, and by
    transformers where that is installed.

    Args:
        model: of the family gpt.
        folder: new, empty, or written by this function before.
        tokenizer: what the network was trained with, or a folder of transformers from which the tokenizer, its special
            tokens and the settings of generation are taken.

    Returns:
        the largest difference of a logit to transformers, over the largest logit; None if it is not installed.

    Raises:
        CheckpointError: no class of transformers computes what the network does, with the nearest one and what differs;
            or the folder cannot be written.
    """
    folder = Path(folder)
    source = Path(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if not isinstance(model, GPT):
        raise SkipwayError(f"a {type(model).__name__}: the rule is a network of the family gpt, such as build('gpt2')")
    state, blocks = number_blocks(fuse(model).state_dict())
    config = replace(model.config, blocks=blocks)
    described = write_decoder_config(config, any_tokenizer=isinstance(source, Tokenizer))
    twin = build_twin(state, described)
    refuse_difference(model, twin, described["architectures"][0])
    files, special = tokenizer_files(source, config.vocab, config.context)
    described |= {**special, "dtype": str(twin.stem.token.dtype).removeprefix("torch.")}
    refuse_other_files(folder, FILES)
    tensors = export_names(twin, "huggingface")
    if config.tied:
        del tensors["lm_head.weight"]  # as save_pretrained, which writes what is shared once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_aside(folder / CONFIG) as file:
            weights = copy_to_host(tensors, printable(folder))
            save_file(weights, file.with_name("model.safetensors"), metadata={"format": "pt"})
            for name, content in files.items():
                file.with_name(name).write_bytes(content)
            file.write_bytes(encode_json(described))
            if find_spec("transformers") is None:
                return None
            if isinstance(source, Tokenizer):
                refuse_other_tokens(source, file.parent)
            theirs = load_theirs("AutoModelForCausalLM", file.parent, dtype="auto")
            return refuse_difference(model, theirs.eval(), described["architectures"][0])
    except OSError as error:
        raise CheckpointError(f"{printable(folder)} cannot be written: {describe_os_error(error)}") from error
    finally:
        with suppress(OSError):  # holds something, as it should
            folder.rmdir()


def load_theirs(kind: str, folder: Path, **options: Any) -> Any:
    """What transformers makes of a folder.

    Raises:
        CheckpointError: it refuses the folder.
    """
    try:
        return getattr(import_library("transformers"), kind).from_pretrained(folder, **options)
    except Exception as error:  # a foreign reader: its kinds of failure are listed nowhere
        raise CheckpointError(f"transformers does not load what was written: {printable(first_line(error))}") from error


def refuse_other_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise where transformers reads other tokens from a text of all that a tokenizer knows."""
    special = (tokenizer.separator, tokenizer.unknown)
    known = [number for number in range(min(tokenizer.size, MOST_TOKENS)) if number not in special]
    text, theirs = tokenizer.decode(known), load_theirs("AutoTokenizer", folder)
    own = tokenizer.encode_known(text).tolist()
    if theirs(text, verbose=False)["input_ids"] != own or theirs.decode(own) != tokenizer.decode(own):
        raise CheckpointError(f"transformers reads other tokens by its {type(theirs).__name__}: give tokenizer=None")


def number_blocks(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """A state dict whose blocks are numbered without gaps, and how many they are."""
    parts = {name: name.split(".") for name in state}
    present = sorted({int(each[1]) for each in parts.values() if each[0] == "blocks"})
    numbers = {str(number): str(place) for place, number in enumerate(present)}
    renamed = {
        name: ".".join(("blocks", numbers[each[1]], *each[2:])) if each[0] == "blocks" else name
        for name, each in parts.items()
    }
    return {renamed[name]: tensor for name, tensor in state.items()}, len(present)


def build_twin(state: Mapping[str, Tensor], described: Mapping[str, Any]) -> GPT:
    """A network of the class that a config of transformers describes with these tensors, the same in memory.

    Zeros stand for biases and for whole connections that are not there.

    Raises:
        CheckpointError: it lacks parameters that are there, or has others.
    """
    with torch.device("meta"):
        twin = GPT(read_decoder_config(described, CONFIG))
    theirs = twin.state_dict()
    connections = {".".join(name.split(".")[:3]) for name in state if name.startswith("blocks.")}
    strange = [name for name in state if name not in theirs or state[name].shape != theirs[name].shape]
    lacking = [
        name
        for name in theirs
        if name not in state
        and not name.endswith(".bias")
        and not (name.startswith("blocks.") and ".".join(name.split(".")[:3]) not in connections)
    ]
    if strange or lacking:
        folded = any(".residual_scale." in name for name in strange)
        hint = "; sw.fold_gains(model, example) multiplies what rescheme put in into the weights" if folded else ""
        raise CheckpointError(
            f"{described['architectures'][0]} of transformers and this network differ in "
            f"{counted(len(strange + lacking), 'parameter')}, {(strange + lacking)[0]!r} first: what it computes are "
            f"pre-norm blocks of attention and MLP without more{hint}"
        )
    like = state["stem.token"]
    whole = {name: state.get(name, like.new_zeros(tensor.shape)) for name, tensor in theirs.items()}
    twin.load_state_dict(whole, assign=True)
    return twin.eval()


@torch.no_grad()
def refuse_difference(model: GPT, other: nn.Module, name: str) -> float:
    """The largest difference of logits on random texts, over the largest logit.

    Raises:
        CheckpointError: it is no rounding error.
    """
    vocab, length = model.config.vocab, min(TRIAL, model.config.context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, length), generator=generator, device="cpu").to(model.stem.token.device)
    with preserved_state(model):
        own = model.eval()(ids).float()
    theirs = other.to(ids.device)(ids)
    theirs = getattr(theirs, "logits", theirs).float()
    difference = float((own - theirs).abs().max() / own.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE.get(model.stem.token.dtype, LOOSE):
        raise CheckpointError(
            f"{name} of transformers computes other logits with these weights, off by {difference:.1e} of the largest: "
            "something in this network is neither in its config nor in its weights"
        )
    return difference
