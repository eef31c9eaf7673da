"""Every entry point of timm and torchvision that we claim, and Hugging Face's classes: their weights, our network.

Claim     the same logits to rounding (1e-5 of the largest), their state dict loaded strictly, no key left over
Command   python -m benchmarks.parity [PATTERN …] [--library timm] [--largest 350e6] [--json FILE]
Method    theirs with random weights, every parameter and statistic moved away from its start; ours built from the entry
          point's name; one random image of the entry point's own size, or two texts as long as the context. Above
          --largest parameters nothing is run: keys and shapes are compared on the meta device. Hugging Face's classes
          are built small, from a config.
Result    see docs/log.md, with date and machine; one line per network as it goes, a table at the end, exit status 1
          where one fails
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipway as sw
from benchmarks.peers import difference, import_timm, import_torchvision, import_transformers, randomise_
from skipway.models import families
from skipway.weights import match
from skipway.weights.decoder_config import read_decoder_config

__all__ = ["Entry", "Outcome", "check", "entries", "main", "summary"]

TOLERANCE = 1e-5
LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "huggingface": "transformers"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network of another library and what we call it.

    Args:
        library: "timm", "torchvision" or "huggingface".
        family: ours.
        name: theirs.
        ours: our name, and the options that make it the same.
        make: builds theirs.
        build: builds ours, with the options of `build`.
        vocabulary: of a network that takes tokens; None: it takes images.
    """

    library: str
    family: str
    name: str
    ours: str
    make: Callable[[], nn.Module]
    build: Callable[..., nn.Module]
    vocabulary: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an entry: "ok", "shapes" (too large to run, keys and shapes fit) or "FAIL" with the reason."""

    library: str
    family: str
    name: str
    ours: str
    parameters: int = 0
    difference: float | None = None
    verdict: str = "ok"
    reason: str = ""

    def __str__(self) -> str:
        how = "" if self.difference is None else f"{self.difference:.1e}"
        return (
            f"{self.library:12} {self.name:42} {self.ours:18} {self.parameters / 1e6:8.2f} M {how:>8}  {self.verdict}"
            f"{': ' * bool(self.reason)}{self.reason}"
        )


# What there is ------------------------------------------------------------------------------------------------------


def aliases() -> Iterator[tuple[str, str, str]]:
    """Our family, their entry point, our name."""
    for family in families():
        for entry, (ours, _) in family.aliases.items():
            yield family.name, entry, ours


def timm_entries() -> Iterator[Entry]:
    """All aliases that timm has; a network without a classifier is given one of 7 classes."""
    timm = import_timm()
    for family, name, ours in aliases():
        if timm.is_model(name):
            classes = timm.models.get_pretrained_cfg(name).num_classes or 7
            yield Entry(
                library="timm",
                family=family,
                name=name,
                ours=ours,
                make=lambda name=name, classes=classes: timm.create_model(name, num_classes=classes),
                build=lambda name=name, classes=classes, **options: sw.build(name, classes=classes, **options),
            )


def torchvision_entries() -> Iterator[Entry]:
    """All aliases that torchvision has."""
    models = import_torchvision().models
    known = set(models.list_models())
    for family, name, ours in aliases():
        if name in known:
            yield Entry(
                library="torchvision",
                family=family,
                name=name,
                ours=ours,
                make=lambda name=name: models.get_model(name, weights=None),
                build=lambda name=name, **options: sw.build(name, **options),
            )


TOKENS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
OUR_TOKENS = {"depth": 2, "dim": 16, "heads": 2, "image": 32, "patch": 8}
STAGES = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 2, 1, 1], "layer_norm_eps": 1e-6}
OUR_STAGES = {"width": 8, "blocks": (1, 2, 1, 1)}
WINDOWS = {"image_size": 64, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
OUR_WINDOWS = {"image": 64, "dim": 8, "blocks": (2, 2), "heads": 2, "window": 4}
DINO = {"pooling": "token+mean", "scheme": "layerscale"}
PYRAMID = {"embedding_size": 8, "depths": [2, 1, 1, 1]}
OUR_PYRAMID = {"stem_width": 8, "width": 8, "blocks": (2, 1, 1, 1)}
BASIC = {**PYRAMID, "layer_type": "basic", "hidden_sizes": [8, 16, 32, 64]}
BOTTLENECK = {**PYRAMID, "layer_type": "bottleneck", "hidden_sizes": [32, 64, 128, 256]}

Row = tuple[str, str, dict[str, Any], str, dict[str, Any]]
HUGGINGFACE: tuple[Row, ...] = (
    ("vit", "ViT", {**TOKENS, "intermediate_size": 64}, "vit-tiny-16", {**OUR_TOKENS, "epsilon": 1e-12}),
    ("vit", "Dinov2", TOKENS, "vit-tiny-16", {**OUR_TOKENS, **DINO}),
    (
        "vit",
        "Dinov2WithRegisters",
        {**TOKENS, "num_register_tokens": 3},
        "vit-tiny-16",
        {**OUR_TOKENS, **DINO, "registers": 3},
    ),
    ("convnext", "ConvNext", STAGES, "convnext-tiny", OUR_STAGES),
    ("convnextv2", "ConvNextV2", STAGES, "convnextv2-tiny", OUR_STAGES),
    ("swin", "Swin", {**WINDOWS, "layer_norm_eps": 1e-5}, "swin-tiny", OUR_WINDOWS),
    ("swinv2", "Swinv2", {**WINDOWS, "layer_norm_eps": 1e-5}, "swinv2-tiny", OUR_WINDOWS),
    ("resnet", "ResNet", BASIC, "resnet18", OUR_PYRAMID),
    ("resnet", "ResNet", BOTTLENECK, "resnet50", OUR_PYRAMID),
)
"""Our family, their class (before `Config` and `ForImageClassification`) and its config, our name and options."""


def huggingface_entries() -> Iterator[Entry]:
    """The classes of Hugging Face that we have key maps for, small."""
    transformers = import_transformers()
    for family, kind, config, ours, options in HUGGINGFACE:

        def make(kind: str = kind, config: dict[str, Any] = config) -> nn.Module:
            theirs = getattr(transformers, f"{kind}Config")(**config, num_labels=5)
            return getattr(transformers, f"{kind}ForImageClassification")(theirs)

        yield Entry(
            library="huggingface",
            family=family,
            name=f"{kind}ForImageClassification",
            ours=ours,
            make=make,
            build=lambda ours=ours, options=options, **more: sw.build(ours, classes=5, **options, **more),
        )


DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 65,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 65,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
DECODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("GPT2LMHeadModel", GPT2),
    ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 48, "activation_function": "gelu"}),
    ("LlamaForCausalLM", DECODER),
    ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": SCALED}),
    ("LlamaForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    ("MistralForCausalLM", {**DECODER, "sliding_window": None}),
    ("Qwen2ForCausalLM", DECODER),
    ("Qwen3ForCausalLM", {**DECODER, "head_dim": 16, "tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", {**DECODER, "head_dim": 16, "attention_bias": True}),
)
"""Their class and its config; ours is made of that config."""


def decoder_entries() -> Iterator[Entry]:
    """The decoders of Hugging Face, small."""
    transformers = import_transformers()
    for name, options in DECODERS:
        config = getattr(transformers, name).config_class(**options)
        own = read_decoder_config(config.to_dict(), name)
        yield Entry(
            library="huggingface",
            family="gpt",
            name=name,
            ours="gpt",
            make=lambda name=name, config=config: getattr(transformers, name)(config),
            build=lambda own=own, **more: sw.build("gpt", depth=own.blocks, **{**vars(own), **more}),
            vocabulary=own.vocab,
        )


ENTRIES = {
    "timm": timm_entries,
    "torchvision": torchvision_entries,
    "huggingface": lambda: chain(huggingface_entries(), decoder_entries()),
}


def entries(libraries: list[str], patterns: list[str]) -> Iterator[Entry]:
    """What the installed ones of the libraries have under the patterns; all without a pattern."""
    for library in libraries:
        if find_spec(LIBRARIES[library]) is None:
            print(f"{library}: {LIBRARIES[library]} is not installed, skipped: docs/install.md")
            continue
        for entry in ENTRIES[library]():
            if not patterns or any(fnmatch(entry.name, pattern) for pattern in patterns):
                yield entry


# One of them --------------------------------------------------------------------------------------------------------


def check(entry: Entry, largest: float) -> Outcome:
    """Compare one network; an error is an outcome too."""
    about = {"library": entry.library, "family": entry.family, "name": entry.name, "ours": entry.ours}
    try:
        parameters = sum(p.numel() for p in entry.build(device="meta").parameters())
    except sw.SkipwayError as error:
        return Outcome(**about, verdict="FAIL", reason=str(error))
    try:
        if parameters > largest:
            compare_shapes(entry)
            return Outcome(**about, parameters=parameters, verdict="shapes", reason=f"more than {largest / 1e6:g} M")
        found = compare_logits(entry)
    except Exception as error:
        return Outcome(**about, parameters=parameters, verdict="FAIL", reason=str(error))
    finally:
        gc.collect()
    verdict, reason = ("ok", "") if found < TOLERANCE else ("FAIL", f"not below {TOLERANCE:g}")
    return Outcome(**about, parameters=parameters, difference=found, verdict=verdict, reason=reason)


def compare_logits(entry: Entry) -> float:
    """The largest difference of the logits over the largest logit."""
    torch.manual_seed(0)
    theirs = randomise_(entry.make())
    ours = entry.build()
    if entry.vocabulary is not None:
        return difference(ours, theirs, entry.library, torch.randint(entry.vocabulary, (2, ours.config.context)))
    return difference(ours, theirs, entry.library, torch.randn(1, 3, *image_size(ours, theirs)))


def image_size(ours: nn.Module, theirs: nn.Module) -> tuple[int, int]:
    """Rows and columns of an image: timm's own, else those that our position table is made for, else 224."""
    if hasattr(theirs, "default_cfg"):
        return tuple(theirs.default_cfg["input_size"][1:])
    side = getattr(ours.config, "image", 224)
    return side, side


def compare_shapes(entry: Entry) -> None:
    """Raise where keys or shapes do not fit; nothing is computed."""
    with torch.device("meta"):
        theirs = entry.make()
    report = match(entry.build(device="meta"), theirs.state_dict(), names=entry.library)
    if not report.fits:
        raise sw.CheckpointError(str(report))


# All of them --------------------------------------------------------------------------------------------------------


def summary(outcomes: list[Outcome]) -> str:
    """A table by library and family."""
    lines = [f"{'library':12} {'family':12} {'ok':>4} {'shapes':>6} {'FAIL':>4}  largest difference"]
    groups = list(dict.fromkeys((outcome.library, outcome.family) for outcome in outcomes))
    groups += [(library, "all") for library in dict.fromkeys(library for library, _ in groups)]
    for library, family in groups:
        rows = [o for o in outcomes if o.library == library and family in (o.family, "all")]
        counts = [sum(row.verdict == verdict for row in rows) for verdict in ("ok", "shapes", "FAIL")]
        worst = max((row.difference for row in rows if row.difference is not None), default=0.0)
        lines.append(f"{library:12} {family:12} {counts[0]:4} {counts[1]:6} {counts[2]:4}  {worst:.1e}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="of entry points: 'resnet*' 'vit_base_*'")
    parser.add_argument("--library", choices=list(LIBRARIES), help="all of them unless told")
    parser.add_argument("--largest", type=float, default=350e6, help="parameters that are still run")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    for entry in entries([options.library] if options.library else list(LIBRARIES), options.patterns):
        outcomes.append(check(entry, options.largest))
        print(outcomes[-1], flush=True)
    print(f"\n{summary(outcomes)}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    return int(any(outcome.verdict == "FAIL" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
