"""`skipway.chain` on networks that are neither classifiers of images nor language models of transformers.

    python -m benchmarks.chain.others                # all, or the names given

Detection, segmentation, video and optical flow of torchvision, sound, vision with language and series of transformers,
and, where it is installed (`pip install --no-deps diffusers`), networks of diffusers; all small and of random weights.
A line tells how many connections are found and how many a person counted in the forward of the layers, the refused
additions by reason, and whether training mode shows the same connections. The exit status is 1 if one differs.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn, randn

import skipway as sw
from benchmarks.peers import import_torchvision, import_transformers
from skipway.tracing import watch
from skipway.tracing.chain import chain_from_program

__all__ = ["Other", "main", "other_networks"]


@dataclass(frozen=True)
class Other:
    """A network with what is known about it.

    Args:
        name: library and class.
        connections: in one forward pass, as counted by a person.
        source: what adds.
        build: makes the network and what it is called with.
    """

    name: str
    connections: int
    source: str
    build: Callable[[], tuple[nn.Module, Any]]


def torchvision_networks() -> list[Other]:
    """Detection, segmentation, video and optical flow; detectors whose non-maximum suppression needs the compiled half
    of torchvision are left out.
    """
    models = import_torchvision().models
    bare = {"weights": None, "weights_backbone": None, "num_classes": 3}
    photo, clip = randn(2, 3, 64, 64), randn(1, 3, 16, 64, 64)

    def network(name: str, connections: int, source: str, example: Any, **settings: Any) -> Other:
        return Other(
            f"torchvision:{name}",
            connections,
            source,
            lambda: (models.get_model(name, **{"weights": None, **settings}), example),
        )

    detector = {**bare, "min_size": 64, "max_size": 64}
    bottlenecks = "16 Bottlenecks of a ResNet-50"
    residual = "InvertedResidual of MobileNetV3 with use_res_connect: 10"
    pair = (randn(1, 3, 128, 128), randn(1, 3, 128, 128))
    return [
        network("fcos_resnet50_fpn", 16, bottlenecks, ([torch.rand(3, 64, 64)],), **detector),
        network("retinanet_resnet50_fpn", 16, bottlenecks, ([torch.rand(3, 64, 64)],), **detector),
        network("retinanet_resnet50_fpn_v2", 16, bottlenecks, ([torch.rand(3, 64, 64)],), **detector),
        network("deeplabv3_resnet50", 16, bottlenecks, photo, **bare),
        network("fcn_resnet50", 16, bottlenecks, photo, **bare),
        network("deeplabv3_mobilenet_v3_large", 10, residual, photo, **bare),
        network("lraspp_mobilenet_v3_large", 10, residual, photo, **bare),
        network("r3d_18", 8, "8 BasicBlocks", clip),
        network("mc3_18", 8, "8 BasicBlocks", clip),
        network("r2plus1d_18", 8, "8 BasicBlocks", clip),
        network("mvit_v1_b", 32, "MultiscaleBlock.forward: 2 in each of 16", randn(1, 3, 16, 224, 224)),
        network(
            "mvit_v2_s", 48, "MultiscaleBlock.forward: 2 in each of 16, and the pooled query", randn(1, 3, 16, 224, 224)
        ),
        network("swin3d_t", 24, "SwinTransformerBlock.forward: 2 in each of 12", clip),
        network("raft_small", 23, "6 blocks in each encoder; coords1 + delta_flow, but for the first of 12", pair),
        network("raft_large", 23, "6 blocks in each encoder; coords1 + delta_flow, but for the first of 12", pair),
    ]


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
WAVES = {
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
}
PARTS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
TEXT = {**LAYERS, "vocab_size": 64, "max_position_embeddings": 40}
VISION = {**LAYERS, "image_size": 32, "patch_size": 8}


def transformers_networks() -> list[Other]:
    """Sound, vision with language, video, segmentation and series."""
    transformers = import_transformers()
    transformers.logging.set_verbosity_error()

    def network(name: str, connections: int, source: str, example: dict[str, Any], **settings: Any) -> Other:
        kind = getattr(transformers, name)
        return Other(
            f"transformers:{name}", connections, source, lambda: (kind(kind.config_class(**settings)), example)
        )

    ids, image = torch.randint(6, 60, (2, 9)), randn(2, 3, 32, 32)
    wave, both = {"input_values": randn(2, 2000)}, {"input_ids": ids, "pixel_values": image}
    decoded = {"decoder_input_ids": torch.randint(2, 60, (2, 7))}
    filled = torch.cat([torch.full((2, 16), 5), torch.randint(6, 60, (2, 6))], 1)
    waves = {**LAYERS, **WAVES}
    pairs, macaron = "attention and feed-forward of a layer", "2 half feed-forward, attention, convolution of a layer"
    levels = {"hidden_sizes": [16] * 4, "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "layer_type": "basic"}
    return [
        *(
            network(name, 5, f"{pairs}; once + pos_conv_embed", wave, **waves)
            for name in ("Wav2Vec2Model", "HubertModel", "WavLMModel", "UniSpeechModel", "UniSpeechSatModel")
        ),
        network("Data2VecAudioModel", 5, f"{pairs}; once + pos_conv_embed", wave, **waves),
        network("SEWModel", 5, f"{pairs}; once pooled + pos_conv_embed", wave, **waves, squeeze_factor=2),
        network("SEWDModel", 5, f"{pairs}; once pooled + pos_conv_embed", wave, **waves, squeeze_factor=2),
        network("Wav2Vec2ConformerModel", 8, macaron, wave, **waves),
        network("Wav2Vec2BertModel", 8, macaron, {"input_features": randn(2, 20, 160)}, **LAYERS),
        network("ASTModel", 4, pairs, {"input_values": randn(2, 64, 32)}, **LAYERS, max_length=64, num_mel_bins=32),
        network(
            *("EncodecModel", 8, "4 residual units, 2 LSTMs, residual − quantized twice"),
            {"input_values": randn(1, 1, 640)},
            hidden_size=16,
            num_filters=4,
            codebook_size=16,
            upsampling_ratios=[4, 2],
            target_bandwidths=[24.0],
        ),
        network(
            *(
                "Speech2TextModel",
                10,
                "encoder layer 2, decoder layer 3",
                {"input_features": randn(2, 40, 20), **decoded},
            ),
            **{**PARTS, "d_model": 32, "input_feat_per_channel": 20, "conv_channels": 32},
        ),
        network(
            "SpeechT5ForSpeechToText",
            11,
            "encoder layer 2, decoder layer 3; once + pos_conv_embed",
            wave | decoded,
            **{**PARTS, **WAVES, "hidden_size": 32},
        ),
        Other(
            "transformers:WhisperEncoder",
            4,
            pairs,
            lambda: (
                transformers.WhisperModel(
                    transformers.WhisperConfig(
                        **PARTS, d_model=32, num_mel_bins=16, max_source_positions=30, pad_token_id=0
                    )
                ).get_encoder(),
                {"input_features": randn(1, 16, 60)},
            ),
        ),
        network("CLIPModel", 8, pairs, both, text_config=TEXT, vision_config=VISION, projection_dim=16),
        network("SiglipModel", 9, f"{pairs}; the pooling head", both, text_config=TEXT, vision_config=VISION),
        network("ViltModel", 4, pairs, both, **TEXT, image_size=32, patch_size=8),
        network(
            *("LlavaForConditionalGeneration", 8, pairs, {"input_ids": filled, "pixel_values": image}),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=5,
            image_seq_length=16,
            vision_feature_layer=-1,
        ),
        network(
            *("DetrForObjectDetection", 12, "4 blocks, encoder 2 · 2, decoder 2 · 3 but for 2 sums onto queries"),
            {"pixel_values": randn(1, 3, 64, 64)},
            **{**PARTS, "d_model": 32, "num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False},
            backbone=None,
            backbone_config=transformers.ResNetConfig(**stages, out_features=["stage4"]),
        ),
        network(
            *("SegformerForSemanticSegmentation", 8, pairs, {"pixel_values": randn(2, 3, 64, 64)}),
            **{**levels, "decoder_hidden_size": 16},
        ),
        network(
            *("GLPNForDepthEstimation", 8, pairs, {"pixel_values": randn(2, 3, 64, 64)}),
            **{**levels, "decoder_hidden_size": 16},
        ),
        network(
            *("TimesformerModel", 6, "attention in time, in space, feed-forward of a layer"),
            *({"pixel_values": randn(1, 3, 3, 32, 32)},),
            **VISION,
            num_frames=3,
        ),
        network("VideoMAEModel", 4, pairs, {"pixel_values": randn(1, 4, 3, 32, 32)}, **VISION, num_frames=4),
        network(
            *("VivitModel", 4, pairs, {"pixel_values": randn(1, 4, 3, 32, 32)}),
            **{**LAYERS, "image_size": 32, "tubelet_size": [2, 8, 8], "num_frames": 4},
        ),
        network(
            *("PatchTSTModel", 4, pairs, {"past_values": randn(2, 32, 3)}),
            context_length=32,
            patch_length=8,
            patch_stride=8,
            num_input_channels=3,
            d_model=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
        ),
    ]


def other_networks() -> list[Other]:
    """All of them; those of diffusers where it is installed."""
    found = [*torchvision_networks(), *transformers_networks()]
    if find_spec("diffusers") is not None:
        from benchmarks.chain.diffusers_truth import diffusers_networks

        found += diffusers_networks()
    return found


def compare(other: Other) -> tuple[bool, str]:
    """Whether a network is read as a person reads it, and a line about it."""
    torch.manual_seed(0)
    model, example = other.build()
    start = time.process_time()
    chain = sw.chain(model.eval(), example)
    seconds = time.process_time() - start
    try:
        trained = chain_from_program(model, watch(model, example, training=True))
        agrees = [each.name for each in trained] == [each.name for each in chain]
        mode = "as in training" if agrees else f"in training {len(trained)}"
    except sw.SkipwayError as problem:  # a detector asks for targets
        agrees, mode = True, f"in training: {str(problem).partition(': ')[2][:60]}"
    right = len(chain) == other.connections and agrees
    skips, reasons = Counter(each.seen.skip for each in chain), Counter(each.reason for each in chain.refused)
    found = f"{len(chain):3} found, {other.connections:3} read · {dict(skips)} · refused {dict(reasons)} · {mode}"
    return right, f"{'' if right else 'DIFFERS '}{found} · {seconds:.1f} s of processor time"


def main(names: list[str]) -> int:
    """Compare, print, and count the networks that differ."""
    warnings.filterwarnings("ignore")
    chosen = [other for other in other_networks() if not names or other.name.partition(":")[2] in names]
    wrong = 0
    for other in chosen:
        try:
            right, line = compare(other)
        except Exception as problem:  # the table shows it
            right, line = False, f"FAILS {type(problem).__name__}: {str(problem)[:150]}"
        wrong += not right
        print(f"{other.name:46} {line}", flush=True)
    print(f"{wrong} of {len(chosen)} networks differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
