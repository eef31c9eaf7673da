"""The right answers of `chain` for foreign models, counted by hand in their sources.

Every row was written by reading the forward function that its `source` names, and the configuration of the model, not
by running a tool that finds connections. A count is the number of additions in one forward pass in eval mode.

Decisions where the definition leaves room:

* Reasons for refusing come before the test for a connection: x + mlp(global context of x) is `broadcast`, although x
  is carried, and an add whose carried side does not depend on the input is `constant`.
* A raw tensor plus a linear map of itself (x + depthwise(x), DLA's residual root, RepMixer) is an `identity`
  connection; `parallel` without a non-linearity needs a map or norm on both sides.
* Placement is that of the most frequent set; where two sets are equally frequent, the one that holds a norm. A norm
  that only keys and values pass (spatial reduction) is `inside`; `functional.normalize` of queries and
  keys, ResMLP's affine map, global response normalisation and standardised weights are no norms. A norm that the
  stream passes between two stages (pre-activation) does not make the last sum of a stage `post`.
* Subtractions and fused forms (`addcmul`, a sum over a stack) count as additions. F(x) - x is a `difference`; a carried
  tensor times a gate that depends on the input is `gated`, also where both sides work alike.
* Where no connection exists, or none holds a norm, the placement is `none`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers import import_timm, import_torchvision, import_transformers

__all__ = ["TRUTHS", "Truth", "build"]


@dataclass(frozen=True)
class Truth:
    """The connections of one model by kind of skip, the other adds by the reason for refusing them, and their design.

    `placement` is the set of places of the norms of most connections, joined by '+' in the order pre, inside, end,
    post; `scale` is the kind of a learned scale of most branches: 'none', 'scalar' or 'per channel'.
    """

    model: str
    connections: dict[str, int]
    refused: dict[str, int]
    placement: str
    scale: str
    source: str


TIMM = [
    Truth(
        "timm:resnet18",
        {"identity": 5, "projection": 3},
        {},
        "inside+end",
        "none",
        "timm/models/resnet.py BasicBlock.forward: blocks 2, 2, 2, 2; the first of stages 2 to 4 has a downsample.",
    ),
    Truth(
        "timm:resnet50",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/resnet.py Bottleneck.forward: blocks 3, 4, 6, 3; the first of every stage has conv and norm as "
        "skip.",
    ),
    Truth(
        "timm:resnet50d",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/resnet.py Bottleneck.forward, downsample_avg: pool (absent in stage 1), 1x1 conv, norm.",
    ),
    Truth(
        "timm:resnext50_32x4d",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/resnet.py Bottleneck.forward: resnet50 with 32 groups.",
    ),
    Truth(
        "timm:seresnet50",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/resnet.py Bottleneck.forward: the gate after bn3 multiplies and adds nothing.",
    ),
    Truth(
        "timm:ecaresnet26t",
        {"identity": 4, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/resnet.py Bottleneck.forward: blocks 2, 2, 2, 2, each stage opens with a pooled projection.",
    ),
    Truth(
        "timm:resnet18+cbam",
        {"identity": 5, "projection": 3},
        {"parallel": 8},
        "inside+end",
        "none",
        "timm/layers/cbam.py ChannelAttn.forward: fc(avg) + fc(max) once a block, a ReLU on both sides.",
    ),
    Truth(
        "timm:legacy_seresnet18",
        {"identity": 5, "projection": 3},
        {},
        "inside+end",
        "none",
        "timm/models/senet.py SEResNetBlock.forward: se_module(out) + shortcut.",
    ),
    Truth(
        "timm:resnetv2_50",
        {"identity": 12, "projection": 4},
        {},
        "pre+inside",
        "none",
        "timm/models/resnetv2.py PreActBottleneck.forward: the first block of a stage projects the activated "
        "norm1(x) with a bare conv, so x is that tensor there (placement inside); no norm after the last conv.",
    ),
    Truth(
        "timm:resnest50d",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/resnest.py ResNestBottleneck.forward: split attention sums with .sum(dim), which is no add.",
    ),
    Truth(
        "timm:res2net50_26w_4s",
        {"identity": 12, "projection": 4},
        {"hierarchical": 24},
        "inside+end",
        "none",
        "timm/models/res2net.py Bottle2neck.forward: sp + spx[i] for i = 1, 2 in the 12 blocks that are not first.",
    ),
    Truth(
        "timm:res2next50",
        {"identity": 12, "projection": 4},
        {"hierarchical": 24},
        "inside+end",
        "none",
        "timm/models/res2net.py Bottle2neck.forward: four scales, as res2net50_26w_4s, with groups.",
    ),
    Truth(
        "timm:dpn68",
        {"identity": 18, "projection": 4},
        {},
        "pre+inside",
        "none",
        "timm/models/dpn.py DualPathBlock.forward: x_s1 is a slice of x in 18 of 22 blocks; in the first of each "
        "stage the skip is norm, ReLU, conv: a projection with a pre-activation of its own. First read as parallel, "
        "since both sides hold a non-linearity; the definition was widened, the paper calls it a projection.",
    ),
    Truth(
        "timm:dla34",
        {"identity": 8, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/dla.py DlaTree.forward: 12 blocks; the first of levels 2 to 5 has max pooling, conv and norm.",
    ),
    Truth(
        "timm:dla102",
        {"identity": 38, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/dla.py DlaTree, DlaRoot.forward: 1 + 4 + 8 + 1 trees give 28 block adds, 4 of them projections, "
        "and 14 residual roots norm(conv(cat(x2, ...))) + x2. Unclear: the root's branch is linear; decided "
        "identity.",
    ),
    Truth(
        "timm:dla60_res2net",
        {"identity": 12, "projection": 4},
        {"hierarchical": 24},
        "inside+end",
        "none",
        "timm/models/dla.py DlaBottle2neck.forward: levels 1, 2, 3, 1 give 1 + 2 + 4 + 1 trees of two blocks; chunk "
        "sums in the 12 blocks of stride 1.",
    ),
    Truth(
        "timm:hrnet_w18_small",
        {"identity": 18, "projection": 5},
        {"pyramid": 23},
        "inside+end",
        "none",
        "timm/models/hrnet.py HighResolutionModule.forward: 2 + 6 + 12 fuse adds and 3 in the head. Unclear: where "
        "only the finer side is strided down nothing is upsampled; decided that all sums across resolutions are "
        "pyramid.",
    ),
    Truth("timm:densenet121", {}, {}, "none", "none", "timm/models/densenet.py DenseLayer.forward: only cat."),
    Truth("timm:vgg11_bn", {}, {}, "none", "none", "timm/models/vgg.py VGG.forward_features: a plain chain."),
    Truth("timm:selecsls42b", {}, {}, "none", "none", "timm/models/selecsls.py SelecSlsBlock.forward: only cat."),
    Truth(
        "timm:inception_resnet_v2",
        {"identity": 40},
        {},
        "inside",
        "none",
        "timm/models/inception_resnet_v2.py Block35, Block17, Block8.forward: 10 + 20 + 10; the branch ends with a "
        "conv with bias and a constant scale.",
    ),
    Truth(
        "timm:xception41",
        {"identity": 8, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/xception_aligned.py XceptionModule._residual: 3 entry and 1 exit block project, 8 do not, and "
        "the last block has no skip.",
    ),
    Truth(
        "timm:tresnet_m",
        {"identity": 18, "projection": 3},
        {},
        "inside+end",
        "none",
        "timm/models/tresnet.py BasicBlock, Bottleneck.forward: blocks 3, 4, 11, 3; the first of stages 2 to 4 "
        "projects.",
    ),
    Truth(
        "timm:efficientnet_b0",
        {"identity": 9},
        {},
        "inside+end",
        "none",
        "timm/models/_efficientnet_blocks.py InvertedResidual.forward: repeats 1, 2, 2, 3, 3, 4, 1; all but the "
        "first of a stage have a skip.",
    ),
    Truth(
        "timm:mobilenetv3_large_100",
        {"identity": 10},
        {},
        "inside+end",
        "none",
        "timm/models/_efficientnet_blocks.py DepthwiseSeparableConv, InvertedResidual.forward: 1 + 9 with stride 1 "
        "and equal channels.",
    ),
    Truth(
        "timm:mobilenetv2_100",
        {"identity": 10},
        {},
        "inside+end",
        "none",
        "timm/models/_efficientnet_blocks.py InvertedResidual.forward: repeats 1, 2, 3, 4, 3, 3, 1, less the first "
        "each.",
    ),
    Truth(
        "timm:rexnet_100",
        {"identity": 11},
        {},
        "inside+end",
        "none",
        "timm/models/rexnet.py LinearBottleneck.forward: the skip is added to the first channels only; 16 blocks, 4 "
        "with a stride and the first narrowing.",
    ),
    Truth(
        "timm:ghostnet_100",
        {"identity": 11, "projection": 5},
        {},
        "inside+end",
        "none",
        "timm/models/ghostnet.py GhostBottleneck.forward: the skip is depthwise, norm, pointwise, norm at 4 strides "
        "and at 80 to 112 channels.",
    ),
    Truth(
        "timm:repvgg_a0",
        {},
        {"parallel": 39},
        "none",
        "none",
        "timm/models/byobnet.py RepVggBlock.forward: 22 blocks 1x1 + 3x3, and 17 of them + norm(x).",
    ),
    Truth(
        "timm:mobileone_s0",
        {},
        {"parallel": 183},
        "none",
        "none",
        "timm/models/byobnet.py MobileOneBlock.forward: stem 1, 21 depthwise blocks of 4 and 21 pointwise of 3 adds "
        "(the latter start from 0), and 17 + 18 sums with norm(x).",
    ),
    Truth(
        "timm:regnety_004",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "timm/models/regnet.py Bottleneck.forward: blocks 1, 3, 6, 6; the first of each stage projects.",
    ),
    Truth(
        "timm:cspresnet50",
        {"identity": 13},
        {},
        "inside+end",
        "none",
        "timm/models/cspnet.py BottleneckBlock.forward: depths 3, 3, 5, 2 on one half of the channels; halves are "
        "joined by cat.",
    ),
    Truth(
        "timm:cspdarknet53",
        {"identity": 23},
        {},
        "inside+end",
        "none",
        "timm/models/cspnet.py DarkBlock.forward: depths 1, 2, 8, 8, 4; the last norm is activated before the sum.",
    ),
    Truth(
        "timm:nf_resnet50",
        {"identity": 12, "projection": 4},
        {},
        "none",
        "none",
        "timm/models/nfnet.py NormFreeBlock.forward: out * alpha + shortcut, alpha constant; the skip of the first "
        "block of a stage is [pool] conv of act(x) * beta.",
    ),
    Truth(
        "timm:dm_nfnet_f0",
        {"identity": 8, "projection": 4},
        {},
        "none",
        "scalar",
        "timm/models/nfnet.py NormFreeBlock.forward: depths 1, 2, 6, 3; skipinit_gain is a learned scalar.",
    ),
    Truth(
        "timm:convnext_tiny",
        {"identity": 18},
        {},
        "inside",
        "per channel",
        "timm/models/convnext.py ConvNeXtBlock.forward: depths 3, 3, 9, 3; depthwise, norm, mlp, gamma.",
    ),
    Truth(
        "timm:convnextv2_atto",
        {"identity": 24},
        {},
        "inside",
        "none",
        "timm/models/convnext.py ConvNeXtBlock.forward 12 and timm/layers/grn.py GlobalResponseNorm.forward 12: x + "
        "addcmul(bias, weight, x * n(x)), addcmul being no add. Unclear: whether GRN's is a connection (decided yes, "
        "x is carried); placement is inside for 12 and none for 12.",
    ),
    Truth(
        "timm:convmixer_768_32",
        {"identity": 32},
        {},
        "end",
        "none",
        "timm/models/convmixer.py Residual.forward: depthwise, GELU, norm.",
    ),
    Truth(
        "timm:maxvit_tiny_rw_224",
        {"identity": 51, "projection": 3, "pooled": 1},
        {},
        "pre",
        "none",
        "timm/models/maxxvit.py MbConvBlock 11 and PartitionAttentionCl.forward 44: skips of stride 2 pool, and "
        "expand by a conv but in stage 1, where channels stay 64; the bias goes into the fused attention.",
    ),
    Truth(
        "timm:coatnet_0_rw_224",
        {"identity": 19, "projection": 4},
        {},
        "pre",
        "none",
        "timm/models/maxxvit.py MbConvBlock 5 and TransformerBlock2d.forward 18: the first block of each stage has "
        "pool and conv as skip of its first add.",
    ),
    Truth(
        "timm:coat_lite_tiny",
        {"identity": 24},
        {"gated": 8},
        "pre",
        "none",
        "timm/models/coat.py ConvPosEnc, SerialBlock.forward: 8 blocks of 3, x + depthwise(x) among them (no norm); "
        "FactorAttnConvRelPosEnc.forward adds attention and q * conv(v), products of activations on both sides.",
    ),
    Truth(
        "timm:nest_tiny",
        {"identity": 24},
        {"constant": 3},
        "pre",
        "none",
        "timm/models/nest.py TransformerLayer, NestLevel.forward: depths 2, 2, 8 and one position embedding a level.",
    ),
    Truth(
        "timm:twins_pcpvt_small",
        {"identity": 36},
        {},
        "pre",
        "none",
        "timm/models/twins.py Block, PosConv.forward: depths 3, 4, 6, 3 and 4 position convs x + depthwise(x); 13 "
        "attentions also hold a norm of the reduced keys and values (pre+inside).",
    ),
    Truth(
        "timm:twins_svt_small",
        {"identity": 40},
        {},
        "pre",
        "none",
        "timm/models/twins.py Block, PosConv.forward: depths 2, 2, 10, 4 and 4 position convs.",
    ),
    Truth(
        "timm:volo_d1_224",
        {"identity": 40},
        {"constant": 1, "hierarchical": 1},
        "pre",
        "none",
        "timm/models/volo.py Outlooker, Transformer, ClassBlock.forward: (4 + 14 + 2) x 2; forward_tokens adds the "
        "position embedding. Unclear: forward_head adds head(x[:, 0]) and max(aux_head(x[:, 1:])), linear maps of "
        "different tokens; first decided parallel, and since the sides read different tokens, hierarchical.",
    ),
    Truth(
        "timm:xcit_nano_12_p16_224",
        {"identity": 40},
        {"constant": 1},
        "pre",
        "per channel",
        "timm/models/xcit.py XCABlock 12 x 3 and ClassAttentionBlock.forward 2 x 2; the Fourier position encoding "
        "goes through a conv but depends on no input; the local branch is pre+inside.",
    ),
    Truth(
        "timm:cait_xxs24_224",
        {"identity": 51},
        {"constant": 2},
        "pre",
        "per channel",
        "timm/models/cait.py LayerScaleBlock 24 x 2, LayerScaleBlockClassAttn.forward 2 x 2. Unclear: the first add "
        "of the class token carries a parameter only, decided constant (52 and 1 if it is taken as a connection).",
    ),
    Truth(
        "timm:swin_tiny_patch4_window7_224",
        {"identity": 24},
        {"constant": 17},
        "pre",
        "none",
        "timm/models/swin_transformer.py SwinTransformerBlock.forward; WindowAttention is not fused by default and "
        "adds 12 biases and 5 masks (stage 4 has no shift).",
    ),
    Truth(
        "timm:swinv2_tiny_window8_256",
        {"identity": 24},
        {"constant": 17},
        "end",
        "none",
        "timm/models/swin_transformer_v2.py SwinTransformerV2Block.forward: x + norm(branch(x)); 12 biases, 5 masks. "
        "Unclear: normalize of queries and keys, not counted as a norm.",
    ),
    Truth(
        "timm:hiera_tiny_224",
        {"identity": 21, "projection": 3},
        {"constant": 1},
        "pre",
        "none",
        "timm/models/hiera.py HieraBlock.forward: at three stage changes the skip is max of proj(norm1(x)), both "
        "sides reading the normed tensor.",
    ),
    Truth(
        "timm:mixer_s16_224",
        {"identity": 16},
        {},
        "pre",
        "none",
        "timm/models/mlp_mixer.py MixerBlock.forward: 8 blocks of 2.",
    ),
    Truth(
        "timm:gmixer_24_224",
        {"identity": 48},
        {},
        "pre",
        "none",
        "timm/models/mlp_mixer.py MixerBlock.forward: 24 blocks of 2 with gated layers.",
    ),
    Truth(
        "timm:resmlp_12_224",
        {"identity": 24},
        {"constant": 25},
        "none",
        "per channel",
        "timm/models/mlp_mixer.py ResBlock.forward. Unclear: Affine takes a norm's place and normalises nothing, "
        "decided none (else pre); its addcmul adds beta, twice a block and once at the end.",
    ),
    Truth(
        "timm:gmlp_s16_224",
        {"identity": 30},
        {},
        "pre+inside",
        "none",
        "timm/models/mlp_mixer.py SpatialGatingBlock.forward: the gating unit norms between fc1 and fc2.",
    ),
    Truth(
        "timm:vit_small_patch16_224",
        {"identity": 24},
        {"constant": 1},
        "pre",
        "none",
        "timm/models/vision_transformer.py Block.forward: 12 of 2, and _pos_embed.",
    ),
    Truth(
        "timm:deit3_small_patch16_224",
        {"identity": 24},
        {"constant": 1},
        "pre",
        "per channel",
        "timm/models/vision_transformer.py Block.forward with LayerScale; positions are added before the class token.",
    ),
    Truth(
        "timm:beit_base_patch16_224",
        {"identity": 24},
        {},
        "pre",
        "per channel",
        "timm/models/beit.py Block.forward: no position embedding; the bias goes into the fused attention as its mask.",
    ),
    Truth(
        "timm:vit_small_patch16_18x2_224",
        {"identity": 36},
        {"constant": 1, "parallel": 36},
        "pre",
        "per channel",
        "timm/models/vision_transformer.py ParallelThingsBlock.forward: x + stack(branches).sum(0), 18 blocks of 2; "
        "the scale lies within each of the stacked branches. each sum over a stack adds two parallel branches.",
    ),
    Truth(
        "timm:eva02_tiny_patch14_224",
        {"identity": 24},
        {"constant": 1, "rotary": 24},
        "pre",
        "none",
        "timm/models/eva.py EvaBlock.forward; timm/layers/pos_embed_sincos.py apply_rot_embed on q and k of 12 blocks.",
    ),
    Truth(
        "timm:vit_base_patch16_rope_224",
        {"identity": 24},
        {"rotary": 24},
        "pre",
        "per channel",
        "timm/models/eva.py EvaBlock.forward with gamma_1, gamma_2; no position embedding but rotary q and k.",
    ),
    Truth(
        "timm:mvitv2_tiny",
        {"identity": 27, "projection": 3},
        {"attention": 20},
        "pre",
        "none",
        "timm/models/mvitv2.py MultiScaleBlock.forward 7 + 3 + 10, where a width change projects norm1(x) and max "
        "pools; MultiScaleAttention.forward x + q is a connection of the pooled query (10, no norm); "
        "cal_rel_pos_type adds two logits that depend on q to a slice that is written back before the softmax. "
        "Unclear: the most frequent placement, pre and none being 10 each and pre+inside 7.",
    ),
    Truth(
        "timm:poolformer_s12",
        {"identity": 24},
        {"difference": 12},
        "pre",
        "per channel",
        "timm/models/metaformer.py MetaFormerBlock.forward: 12 blocks of 2; pool(x) - x subtracts.",
    ),
    Truth(
        "timm:efficientformer_l1",
        {"identity": 30},
        {"constant": 1, "parallel": 1, "difference": 14},
        "inside+end",
        "per channel",
        "timm/models/efficientformer.py MetaBlock2d 14 x 2, MetaBlock1d.forward 2; one attention bias; head(x) + "
        "head_dist(x). Unclear: x + scale * (pool(x) - x) holds no map and no norm, decided identity (14, none).",
    ),
    Truth(
        "timm:fastvit_t8",
        {"identity": 20},
        {"parallel": 30, "difference": 10},
        "inside",
        "per channel",
        "timm/models/fastvit.py RepMixerBlock.forward 10 and RepMixer.forward 10 (x + scale * (mixer(x) - norm(x))); "
        "MobileOneBlock.forward 10 + 17 and ReparamLargeKernelConv.forward 3 sum linear maps. Unclear: RepMixer is "
        "linear as a whole, decided identity; its placement is mixed, the mlp's is inside.",
    ),
    Truth(
        "timm:crossvit_9_240",
        {"identity": 30},
        {"constant": 2, "parallel": 1},
        "pre",
        "none",
        "timm/models/crossvit.py: three times 1 + 3 ViT blocks of 2; CrossAttentionBlock.forward x[:, 0:1] + "
        "attn(norm1(x)) 6 times. The head is the mean over a stack of both branches' logits.",
    ),
    Truth(
        "timm:levit_128s",
        {"identity": 20},
        {"constant": 11, "parallel": 1},
        "inside+end",
        "none",
        "timm/models/levit.py LevitBlock 9 x 2, LevitDownsample.forward 2; 11 attention biases; forward_head adds "
        "two heads. Every linear is followed by its norm.",
    ),
    Truth(
        "timm:tiny_vit_5m_224",
        {"identity": 22},
        {},
        "pre",
        "none",
        "timm/models/tiny_vit.py TinyVitBlock 10 x 2, MBConv.forward 2; the attention starts with its norm.",
    ),
    Truth(
        "timm:pit_s_224",
        {"identity": 24},
        {"constant": 1},
        "pre",
        "none",
        "timm/models/pit.py forward_features and vision_transformer.py Block.forward: depths 2, 6, 4.",
    ),
    Truth(
        "timm:edgenext_xx_small",
        {"identity": 15},
        {"constant": 1, "hierarchical": 3},
        "inside",
        "per channel",
        "timm/models/edgenext.py ConvBlock 9, SplitTransposeBlock.forward 3 + 3; chunk sums 0 + 1 + 2; one Fourier "
        "position encoding.",
    ),
    Truth(
        "timm:mobilevit_s",
        {"identity": 20},
        {},
        "pre",
        "none",
        "timm/models/byobnet.py BottleneckBlock.forward 2 (without a downsample the others have no skip) and "
        "vision_transformer.py Block.forward 2 + 4 + 3 blocks of 2; the fusion is a cat.",
    ),
    Truth(
        "timm:halonet26t",
        {"identity": 4, "projection": 4},
        {"attention": 6},
        "inside+end",
        "none",
        "timm/models/byobnet.py BottleneckBlock 5, SelfAttnBlock.forward 3; timm/layers/halo_attn.py "
        "PosEmbedRel.forward adds height and width logits of q, HaloAttn.forward adds them to the scores.",
    ),
    Truth(
        "timm:botnet26t_256",
        {"identity": 4, "projection": 4},
        {"attention": 6},
        "inside+end",
        "none",
        "timm/models/byobnet.py and timm/layers/bottleneck_attn.py PosEmbedRel, BottleneckAttn.forward: as halonet26t.",
    ),
    Truth(
        "timm:lambda_resnet26t",
        {"identity": 4, "projection": 4},
        {"parallel": 3},
        "inside+end",
        "none",
        "timm/layers/lambda_layer.py LambdaLayer.forward: content + position, both a product with q.",
    ),
    Truth(
        "timm:gcresnet50t",
        {"identity": 12, "projection": 4},
        {"broadcast": 16},
        "inside+end",
        "none",
        "timm/models/byobnet.py BottleneckBlock.forward; timm/layers/global_context.py GlobalContext.forward x + "
        "mlp_x of one vector an image.",
    ),
    Truth(
        "timm:focalnet_tiny_srf",
        {"identity": 24},
        {"gated": 12, "parallel": 12},
        "pre",
        "none",
        "timm/models/focalnet.py FocalNetBlock 12 x 2; FocalModulation.forward adds gated contexts, the first to 0 "
        "and then two a block. The first of both sums carries ctx times a gate, of which the next ctx is computed.",
    ),
    Truth(
        "timm:davit_tiny",
        {"identity": 48},
        {},
        "pre",
        "none",
        "timm/models/davit.py SpatialBlock, ChannelBlock.forward 12 x 2 and ConvPosEnc.forward 12 x 2, x + "
        "depthwise(x) without a norm. Unclear: placement, pre and none being 24 each.",
    ),
    Truth(
        "timm:sequencer2d_s",
        {"identity": 36},
        {},
        "pre",
        "none",
        "timm/models/sequencer.py Sequencer2dBlock.forward: depths 4, 3, 8, 3 of 2; the two directions are joined by "
        "cat.",
    ),
]

TORCHVISION = [
    Truth(
        "torchvision:resnet50",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "torchvision/models/resnet.py Bottleneck.forward.",
    ),
    Truth(
        "torchvision:googlenet", {}, {}, "none", "none", "torchvision/models/googlenet.py Inception.forward: only cat."
    ),
    Truth(
        "torchvision:mobilenet_v3_small",
        {"identity": 6},
        {},
        "inside+end",
        "none",
        "torchvision/models/mobilenetv3.py InvertedResidual.forward: 6 of 11 rows keep stride 1 and channels.",
    ),
    Truth(
        "torchvision:efficientnet_v2_s",
        {"identity": 35},
        {},
        "inside+end",
        "none",
        "torchvision/models/efficientnet.py FusedMBConv 2 + 3 + 3, MBConv.forward 5 + 8 + 14; the first two are one "
        "conv (placement end).",
    ),
    Truth(
        "torchvision:vit_b_16",
        {"identity": 24},
        {"constant": 1},
        "pre",
        "none",
        "torchvision/models/vision_transformer.py EncoderBlock.forward and Encoder.forward.",
    ),
    Truth(
        "torchvision:swin_v2_t",
        {"identity": 24},
        {"constant": 17},
        "end",
        "none",
        "torchvision/models/swin_transformer.py SwinTransformerBlockV2.forward; shifted_window_attention adds 12 "
        "biases and 5 masks (no shift where the window covers the map).",
    ),
    Truth(
        "torchvision:maxvit_t",
        {"identity": 51, "projection": 4},
        {"constant": 22},
        "pre",
        "none",
        "torchvision/models/maxvit.py MBConv.forward 7 + 4, stage 1 also with a conv; "
        "PartitionAttentionLayer.forward 22 x 2; one bias an attention.",
    ),
    Truth(
        "torchvision:convnext_tiny",
        {"identity": 18},
        {},
        "inside",
        "per channel",
        "torchvision/models/convnext.py CNBlock.forward.",
    ),
    Truth("torchvision:shufflenet_v2_x1_0", {}, {}, "none", "none", "torchvision/models/shufflenetv2.py: only cat."),
    Truth(
        "torchvision:fcn_resnet50",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "torchvision/models/segmentation/fcn.py: a dilated ResNet-50 whose head upsamples and adds nothing.",
    ),
    Truth(
        "torchvision:lraspp_mobilenet_v3_large",
        {"identity": 10},
        {"pyramid": 1},
        "inside+end",
        "none",
        "torchvision/models/segmentation/lraspp.py LRASPPHead.forward: classifier of the fine map + that of the "
        "interpolated one.",
    ),
    Truth(
        "torchvision:resnet50_fpn",
        {"identity": 12, "projection": 4},
        {"pyramid": 3},
        "inside+end",
        "none",
        "torchvision/ops/feature_pyramid_network.py FeaturePyramidNetwork.forward: three laterals + interpolated; "
        "built with BatchNorm2d, since the default frozen norm is written x * scale + bias (53 constant adds).",
    ),
]

TRANSFORMERS = [
    Truth(
        "transformers:ViTModel",
        {"identity": 24},
        {"constant": 1},
        "pre",
        "none",
        "transformers/models/vit/modeling_vit.py ViTLayer.forward, ViTEmbeddings.forward.",
    ),
    Truth(
        "transformers:Dinov2Model",
        {"identity": 24},
        {"constant": 1},
        "pre",
        "per channel",
        "transformers/models/dinov2/modeling_dinov2.py Dinov2Layer.forward.",
    ),
    Truth(
        "transformers:Swinv2Model",
        {"identity": 24},
        {"constant": 22},
        "end",
        "none",
        "transformers/models/swinv2/modeling_swinv2.py Swinv2Layer.forward; Swinv2SelfAttention.forward adds 12 "
        "biases, and the mask twice in 5 shifted layers.",
    ),
    Truth(
        "transformers:SwinModel",
        {"identity": 24},
        {},
        "pre",
        "none",
        "transformers/models/swin/modeling_swin.py SwinLayer.forward; bias and mask are added to each other, not to "
        "anything that depends on the input, and handed to the fused attention.",
    ),
    Truth(
        "transformers:BeitModel",
        {"identity": 24},
        {},
        "pre",
        "per channel",
        "transformers/models/beit/modeling_beit.py BeitLayer.forward; neither position embedding nor bias by default.",
    ),
    Truth(
        "transformers:ConvNextV2Model",
        {"identity": 36},
        {"constant": 18},
        "inside",
        "none",
        "transformers/models/convnextv2/modeling_convnextv2.py ConvNextV2Layer.forward 18; ConvNextV2GRN.forward "
        "weight * (x * n(x)) + bias + x: the bias is constant (18), the second add a connection (18, no norm). "
        "Unclear: as timm:convnextv2_atto.",
    ),
    Truth(
        "transformers:ResNetModel",
        {"identity": 12, "projection": 4},
        {},
        "inside+end",
        "none",
        "transformers/models/resnet/modeling_resnet.py ResNetBottleNeckLayer.forward: depths 3, 4, 6, 3.",
    ),
    Truth(
        "transformers:BitModel",
        {"identity": 12, "projection": 4},
        {},
        "pre+inside",
        "none",
        "transformers/models/bit/modeling_bit.py BitPreActivationBottleneckLayer.forward: as timm:resnetv2_50 with "
        "weights standardised by batch_norm, which is no norm of activations.",
    ),
    Truth(
        "transformers:LevitModel",
        {"identity": 26},
        {"constant": 14},
        "inside+end",
        "none",
        "transformers/models/levit/modeling_levit.py LevitResidualLayer.forward 12 x 2 + 2; 12 + 2 attention biases.",
    ),
    Truth(
        "transformers:PoolFormerModel",
        {"identity": 24},
        {"difference": 12},
        "pre",
        "per channel",
        "transformers/models/poolformer/modeling_poolformer.py PoolFormerLayer.forward: depths 2, 2, 6, 2 of 2.",
    ),
    Truth(
        "transformers:SegformerModel",
        {"identity": 16},
        {},
        "pre",
        "none",
        "transformers/models/segformer/modeling_segformer.py SegformerLayer.forward: depths 2, 2, 2, 2 of 2; 6 "
        "attentions also norm the reduced keys and values.",
    ),
]

PLAIN = [
    Truth(
        "plain:unet_concat",
        {"identity": 3, "projection": 5},
        {},
        "inside+end",
        "none",
        "ConcatUNet.forward: 8 residual blocks, 5 of which change channels; encoder maps are joined by cat.",
    ),
    Truth(
        "plain:linknet",
        {"identity": 4, "projection": 2},
        {},
        "inside+end",
        "none",
        "LinkNet.forward: 2 + 2 residual blocks, and decoder(...) + encoder map twice, the map raw and of equal shape.",
    ),
    Truth(
        "plain:fpn",
        {"identity": 1, "projection": 2},
        {"pyramid": 4},
        "inside+end",
        "none",
        "PyramidHead.forward: 3 residual blocks; 2 laterals + upsampled; 2 adds of upsampled heads.",
    ),
    Truth(
        "plain:cifar_resnet",
        {"identity": 4, "pooled": 2},
        {},
        "inside+end",
        "none",
        "CifarResNet.forward: strided slices padded with zero channels where channels double (option A).",
    ),
    Truth(
        "plain:post_norm",
        {"identity": 8},
        {"constant": 1},
        "post",
        "none",
        "TokenEncoder.forward: norm(x + branch(x)), 4 layers of 2; positions added once.",
    ),
    Truth(
        "plain:deep_norm",
        {"identity": 8},
        {"constant": 1},
        "post",
        "none",
        "TokenEncoder.forward: norm(alpha * x + branch(x)), alpha constant and on the skip.",
    ),
    Truth(
        "plain:three_terms",
        {"identity": 8},
        {"constant": 1},
        "pre",
        "none",
        "ParallelEncoder.forward: x + attention(norm(x)) + mlp(norm(x)), two adds a layer of 4.",
    ),
    Truth(
        "plain:rezero",
        {"identity": 4},
        {},
        "none",
        "scalar",
        "ReZero.forward: x + alpha * conv(relu(conv(x))), alpha a learned scalar that starts at zero.",
    ),
    Truth(
        "plain:dit",
        {"identity": 8},
        {"constant": 1, "broadcast": 8},
        "pre",
        "none",
        "GatedEncoder.forward below: x + gate(c) * f(norm(x) * (1 + scale(c)) + shift(c)), twice in each of 4 blocks.",
    ),
]

TRUTHS = TIMM + TORCHVISION + TRANSFORMERS + PLAIN


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A conv without bias and its norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """conv, norm, ReLU, conv, norm; the skip is projected where shapes differ, or sliced and padded (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, padded: bool = False) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.second = conv_norm(outputs, outputs)
        self.stride, self.extra = stride, outputs - inputs if padded else 0
        changes = (inputs != outputs or stride != 1) and not padded
        self.shortcut = conv_norm(inputs, outputs, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shortcut(x)
        if self.extra:
            skip = functional.pad(skip[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return functional.relu(self.second(functional.relu(self.first(x))) + skip)


class ConcatUNet(nn.Module):
    """A U-Net of residual blocks that joins its encoder's maps by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder1 = nn.Sequential(ResidualBlock(3, 16), ResidualBlock(16, 16))
        self.encoder2 = nn.Sequential(ResidualBlock(16, 32), ResidualBlock(32, 32))
        self.bottom = nn.Sequential(ResidualBlock(32, 64), ResidualBlock(64, 64))
        self.up2, self.decoder2 = nn.ConvTranspose2d(64, 32, 2, 2), ResidualBlock(64, 32)
        self.up1, self.decoder1 = nn.ConvTranspose2d(32, 16, 2, 2), ResidualBlock(32, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.encoder1(x)
        x2 = self.encoder2(functional.max_pool2d(x1, 2))
        x3 = self.bottom(functional.max_pool2d(x2, 2))
        x2 = self.decoder2(torch.cat([self.up2(x3), x2], dim=1))
        return self.head(self.decoder1(torch.cat([self.up1(x2), x1], dim=1)))


class LinkDecoder(nn.Sequential):
    """conv, norm, ReLU, transposed conv, norm, ReLU, conv, norm, ReLU at twice the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        middle = inputs // 4
        super().__init__(
            conv_norm(inputs, middle, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(middle, middle, 2, 2, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            conv_norm(middle, outputs, 1),
            nn.ReLU(),
        )


class LinkNet(nn.Module):
    """A U-Net that adds its encoder's maps to its decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16), nn.ReLU())
        self.encoder1 = nn.Sequential(ResidualBlock(16, 32, 2), ResidualBlock(32, 32))
        self.encoder2 = nn.Sequential(ResidualBlock(32, 64, 2), ResidualBlock(64, 64))
        self.decoder2, self.decoder1 = LinkDecoder(64, 32), LinkDecoder(32, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x0 = self.stem(x)
        x1 = self.encoder1(x0)
        x1 = self.decoder2(self.encoder2(x1)) + x1
        return self.head(self.decoder1(x1) + x0)


class PyramidHead(nn.Module):
    """A feature pyramid over three residual blocks, and heads of every level that are upsampled and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16), nn.ReLU())
        self.blocks = nn.ModuleList([ResidualBlock(16, 16), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2)])
        self.laterals = nn.ModuleList(nn.Conv2d(channels, 24, 1) for channels in (16, 32, 64))
        self.heads = nn.ModuleList(nn.Sequential(conv_norm(24, 24), nn.ReLU()) for _ in range(3))
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.blocks[0](self.stem(x))
        x2 = self.blocks[1](x1)
        x3 = self.laterals[2](self.blocks[2](x2))
        x2 = self.laterals[1](x2) + functional.interpolate(x3, scale_factor=2)
        x1 = self.laterals[0](x1) + functional.interpolate(x2, scale_factor=2)
        total = self.heads[0](x1) + functional.interpolate(self.heads[1](x2), scale_factor=2)
        return self.head(total + functional.interpolate(self.heads[2](x3), scale_factor=4))


class CifarResNet(nn.Module):
    """Three stages of two residual blocks without a parameter on any skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16), nn.ReLU())
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(ResidualBlock(*width, padded=True) for width in widths))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class Attention(nn.Module):
    """Fused self-attention with four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.mix(x).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = functional.scaled_dot_product_attention(query, key, value)
        return self.project(x.transpose(1, 2).reshape(batch, tokens, width))


class TokenEncoder(nn.Module):
    """A transformer over patches that norms every sum, with a constant factor on the skip unless it is one."""

    def __init__(self, alpha: float = 1.0, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.alpha = alpha
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.attentions = nn.ModuleList(Attention(width) for _ in range(depth))
        self.mlps = nn.ModuleList(self.mlp(width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def mlp(width: int) -> nn.Sequential:
        """Two linear maps around a GELU."""
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            skip = x if self.alpha == 1.0 else self.alpha * x
            x = self.norms[2 * layer](skip + attention(x))
            skip = x if self.alpha == 1.0 else self.alpha * x
            x = self.norms[2 * layer + 1](skip + mlp(x))
        return self.head(x.mean(dim=1))


class ParallelEncoder(TokenEncoder):
    """A transformer whose attention and mlp read one norm and are added to the stream in one expression."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=False):
            normed = norm(x)
            x = x + attention(normed) + mlp(normed)
        return self.head(x.mean(dim=1))


class GatedEncoder(TokenEncoder):
    """Attention and mlp whose input is shifted and scaled and whose output is gated by a vector of the image (DiT)."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__(width=width, depth=depth)
        self.modulate = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        vector = functional.silu(x.mean(dim=1, keepdim=True))
        x = x + self.position
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            parts = self.modulate[layer](vector).chunk(6, dim=-1)
            for place, branch in ((0, attention), (1, mlp)):
                shift, scale, gate = parts[3 * place : 3 * place + 3]
                x = x + gate * branch(self.norms[2 * layer + place](x) * (1 + scale) + shift)
        return self.head(x.mean(dim=1))


class ReZero(nn.Module):
    """Four branches without a norm, each multiplied by a learned scalar."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(4)
        )
        self.alphas = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch, alpha in zip(self.branches, self.alphas, strict=True):
            x = x + alpha * branch(x)
        return x


PLAIN_MODELS: dict[str, Callable[[], nn.Module]] = {
    "unet_concat": ConcatUNet,
    "linknet": LinkNet,
    "fpn": PyramidHead,
    "cifar_resnet": CifarResNet,
    "post_norm": TokenEncoder,
    "deep_norm": lambda: TokenEncoder(alpha=1.5),
    "three_terms": ParallelEncoder,
    "dit": GatedEncoder,
    "rezero": ReZero,
}


def build_timm(name: str) -> tuple[nn.Module, int]:
    """A model of timm and its image size; 'name+attention' gives every residual block that attention."""
    name, _, attention = name.partition("+")
    options = {"block_args": {"attn_layer": attention}} if attention else {}
    model = import_timm().create_model(name, **options)
    return model, model.default_cfg["input_size"][-1]


def build_torchvision(name: str) -> tuple[nn.Module, int]:
    """A model of torchvision without weights, and its image size."""
    import_torchvision()
    from torchvision import models

    if name == "resnet50_fpn":
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        return resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d), 224
    options = {"init_weights": False} if name == "googlenet" else {}
    if name in ("fcn_resnet50", "lraspp_mobilenet_v3_large"):
        options["weights_backbone"] = None
    return models.get_model(name, weights=None, **options), 224


def build_transformers(name: str) -> tuple[nn.Module, int]:
    """A model of transformers in its default configuration."""
    model_class = getattr(import_transformers(), name)
    return model_class(model_class.config_class()), 224


def build_plain(name: str) -> tuple[nn.Module, int]:
    """A model of this file."""
    return PLAIN_MODELS[name](), 32


BUILDERS: dict[str, Callable[[str], tuple[nn.Module, int]]] = {
    "timm": build_timm,
    "torchvision": build_torchvision,
    "transformers": build_transformers,
    "plain": build_plain,
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model of a row, e.g. 'timm:resnet50', in eval mode on the meta device, and an image for it."""
    library, _, model_name = name.partition(":")
    with torch.device("meta"):
        model, size = BUILDERS[library](model_name)
        return model.eval(), torch.empty(1, 3, size, size)
