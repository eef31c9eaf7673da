"""Forms in which weights are stored other than as the tensors that a network computes with, known by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["describe_forms"]

PRUNED = r"_(?:orig|mask)$"
"""Either alone says nothing: Swin's files have an `attn_mask`."""
FORMS: tuple[tuple[str, str], ...] = (
    (
        r"\.lora_(?:[AB]|embedding_[AB])\b|\.lora_magnitude_vector\b",
        "adapters of LoRA, which are changes to other weights; merge them first (merge_and_unload() of peft)",
    ),
    (
        PRUNED,
        "pruned by torch.nn.utils.prune; prune.remove(module, name) leaves plain weights",
    ),
    (
        r"\bparametrizations\.\w+\.(?:original\d*|\d+\.)",
        "parametrised by torch.nn.utils.parametrize; remove_parametrizations(module, name) leaves plain weights",
    ),
    (
        r"\.weight_[gv]$",
        "normalised by torch.nn.utils.weight_norm; remove_weight_norm(module) leaves plain weights",
    ),
    (r"\.(?:qweight|qzeros|g_idx)$", "quantised by GPTQ or AWQ; dequantise them, or take the weights before that"),
    (
        r"\.(?:SCB|weight_format|absmax|quant_map|quant_state\.\w+)$",
        "quantised by bitsandbytes; dequantise them, or take the weights before that",
    ),
    (
        r"\.(?:weight_scale(?:_inv)?|weight_zero_point|weight_packed|input_scale)$",
        "quantised, with scales beside them; dequantise them, or take the weights before that",
    ),
    (
        r"_packed_params\b|\.zero_point$|\.weight_fake_quant\.",
        "quantised by torch.ao.quantization; take the weights before that",
    ),
)
"""A pattern that names of such a form match, and what the form is with a way to plain weights."""


def describe_forms(names: Iterable[str]) -> list[str]:
    """Sentences about the forms of weights that some of the names belong to.

    >>> describe_forms(["fc.weight_g", "fc.weight_v", "fc.bias"])[0].partition(";")[0]
    "Its weights are normalised by torch.nn.utils.weight_norm (for instance 'fc.weight_g')"
    >>> describe_forms(["fc.weight", "fc.bias"])
    []
    """
    names = list(names)
    known = set(names)

    def belongs(pattern: str, name: str) -> bool:
        stem = re.sub(PRUNED, "", name)
        return bool(re.search(pattern, name)) and (pattern != PRUNED or {f"{stem}_orig", f"{stem}_mask"} <= known)

    found = ((next((name for name in names if belongs(pattern, name)), None), kind) for pattern, kind in FORMS)
    return [
        f"Its weights are {what} (for instance {name!r}); {remedy}."
        for name, kind in found
        if name is not None
        for what, _, remedy in [kind.partition("; ")]
    ]
