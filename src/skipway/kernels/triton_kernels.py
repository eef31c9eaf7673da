"""Kernels in Triton. Importing this module needs Triton; `triton_launch` does it when it launches the first one."""

# Triton adds tuples and does not unpack them
# ruff: noqa: RUF005
# pyrefly: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "depthwise_kernel",
    "depthwise_to_weight_kernel",
    "residual_backward_kernel",
    "residual_kernel",
    "window_attention_backward_kernel",
    "window_attention_kernel",
]


@triton.jit
def broadcast_factors(
    gain, mask, start, inside, at, CHANNELS: tl.constexpr, SAMPLE: tl.constexpr, GAIN: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Return g · m for elements `start` + `at` of a tensor whose last axis is channels; `start` is a 64-bit scalar."""
    factor = tl.full(at.shape, 1.0, tl.float32)
    if GAIN == 1:
        factor *= tl.load(gain).to(tl.float32)
    if GAIN == 2:
        channel = ((start % CHANNELS).to(tl.int32) + at) % CHANNELS
        factor *= tl.load(gain + channel, inside).to(tl.float32)
    if MASK:
        sample = start // SAMPLE + ((start % SAMPLE).to(tl.int32) + at) // SAMPLE
        factor *= tl.load(mask + sample, inside).to(tl.float32)
    return factor


@triton.jit
def residual_kernel(
    shortcut, branch, gain, mask, out, size, CHANNELS: tl.constexpr, SAMPLE: tl.constexpr, GAIN: tl.constexpr,
    MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute out = shortcut + g · m · branch for `BLOCK` elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = start + at < size
    y = tl.load(branch + start + at, inside).to(tl.float32)
    y *= broadcast_factors(gain, mask, start, inside, at, CHANNELS, SAMPLE, GAIN, MASK)
    y += tl.load(shortcut + start + at, inside).to(tl.float32)
    tl.store(out + start + at, y.to(out.dtype.element_ty), inside)


@triton.jit
def channel_gain(gain, channel, valid, GAIN: tl.constexpr):
    """Return g for some channels."""
    factor = tl.full(channel.shape, 1.0, tl.float32)
    if GAIN == 1:
        factor *= tl.load(gain).to(tl.float32)
    if GAIN == 2:
        factor *= tl.load(gain + channel, valid, other=0.0).to(tl.float32)
    return factor


@triton.jit
def residual_backward_kernel(
    gradient, branch, gain, mask, to_branch, to_gain, rows, sample, CHANNELS: tl.constexpr, GAIN: tl.constexpr,
    MASK: tl.constexpr, LEARNED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the branch's gradient g · m · dy, and this program's part of g's for each channel, Σ m · dy · branch."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < CHANNELS
    factor = channel_gain(gain, channel, valid, GAIN)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for number in range(STEPS):
        row = (tl.program_id(0) * STEPS + number) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & valid[None, :]
        at = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        dy = tl.load(gradient + at, inside, other=0.0).to(tl.float32)
        if MASK:
            dy *= tl.load(mask + row // sample, row < rows, other=0.0).to(tl.float32)[:, None]
        tl.store(to_branch + at, (dy * factor[None, :]).to(to_branch.dtype.element_ty), inside)
        if LEARNED:
            total += dy * tl.load(branch + at, inside, other=0.0).to(tl.float32)
    if LEARNED:
        tl.store(to_gain + tl.program_id(0) * CHANNELS + channel, tl.sum(total, 0), valid)


@triton.jit
def window_tokens(window, height, width, down, across, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the pixels of the map that are a window's tokens, and on which side of its seams each lies."""
    per_row = width // SIDE
    per_image = (height // SIDE) * per_row
    t = tl.arange(0, BLOCK)
    row = (window % per_image) // per_row * SIDE + t // SIDE
    column = (window % per_image) % per_row * SIDE + t % SIDE
    pixel = (
        (window // per_image).to(tl.int64) * height * width + (row + down) % height * width + (column + across) % width
    )
    part = 2 * (row >= height - down) + (column >= width - across)
    return pixel, part


@triton.jit
def window_weights(q, k, bias, part, scale, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return softmax(q kᵀ / √d + B + M) of one window and head; columns after the last token are 0."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    logits += tl.where(part[:, None] != part[None, :], -100.0, 0.0)
    logits = tl.where((tl.arange(0, BLOCK) < TOKENS)[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def window_attention_kernel(
    qkv, position, out, windows, height, width, down, across, scale, HEADS: tl.constexpr, SIDE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend within `STEPS` windows of one head, reading the map and writing to it: nothing is rolled or copied."""
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * STEPS
    t, e = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = t < SIDE * SIDE
    both = inside[:, None] & inside[None, :]
    entry = head * SIDE**4 + t[:, None] * SIDE**2 + t[None, :]
    bias = tl.load(position + entry, both, other=0.0).to(tl.float32)
    for window in range(first, min(first + STEPS, windows)):
        pixel, part = window_tokens(window, height, width, down, across, SIDE, BLOCK)
        at = qkv + pixel[:, None] * (3 * HEADS * WIDTH) + head * WIDTH + e[None, :]
        q = tl.load(at, inside[:, None], other=0.0)
        k = tl.load(at + HEADS * WIDTH, inside[:, None], other=0.0)
        v = tl.load(at + 2 * HEADS * WIDTH, inside[:, None], other=0.0)
        weights = window_weights(q, k, bias, part, scale, SIDE * SIDE, BLOCK, PRECISION)
        y = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        to = out + pixel[:, None] * (HEADS * WIDTH) + head * WIDTH + e[None, :]
        tl.store(to, y.to(out.dtype.element_ty), inside[:, None])


@triton.jit
def window_attention_backward_kernel(
    gradient, qkv, position, to_qkv, to_position, windows, height, width, down, across, scale, HEADS: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients by weights computed again; the bias's is summed over the windows in registers."""
    head = tl.program_id(0) % HEADS
    split = tl.program_id(0) // HEADS
    t, e = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = t < SIDE * SIDE
    both = inside[:, None] & inside[None, :]
    entry = head * SIDE**4 + t[:, None] * SIDE**2 + t[None, :]
    bias = tl.load(position + entry, both, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for window in range(split * STEPS, min(split * STEPS + STEPS, windows)):
        pixel, part = window_tokens(window, height, width, down, across, SIDE, BLOCK)
        at = pixel[:, None] * (3 * HEADS * WIDTH) + head * WIDTH + e[None, :]
        q = tl.load(qkv + at, inside[:, None], other=0.0)
        k = tl.load(qkv + at + HEADS * WIDTH, inside[:, None], other=0.0)
        v = tl.load(qkv + at + 2 * HEADS * WIDTH, inside[:, None], other=0.0)
        dy = tl.load(
            gradient + pixel[:, None] * (HEADS * WIDTH) + head * WIDTH + e[None, :], inside[:, None], other=0.0
        )
        weights = window_weights(q, k, bias, part, scale, SIDE * SIDE, BLOCK, PRECISION)
        to_v = tl.dot(tl.trans(weights.to(dy.dtype)), dy, input_precision=PRECISION)
        within = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        within = weights * (within - tl.sum(within * weights, 1)[:, None])
        total += within
        narrow = (within * scale).to(q.dtype)
        to_q = tl.dot(narrow, k, input_precision=PRECISION)
        to_k = tl.dot(tl.trans(narrow), q, input_precision=PRECISION)
        tl.store(to_qkv + at, to_q.to(to_qkv.dtype.element_ty), inside[:, None])
        tl.store(to_qkv + at + HEADS * WIDTH, to_k.to(to_qkv.dtype.element_ty), inside[:, None])
        tl.store(to_qkv + at + 2 * HEADS * WIDTH, to_v.to(to_qkv.dtype.element_ty), inside[:, None])
    tl.store(to_position + split.to(tl.int64) * HEADS * SIDE**4 + entry, total, both)


@triton.jit
def load_row(x, image, y, start, height, width, channel, CHANNELS: tl.constexpr, COUNT: tl.constexpr):
    """Return the channels of `COUNT` pixels in row y from column `start` on: a tuple of vectors, zeros outside."""
    row = x + (image * height + y).to(tl.int64) * width * CHANNELS
    found = ()
    for j in tl.static_range(COUNT):
        column = start + j
        inside = (y >= 0) & (y < height) & (column >= 0) & (column < width) & (channel < CHANNELS)
        values = tl.load(row + column * CHANNELS + channel, inside != 0, other=0.0)
        found = found + (values.to(tl.float32),)
    return found


@triton.jit
def depthwise_kernel(
    x, weight, bias, out, height, width, CHANNELS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Convolve a tile of ROWS × COLUMNS pixels: each input is read once and stays in registers."""
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    top, left = tile // across * ROWS, tile % across * COLUMNS
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < CHANNELS
    first = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        first = tl.load(bias + channel, valid, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        sums = sums + (first,)
    for r in tl.static_range(ROWS + SIDE - 1):
        y, start = top + r - SIDE // 2, left - SIDE // 2
        values = load_row(x, image, y, start, height, width, channel, CHANNELS, COLUMNS + SIDE - 1)
        updated = ()
        for o in tl.static_range(ROWS):
            if (r - o >= 0) and (r - o < SIDE):
                taps = ()
                for j in tl.static_range(SIDE):
                    taps = taps + (
                        tl.load(weight + ((r - o) * SIDE + j) * CHANNELS + channel, valid, other=0.0).to(tl.float32),
                    )
                for w in tl.static_range(COLUMNS):
                    total = sums[o * COLUMNS + w]
                    for j in tl.static_range(SIDE):
                        total += values[w + j] * taps[j]
                    updated = updated + (total,)
            else:
                for w in tl.static_range(COLUMNS):
                    updated = updated + (sums[o * COLUMNS + w],)
        sums = updated
    for o in tl.static_range(ROWS):
        row = out + (image * height + top + o).to(tl.int64) * width * CHANNELS
        for w in tl.static_range(COLUMNS):
            inside = (top + o < height) & (left + w < width) & valid
            tl.store(row + (left + w) * CHANNELS + channel, sums[o * COLUMNS + w].to(out.dtype.element_ty), inside != 0)


@triton.jit
def depthwise_to_weight_kernel(
    gradient, x, to_weight, tiles_of_all, height, width, CHANNELS: tl.constexpr, SIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum `STEPS` tiles' part of dW_ij = Σ dy_t x_{t + (i, j)}; all k² sums stay in registers."""
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = ()
    for _ in tl.static_range(SIDE * SIDE):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    first = tl.program_id(0) * STEPS
    for number in range(first, min(first + STEPS, tiles_of_all)):
        image, tile = number // tiles, number % tiles
        top, left = tile // across * ROWS, tile % across * COLUMNS
        dy = ()
        for o in tl.static_range(ROWS):
            dy = dy + load_row(gradient, image, top + o, left, height, width, channel, CHANNELS, COLUMNS)
        for r in tl.static_range(ROWS + SIDE - 1):
            y, start = top + r - SIDE // 2, left - SIDE // 2
            values = load_row(x, image, y, start, height, width, channel, CHANNELS, COLUMNS + SIDE - 1)
            updated = ()
            for i in tl.static_range(SIDE):
                if (r - i >= 0) and (r - i < ROWS):
                    for j in tl.static_range(SIDE):
                        total = sums[i * SIDE + j]
                        for w in tl.static_range(COLUMNS):
                            total += dy[(r - i) * COLUMNS + w] * values[w + j]
                        updated = updated + (total,)
                else:
                    for j in tl.static_range(SIDE):
                        updated = updated + (sums[i * SIDE + j],)
            sums = updated
    for i in tl.static_range(SIDE * SIDE):
        to = to_weight + (tl.program_id(0) * SIDE * SIDE + i) * CHANNELS + channel
        tl.store(to, sums[i], channel < CHANNELS)
