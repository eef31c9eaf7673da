"""Kind: an operation is right on the network that it was written for, and wrong on somebody else's.

A property of every pair of network and operation, looked at from outside (`benchmarks.surgery.foreign`): outputs,
gradients, causality, samples and padding with new parts at random values, modes, and undo to the bit; a refusal needs a
reason and leaves the network alone. The whole grid, some fifty networks, is `python -m benchmarks.surgery.foreign`.

| trial | input | right value |
|---|---|---|
| D1, D2 | torch's encoders and decoder with causal and padding masks, batch first and sequence first | ok |
| D2 | a diffusion transformer's block(x, c), an LSTM as the branch | ok |
| D6 | a temporal convolution network with weight norm, old and new | ok, or refused |
| D8 | two outputs in a mapping, `features_only` | ok |
| D10 | DnCNN and blocks that subtract | ok, or refused |
| D3, D7 | GPT-2, Llama, Gemma 2, Mixtral with padding and their caches | ok, or refused with the reason |
| D20 | BERT, T5, Whisper, Wav2Vec2, Swin, ViT | ok, or refused |
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from benchmarks.surgery.foreign import OPERATIONS, examine
from benchmarks.surgery.foreign_networks import LIBRARIES, NETWORKS

FEW = {
    "GPT-2": ("deepen", "checkpointed", "skip_compute"),
    "Llama": ("deepen", "shorten", "reversible", "rescheme", "rescheme, streams"),
    "Gemma 2": ("deepen", "rescheme"),
    "GPT-J": ("rescheme, streams",),
    "Mixtral": ("deepen", "rescheme, divide"),
    "Phi": ("rescheme", "skip_compute"),
    "Mamba": ("deepen",),
    "BERT": ("rescheme", "deepen"),
    "RoBERTa": ("shorten",),
    "T5": ("deepen", "checkpointed", "rescheme, streams"),
    "Whisper": ("deepen", "skip_compute"),
    "Wav2Vec2": ("deepen", "accelerate"),
    "Swin of transformers": ("skip_compute",),
    "DINOv2": ("reversible", "lesion"),
    "convnext": ("rescheme", "deepen", "remove_norm"),
    "vit": ("accelerate", "shorten"),
    "swin": ("deepen", "rescheme, streams"),
    "cait": ("rescheme",),
    "mixer": ("reversible",),
    "resnet10t": ("remove_norm",),
}
"""What runs in the suite of networks from other libraries; of torch's and our own it is everything."""


def pairs() -> list[object]:
    found: list[object] = []
    for library, networks in LIBRARIES.items():
        absent = pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")
        for network in networks:
            chosen = tuple(OPERATIONS) if library == "torch" else FEW.get(network, ())
            found += [pytest.param(network, each, marks=absent, id=f"{network}: {each}") for each in chosen]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("network", "operation"), pairs())
def test_an_operation_is_right_or_refused_with_a_reason(network, operation):
    outcome = examine(network, operation)
    assert outcome.verdict in ("ok", "refused"), outcome.reason
    assert outcome.verdict == "ok" or len(outcome.reason.split()) > 4


def test_the_grid_holds_thirty_networks_and_every_operation():
    assert len(NETWORKS) >= 30
    assert set(FEW) <= set(NETWORKS)
    assert {name.partition(",")[0] for name in OPERATIONS} >= {
        *("rescheme", "remove_norm", "shorten", "deepen", "lesion", "skip_compute", "checkpointed", "reversible"),
        *("fold_gains", "accelerate"),
    }


@pytest.mark.filterwarnings("ignore")
def test_a_fault_is_seen(monkeypatch):
    """Copies that are called without their mask, which are silent at first, and pass what the operation verifies."""
    from skipway.surgery.block_call import BlockCall
    from skipway.surgery.transaction import Transaction

    monkeypatch.setattr(BlockCall, "follow", lambda self, output, twin, args, kwargs: twin(output))
    monkeypatch.setattr(Transaction, "verify", lambda self: {})
    outcome = examine("encoder, causal", "deepen")
    assert outcome.verdict == "fault"
    assert "outputs depend on later entries of axis 1" in outcome.reason
