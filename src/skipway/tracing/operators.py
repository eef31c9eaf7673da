"""The effect of each dispatched operator on a signal: the vocabulary in which a forward pass is read."""

from __future__ import annotations

from typing import Literal

__all__ = ["Part", "is_linear_map", "part_of"]

Part = Literal[
    "carry",  # the same values, moved, copied or multiplied by a number
    "slice",  # some of the values
    "stride",  # every second position, for example
    "pad",  # the values beside constants
    "pool",  # resampled to fewer positions, without parameters
    "upsample",  # resampled to more positions
    "drop",  # multiplied by random zeros
    "scale",  # multiplied by what does not depend on the input
    "shift",  # added to what does not depend on the input
    "norm",
    "map",  # a linear map by a weight
    "nonlinear",
    "softmax",
    "product",  # of two signals
    "sum",  # of two signals
    "join",  # two signals side by side
    "mean",  # over an axis
    "other",
]

NAMES: dict[Part, str] = {
    "carry": "view _unsafe_view reshape _reshape_alias permute transpose t expand squeeze unsqueeze contiguous clone "
    "_to_copy alias detach roll flip rot90 as_strided view_as_real view_as_complex unfold im2col neg lift_fresh "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle movedim repeat _conj copy copy_ write "
    "slice_scatter select_scatter diagonal positive _to_dense",
    "slice": "slice select split split_with_sizes chunk unbind narrow index index_select gather unsafe_split "
    "unsafe_split_with_sizes unsafe_chunk masked_select take",
    "pad": "constant_pad_nd reflection_pad2d replication_pad2d pad reflection_pad1d replication_pad1d",
    "pool": "avg_pool2d max_pool2d_with_indices max_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d avg_pool1d "
    "adaptive_max_pool2d amax max max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "max_pool1d_with_indices max_pool1d",
    "upsample": "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest1d upsample_linear1d "
    "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest3d upsample_trilinear3d "
    "repeat_interleave",
    "drop": "native_dropout dropout bernoulli alpha_dropout feature_dropout",
    "norm": "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_with_update native_layer_norm native_group_norm batch_norm layer_norm group_norm rms_norm "
    "_fused_rms_norm miopen_batch_norm _native_batch_norm_legit_functional instance_norm "
    "_native_batch_norm_legit_no_stats",
    "map": "convolution _convolution mm addmm bmm baddbmm mv linear addbmm addmv convolution_overrideable conv2d "
    "conv1d cudnn_convolution mkldnn_convolution cudnn_convolution_transpose _linear embedding embedding_bag matmul "
    "_grouped_mm grouped_mm _scaled_mm _scaled_grouped_mm _int_mm mkldnn_rnn_layer _thnn_fused_lstm_cell lstm gru "
    "einsum",
    "nonlinear": "relu gelu silu sigmoid hardswish hardsigmoid leaky_relu tanh elu mish clamp clamp_min clamp_max "
    "hardtanh threshold softplus selu celu prelu _prelu_kernel rrelu_with_noise log_sigmoid_forward glu exp log pow "
    "sqrt rsqrt abs sin cos erf reciprocal square relu6 maximum minimum logaddexp sign round floor ceil fft_r2c "
    "_fft_r2c _fft_c2r _fft_c2c where max_unpool2d atan2 hypot fmax fmin logaddexp2 xlogy copysign remainder fmod",
    "softmax": "_softmax softmax _log_softmax log_softmax _safe_softmax _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention scaled_dot_product_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _transformer_encoder_layer_fwd _native_multi_head_attention "
    "_scaled_dot_product_attention_math_for_mps flex_attention",
    "mean": "mean sum var std cumsum var_mean std_mean linalg_vector_norm",
    "join": "cat stack concat hstack vstack complex index_copy index_add scatter_add index_put scatter scatter_reduce "
    "masked_scatter",
}
PARTS: dict[str, Part] = {name: part for part, names in NAMES.items() for name in names.split()}
# with one signal they carry it; with two they are a product, a sum, a map of one by the other
ARITHMETIC: dict[str, tuple[Part, Part]] = {
    "mul": ("scale", "product"),
    "div": ("scale", "product"),
    "add": ("shift", "sum"),
    "sub": ("shift", "sum"),
    "rsub": ("shift", "sum"),
    "lerp": ("shift", "sum"),
    "addcmul": ("shift", "sum"),
    "addcdiv": ("shift", "sum"),
}


def part_of(name: str, signals: int, *, transposed: bool = False) -> Part:
    """The part that the operator `name` plays when `signals` of its operands depend on the input.

    >>> part_of("add_", 2), part_of("add", 1), part_of("bmm", 2), part_of("bmm", 1)
    ('sum', 'shift', 'product', 'map')
    """
    base = name.removesuffix("_") if not name.startswith("_") else name
    if base in ARITHMETIC:
        return ARITHMETIC[base][signals > 1]
    part = PARTS.get(base, PARTS.get(name, "other"))
    if part == "map":
        return "product" if signals > 1 else "upsample" if transposed else "map"
    if part == "join" and signals < 2:
        return "pad"
    return part


def is_linear_map(name: str) -> bool:
    """True for operators that multiply by a matrix or kernel, however many of their operands are signals.

    >>> is_linear_map("addmm"), is_linear_map("mul")
    (True, False)
    """
    return PARTS.get(name) == "map"
