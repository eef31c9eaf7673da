"""`skipway.chain` on a tiny network of every language model of transformers, against what their source adds.

    python -m benchmarks.chain.language [CLASS …]

Each is watched in evaluation, in training, on a padded batch with labels, and in a step of decoding with a cache; the
connections are the same in all four. The right number was read in the forward of every class's layers: two additions
for a layer of a stack, five for a layer of an encoder and one of a decoder, and `READ` for all others. A line for each
class goes to language.csv next to this file; the exit status is 1 if a number differs.
"""

from __future__ import annotations

import csv
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipway as sw
from benchmarks.language_models import LAYERS, build_language_model, language_models
from skipway.errors import SkipwayError
from skipway.tracing import watch
from skipway.tracing.chain import Chain, chain_from_program

__all__ = ["READ", "main", "situations"]

FILE = Path(__file__).with_name("language.csv")
SITUATIONS = ("evaluation", "training", "padded", "step")
HEADER = ["model", "architecture", "task", "read", *SITUATIONS, "refused", "source", "problem"]

PARALLEL = "attention + feed-forward + residual: one addition of both"
FEEDTHROUGH = "two a layer, and D x beside the scan of each state-space mixer"
CONVOLVED = "two a layer, and hidden_states + position_embeddings once"
CONFORMER = "half a feed-forward, attention, convolution, half a feed-forward"
READ: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        ("CodeGenForCausalLM", "FalconForCausalLM", "GPTNeoXForCausalLM", "GPTJForCausalLM", "PhiForCausalLM"),
        (LAYERS, PARALLEL),
    ),
    **dict.fromkeys(
        ("MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM"), (2 * LAYERS, "one mixer, which adds D x")
    ),
    **dict.fromkeys(("BambaForCausalLM", "GraniteMoeHybridForCausalLM", "JambaForCausalLM"), (10, FEEDTHROUGH)),
    "FalconH1ForCausalLM": (12, FEEDTHROUGH),
    "NemotronHForCausalLM": (5, "one a layer, of which the one with a state-space mixer adds D x"),
    "Zamba2ForCausalLM": (10, "a mixer that adds D x; what two hybrid layers add in front of theirs"),
    "MllamaForCausalLM": (6, "two a layer; the layer of cross-attention is left out without images"),
    "LongcatFlashForCausalLM": (20, "two attentions, two feed-forwards and a shortcut of experts a layer"),
    "Gemma3nForCausalLM": (24, "laurel, attention, + laurel, feed-forward, AltUp's correction, per-layer input"),
    "Gemma3nForConditionalGeneration": (24, "as its causal model"),
    **dict.fromkeys(
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"), (12, "attention, feed-forward, per-layer input")
    ),
    "NeoMMEForMaskedLM": (15, "two a layer; the first layer's input, 3 times; x - (x v) v behind each attention"),
    "HrmTextForCausalLM": (71, "2 a layer x 4 layers x (6 + 2) runs of a stack; z_L + z_H 7 times after a constant"),
    "InklingForCausalLM": (24, "two a layer; four short convolutions with a residual each"),
    "Inkling2ForCausalLM": (23, "as Inkling, where a layer that begins a block of attention residuals adds once"),
    "ZayaForCausalLM": (11, "two a layer; a router adds the states of the router before it, 3 times"),
    **dict.fromkeys(("XmodForCausalLM", "XmodForMaskedLM"), (12, "attention, feed-forward and adapter of a layer")),
    "FunnelForMaskedLM": (33, "three blocks of 4 layers, 4 of the decoder, the upsampled stream + the first block's"),
    "MobileBertForMaskedLM": (24, "attention, four feed-forwards and the bottleneck's input a layer"),
    "MraForMaskedLM": (LAYERS, "without its CUDA kernel, attention returns zeros"),
    "EncoderDecoderModel": (16, "two stacks whose configurations have no cross-attention"),
    "T5Gemma2ForConditionalGeneration": (16, "self- and cross-attention of a decoder's layer are one"),
    "PegasusXForConditionalGeneration": (
        27,
        "global tokens have additions of their own, but the first is to a constant",
    ),
    **dict.fromkeys(
        ("CanaryForConditionalGeneration", "CohereAsrForConditionalGeneration"), (28, f"encoder: {CONFORMER}")
    ),
    **dict.fromkeys(
        ("SeamlessM4TForSpeechToText", "SeamlessM4Tv2ForSpeechToText"),
        (110, f"24 layers: {CONFORMER}; a feed-forward behind them and one in the adapter; the decoder"),
    ),
    "SpeechT5ForSpeechToText": (21, "an encoder and a decoder; hidden_states + pos_conv_embed"),
    **dict.fromkeys(
        ("Data2VecAudioForCTC", "HubertForCTC", "SEWForCTC", "SEWDForCTC", "UniSpeechForCTC", "UniSpeechSatForCTC"),
        (9, CONVOLVED),
    ),
    **dict.fromkeys(("Wav2Vec2ForCTC", "WavLMForCTC"), (9, CONVOLVED)),
    **dict.fromkeys(
        ("LasrForCTC", "ParakeetForCTC", "Wav2Vec2BertForCTC", "Wav2Vec2ConformerForCTC"), (4 * LAYERS, CONFORMER)
    ),
}
"""The connections of classes that add otherwise than two times a layer, and what adds."""


def right_answer(name: str, model: nn.Module) -> tuple[int, str]:
    """The connections that were read, and what adds."""
    if name in READ:
        return READ[name]
    both: Any = getattr(model.config, "is_encoder_decoder", False)
    return (5 * LAYERS, "two a layer of the encoder, three of the decoder") if both else (2 * LAYERS, "two a layer")


def situations(model: nn.Module, example: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a language model is called with: ids, ids with padding and labels, and one id behind a cache."""
    yield "evaluation", example
    yield "training", example
    names = inspect.signature(model.forward).parameters
    ids = example.get("input_ids")
    if ids is None:
        return
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = {"attention_mask": mask, "labels": example.get("decoder_input_ids", ids)}
    yield "padded", example | {key: value for key, value in padded.items() if key in names}
    if "past_key_values" in names and "decoder_input_ids" not in example:
        with torch.no_grad():
            cache = getattr(model(**example, use_cache=True), "past_key_values", None)
        if cache is not None and hasattr(cache, "get_seq_length"):
            yield "step", {"input_ids": ids[:, -1:], "past_key_values": cache}


def keep_layers(model: nn.Module) -> None:
    """Leave out no layers in training."""
    for holder in (model.config, *model.modules()):
        for name in [name for name in vars(holder) if name.endswith("layerdrop")]:
            setattr(holder, name, 0.0)


def read_situation(model: nn.Module, example: dict[str, Any], situation: str) -> Chain[Any]:
    """The chain of a model in one situation; `chain` itself watches evaluation."""
    if situation != "training":
        return sw.chain(model, example)
    return chain_from_program(model, watch(model, example, training=True))


def row(architecture: str, task: str, name: str) -> dict[str, Any] | None:
    """The line of one class in the table; None where it does not build."""
    try:
        model, example = build_language_model(name, architecture)
    except Exception as problem:  # named by benchmarks.language_models
        print(f"{name:45} does not build: {problem!s:.90}".splitlines()[0], flush=True)
        return None
    keep_layers(model)
    read, source = right_answer(name, model)
    line = {"model": name, "architecture": architecture, "task": task, "read": read, "source": source, "problem": ""}
    for situation, given in situations(model, example):
        try:
            chain = read_situation(model, given, situation)
        except SkipwayError as problem:
            line["problem"] += f"{situation}: {str(problem).splitlines()[0][:120]}"
            continue
        line[situation] = len(chain)
        if situation == "evaluation":
            reasons = Counter(refusal.reason for refusal in chain.refused)
            line["refused"] = " ".join(f"{reason}:{count}" for reason, count in sorted(reasons.items()))
    return line


def main(names: list[str]) -> int:
    """Read all chains, or those of the classes named, print the differences, and count them."""
    warnings.filterwarnings("ignore")
    lines = []
    for architecture, task, name in language_models():
        line = None if names and name not in names else row(architecture, task, name)
        if line is None:
            continue
        lines.append(line)
        wrong = [f"{each} {line[each]}" for each in SITUATIONS if line.get(each, line["read"]) != line["read"]]
        if wrong or line["problem"]:
            print(f"{name:45} read {line['read']}, found {', '.join(wrong)} {line['problem']}", flush=True)
    if not names:
        with FILE.open("w", newline="") as file:
            table = csv.DictWriter(file, HEADER)
            table.writeheader()
            table.writerows(lines)
    differing = sum(any(line.get(each, line["read"]) != line["read"] for each in SITUATIONS) for line in lines)
    watched = sum(each in line for line in lines for each in SITUATIONS)
    failed = sum(bool(line["problem"]) for line in lines)
    print(
        f"{len(lines)} classes, {watched} passes: {differing} classes differ, {failed} could not be watched somewhere"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
