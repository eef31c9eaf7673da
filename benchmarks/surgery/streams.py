"""Several streams in networks that others wrote and trained: equal at the start, learning, and taken out again.

    python -m benchmarks.surgery.streams [--only TEXT] [--scheme SPEC] [--steps 200]

For each of some thirty tiny networks of timm, transformers and torch, with random weights in every parameter:

* `start`: the largest difference of the outputs on another batch than the example, over their largest value;
* `tokens`: whether `generate` continues with the same tokens, where the network can, and after the training whether it
  does so alike with and without its cache;
* `moved`: how many of the new parameters moved in the training (AdamW, groups by `sw.param_groups`), out of all;
* `loss`: before and after, on one batch with random targets;
* `undo`: whether classes, names, their order, and after the values from before were loaded the outputs, are as before,
  to the bit.

A row is `refused` with the reason where the network is left alone. Everything is looked at from outside.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.peers import import_transformers
from benchmarks.surgery.foreign import fresh, gap_of
from benchmarks.surgery.foreign_networks import (
    GROUPED,
    NETWORKS,
    PATCHES,
    SMALL,
    VISION,
    image_model,
    images,
    padded,
)
from skipway.surgery import rescheme
from skipway.tracing import call_model
from skipway.tracing.containers import map_tensors, tensors_in

__all__ = ["STREAMED", "Conversion", "convert", "main"]

FAILED = 1e-4
"""A larger difference at the start is a fault whatever the operation says."""


def configured(kind: str, config: str, values: dict[str, Any], example: Callable[[], Any] = padded) -> Any:
    """A network of transformers that the other benchmarks do not have."""
    library = import_transformers()
    settings = getattr(library, config)(**{"pad_token_id": 0, **values})
    for entry, value in vars(settings).items():
        if "drop" in entry and isinstance(value, float):
            setattr(settings, entry, 0.0)
    return getattr(library, kind)(settings), example()


MORE: dict[str, Callable[[], Any]] = {
    "deit": image_model("deit_tiny_distilled_patch16_224", **PATCHES),
    "beit": image_model("beit_base_patch16_224", **PATCHES),
    "eva02": image_model("eva02_tiny_patch14_224", **PATCHES),
    "DeiT of transformers": partial(configured, "DeiTModel", "DeiTConfig", VISION, lambda: images(16)),
    "BEiT of transformers": partial(configured, "BeitModel", "BeitConfig", VISION, lambda: images(16)),
    "OLMo 2": partial(configured, "Olmo2ForCausalLM", "Olmo2Config", SMALL),
    "Phi 3": partial(configured, "Phi3ForCausalLM", "Phi3Config", GROUPED),
    "Gemma 3": partial(configured, "Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8}),
    "Granite": partial(configured, "GraniteForCausalLM", "GraniteConfig", {**GROUPED, "residual_multiplier": 0.3}),
    "Cohere": partial(configured, "CohereForCausalLM", "CohereConfig", GROUPED),
}
KNOWN = (
    *("vit", "swin", "convnext", "mixer", "cait"),
    *(
        "GPT-2",
        "GPT-NeoX",
        "GPT-J",
        "OPT",
        "Bloom",
        "Phi",
        "Llama",
        "Mistral",
        "Mixtral",
        "Qwen2",
        "Qwen3",
        "Gemma 2",
        "OLMo",
    ),
    *("BERT", "T5", "Whisper", "ViT of transformers", "DINOv2", "CLIP's vision", "encoder, sequence first, padded"),
)
STREAMED: dict[str, Callable[[], Any]] = {**{name: NETWORKS[name] for name in KNOWN}, **MORE}
"""Networks by name: each makes a model and an example."""


@dataclass
class Conversion:
    """What became of a scheme in a network."""

    network: str
    reason: str = ""
    start: float = 0.0
    dressed: str = ""
    tokens: str = ""
    moved: str = ""
    loss: tuple[float, float] = (0.0, 0.0)
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        """The row of the table."""
        if self.reason:
            return f"| {self.network} | refused: {self.reason} | | | | | |"
        before, after = self.loss
        undone = "; ".join(self.faults) or "to the bit"
        cells = (f"{self.start:.1e}", self.dressed, self.tokens, self.moved, f"{before:.3g} → {after:.3g}", undone)
        return f"| {self.network} | {' | '.join(cells)} |"


def convert(network: str, scheme: str, steps: int) -> Conversion:
    """Put a scheme into a network, train it, and take it out again; what was seen on the way."""
    torch.manual_seed(0)
    model, example = STREAMED[network]()
    perturb_(model.eval(), 0.1)
    twin, found = copy.deepcopy(model), Conversion(network)
    kept = [(name, value.clone()) for name, value in model.state_dict().items()]
    kinds = [type(module) for module in model.modules()]
    generated, known = generate(model, example), set(model.parameters())
    try:
        operation = rescheme(model, example, scheme)
    except sw.SkipwayError as problem:
        found.reason = str(problem)
        return found
    apart = sum("as one branch" not in words for words in operation.touched.values())
    found.dressed = f"{len(operation.touched)}, {apart} apart" if apart < len(operation.touched) else f"{apart}"
    other = another(example)
    found.start = gap_of(evaluate(twin, other), evaluate(model, other))
    found.faults += ["outputs differ"] * (not found.start <= FAILED)
    same = generated is None or torch.equal(generated, generate(model, example))  # type: ignore[arg-type]
    found.faults += ["other tokens are generated"] * (not same)
    new = {name: p for name, p in model.named_parameters() if p not in known}
    learn(model, example, steps, found, new)
    if generated is not None:
        cached, plain = generate(model, example), generate(model, example, use_cache=False)
        found.tokens = "same"
        found.faults += ["the cache changes tokens"] * (not torch.equal(cached, plain))  # type: ignore[arg-type]
    operation.undo(force=True)
    model.load_state_dict(dict(kept))
    now = list(model.state_dict().items())
    same = len(now) == len(kept) and all(
        one == name and torch.equal(value, old) for (one, value), (name, old) in zip(now, kept, strict=True)
    )
    found.faults += ["the state dict is not as it was"] * (not same)
    found.faults += ["a class is not as it was"] * ([type(module) for module in model.modules()] != kinds)
    equal = all(map(torch.equal, evaluate(twin, other), evaluate(model, other)))
    found.faults += ["outputs are not as they were"] * (not equal)
    return found


def learn(model: nn.Module, example: Any, steps: int, found: Conversion, new: dict[str, nn.Parameter]) -> None:
    """Train a network on one batch with random targets, in place, and note what moved."""
    groups = sw.param_groups(model, example, lr=1e-3, weight_decay=0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    wrong = [name for name, p in new.items() if p.ndim < 2 or name.endswith("static") if id(p) in decayed]
    found.faults += [f"decayed: {', '.join(wrong)}"] * bool(wrong)
    optimizer = torch.optim.AdamW(groups)
    before = {name: p.detach().clone() for name, p in new.items()}
    losses = []
    first = signal_of(model, example)
    target = first.detach() + first.detach().std() * torch.randn_like(first)
    for _ in range(steps):
        loss = (signal_of(model, example) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    moved = [name for name, p in new.items() if not torch.equal(p, before[name])]
    found.moved, found.loss = f"{len(moved)}/{len(new)}", (losses[0], losses[-1])
    still = [name for name in new if name not in moved]
    found.faults += [f"never moved: {', '.join(still[:3])} ({len(still)})"] * bool(still)
    found.faults += ["the loss did not fall"] * (not losses[-1] < losses[0])


@torch.no_grad()
def perturb_(model: nn.Module, size: float) -> None:
    """Add random numbers to all parameters, in place, so that none is 0 or 1 everywhere."""
    for parameter in model.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def signal_of(model: nn.Module, example: Any) -> Tensor:
    """The first output that a gradient comes through."""
    return next(t for t in tensors_in(call_model(model, fresh(example))) if t.is_floating_point() and t.requires_grad)


@torch.no_grad()
def evaluate(model: nn.Module, example: Any) -> list[Tensor]:
    """All outputs."""
    return list(tensors_in(call_model(model, fresh(example))))


def another(example: Any) -> Any:
    """Another batch: other numbers, other tokens, one sample fewer and, of the tokens, the same padding."""
    whole = [t for t in tensors_in(example) if t.ndim]
    sizes = {t.shape[0] for t in whole}

    def other(tensor: Tensor) -> Tensor:
        changed = tensor.flip(0) if tensor.dtype in (torch.bool, torch.long) else tensor.flip(-1) * 0.9
        return changed[:-1] if len(sizes) == 1 else changed

    return map_tensors(other, example)


def generate(model: nn.Module, example: Any, **options: Any) -> Tensor | None:
    """Tokens that a causal language model continues with; None of any other network."""
    if not getattr(model, "can_generate", bool)() or set(example) != {"input_ids", "attention_mask"}:
        return None
    choices = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(example["input_ids"][:, :6], **{**choices, **options})  # type: ignore[operator]


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert all of them; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--scheme", default="hyperconnections(4)")
    parser.add_argument("--steps", type=int, default=200)
    choices = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    print(f"{choices.scheme}, {choices.steps} steps\n")
    print("| network | start | connections | tokens | moved | loss | undo |\n|---|---|---|---|---|---|---|")
    faults = 0
    for network in STREAMED:
        if choices.only in network:
            found = convert(network, choices.scheme, choices.steps)
            faults += len(found.faults)
            print(found.row(), flush=True)
    return faults


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
