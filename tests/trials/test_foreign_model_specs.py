"""Kind: a model by name is taken to have one input, images or tokens by a list, and to be as small as an example.

| trial | input | right value |
|---|---|---|
| D15 | `hf:` CLIP: tokens and images | both drawn; its own contrastive loss |
| D15 | Wav2Vec2, Hubert: a waveform | drawn; `--input 4000` sets its length |
| D15 | Whisper: spectra by the config's bands, tokens of the decoder as labels | its own loss |
| D15 | T5 without a start token, Bart: tokens and their decoder | its own loss |
| D15 | T5Model, BartModel: without labels | decoder tokens |
| D15 | ViT, SegFormer, AST, BERT, GPT-2 | as before |
| D15 | a class that needs configs, or inputs of its own | one line with the file route |
| — | a network whose weights do not fit into memory | refused with both numbers |
| D15 | `timm:vit_nope`, `torchvision:resnet_18`, `hf:Wav2VecModel` | names that are close, or begin alike |
| — | FILE.py:NAME giving (model, (a, b)) for a forward of two arguments | both are inputs |
| — | LayerDrop: layers that a pass leaves out | no finding blames them |
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from skipway.cli.diagnosis_batch import inputs_and_targets
from skipway.errors import suggest
from skipway.tracing.example import call_model
from skipway.zoo import LoadedModel, ModelRequest, import_library, load_model, sources
from skipway.zoo.random_inputs import find_inputs

TEXT = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
SEQUENCES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SEQUENCES |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 60, "pad_token_id": 1}
SPEECH = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH |= {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
VISION = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2}

MODELS: dict[str, tuple[str, dict[str, Any], list[str], bool]] = {
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": VISION},
        ["input_ids", "pixel_values", "return_loss"],
        True,
    ),
    "Wav2Vec2Model": ("Wav2Vec2Config", SPEECH, ["input_values"], False),
    "HubertModel": ("HubertConfig", SPEECH, ["input_values"], False),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**SEQUENCES, "num_mel_bins": 8, "max_source_positions": 20, "decoder_start_token_id": 2},
        ["input_features", "labels"],
        True,
    ),
    "T5ForConditionalGeneration": ("T5Config", T5, ["input_ids", "labels"], True),
    "T5Model": ("T5Config", T5, ["input_ids", "decoder_input_ids"], False),
    "BartForConditionalGeneration": ("BartConfig", SEQUENCES, ["input_ids", "labels"], True),
    "ViTForImageClassification": ("ViTConfig", VISION, ["pixel_values"], False),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        | {"decoder_hidden_size": 16},
        ["pixel_values"],
        False,
    ),
    "ASTModel": ("ASTConfig", {**SPEECH, "num_mel_bins": 32, "max_length": 64}, ["input_values"], False),
    "BertForMaskedLM": ("BertConfig", TEXT, ["input_ids", "labels"], True),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2},
        ["input_ids", "labels"],
        True,
    ),
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("transformers")
    return import_library("transformers")


@pytest.fixture
def small(transformers, monkeypatch):
    """The classes of transformers make tiny networks by default."""

    def make(name: str) -> LoadedModel:
        kind, options, _, _ = MODELS[name]
        config = partial(getattr(transformers, kind), **options)
        made = type(name, (getattr(transformers, name),), {"config_class": config})
        monkeypatch.setattr(sources, "import_library", lambda *_: SimpleNamespace(**{name: made}))
        return load_model(f"hf:{name}", ModelRequest())

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_inputs_of_transformers(name, small):
    _, _, arguments, own = MODELS[name]
    loaded = small(name)
    example = loaded.random(3)
    assert list(example) == arguments
    output = call_model(loaded.model, example)
    assert bool(getattr(output, "loss", None) is not None) == own
    if own:
        assert output.loss.requires_grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["CLIPModel", "Wav2Vec2Model", "T5ForConditionalGeneration"])
def test_they_are_diagnosed(name, small):
    loaded = small(name)
    diagnosis = sw.diagnose(loaded.model, loaded.random(8), allowance=0.0)
    assert diagnosis.measurement.finite
    assert len(diagnosis.chain)
    assert diagnosis.remarks[0].startswith("loss: ")


@pytest.mark.filterwarnings("ignore")
def test_the_shape_of_the_main_input_can_be_chosen(small):
    model = small("Wav2Vec2Model").model
    assert find_inputs(model, (4000,))[0].shape == (4000,)


def test_what_cannot_run_by_itself_names_the_file_route(transformers, monkeypatch):
    class Needy(nn.Module):
        main_input_name = "points"
        config_class = transformers.BertConfig

        def __init__(self, config) -> None:
            super().__init__()
            self.config, self.layer = config, nn.Linear(2, 2)

        def forward(self, points: Tensor) -> Tensor:
            return self.layer(points)

    monkeypatch.setattr(sources, "import_library", lambda *_: SimpleNamespace(NeedyModel=Needy))
    with pytest.raises(sw.SkipwayError, match=r"hf:NeedyModel does not run .*\(model, inputs\): FILE\.py:NAME"):
        load_model("hf:NeedyModel", ModelRequest())


def test_what_does_not_fit_into_memory_is_refused(small, monkeypatch):
    monkeypatch.setattr(sources, "available_memory", lambda: 10_000)
    with pytest.raises(sw.SkipwayError, match="billion parameters need 0 GB, and 0 are free"):
        small("BertForMaskedLM")


@pytest.mark.parametrize(
    ("name", "known", "close"),
    [
        ("vit_nope", ["resnet18", "vit_tiny", "vit_base_patch16"], "'vit_tiny'"),
        ("resnet_18", ["resnet18", "vgg11"], "'resnet18'"),
        ("Wav2VecModel", ["Wav2Vec2Model", "BertModel"], "'Wav2Vec2Model'"),
    ],
)
def test_suggestions_are_close(name, known, close):
    assert suggest("model", name, known).partition("did you mean ")[2].startswith(close)


def test_two_inputs_of_a_file():
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    a, b = torch.ones(8, 2), torch.zeros(8, 2)
    assert inputs_and_targets(Pair(), (a, b)) == ((a, b), None)
    assert inputs_and_targets(Pair(), ((a, b), a)) == ((a, b), a)
    assert inputs_and_targets(nn.Linear(2, 2), (a, b)) == (a, b)
    assert inputs_and_targets(nn.Linear(2, 2), {"input": a}) == ({"input": a}, None)


class Dropping(nn.Module):
    """LayerDrop: in training a layer is left out at random, decided by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or float(torch.rand([])) > 0.4:
                x = x + layer(x).relu() / 4
        return self.head(x)


def test_layers_that_a_pass_leaves_out_are_not_blamed():
    model = Dropping()
    diagnosis = sw.diagnose(model, torch.randn(32, 8), targets=torch.randint(3, (32,)), seed=3)
    assert 0 < len(diagnosis.chain) < 12
    assert all(signal.gradient_after > 0 for signal in diagnosis.measurement.connections)
    assert "two-zeros" not in {finding.rule for finding in diagnosis.findings}
