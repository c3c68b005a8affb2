"""Products with packed weights for many tokens a tile, and decoding to a scratch matrix.

With many tokens the correction of a group costs more than scaling the weights, so the floats are
applied in registers, in the dtype of the activations. A centre is subtracted from the code first,
exactly, which leaves a small zero: its rounding then costs no more than that of the weight.

Importing this module imports Triton; only launchers do, inside functions.

Shapes: BN rows of a tile (a divisor of the resident 128), BM tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fissile.kernels.triton_decode import token_rows
from fissile.kernels.triton_parts import (
    activated,
    bend_of,
    centre_of,
    exact,
    gate_and_up,
    scale_zero,
    slices,
    unpack,
    weights_of,
)


@triton.jit
def group_floats(
    theta_ptr: tl.tensor, BITS: tl.constexpr, STEEP: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tuple:
    """Scale, and zero with the centre's share, of one group in the dtype of the activations."""
    scale, zero = scale_zero(tl.load(theta_ptr), BITS, STEEP)
    return scale.to(DTYPE), (zero + centre_of(BITS, STEEP) * scale).to(DTYPE)


@triton.jit
def multiply(
    x_ptr: tl.tensor, code_ptr: tl.tensor, extra_ptr: tl.tensor, theta_ptr: tl.tensor,
    theta_extra_ptr: tl.tensor, inputs: tl.tensor, blocks: tl.tensor, BITS: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, FP16: tl.constexpr,
    PTX: tl.constexpr, PADDED: tl.constexpr, STEEP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Product of one row tile and one token tile, float32 (BN, BM); addresses as in `decode`."""
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    CODES: tl.constexpr = slices(BITS) // HALVES
    RUN: tl.constexpr = GROUP // 32
    SPAN: tl.constexpr = CODES // RUN
    DTYPE: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    acc = tl.zeros((BN, BM), tl.float32)
    # Tiles, not blocks: at 3 bits the extra words are read twice, from cache, which costs less than
    # the shared memory of a block's tokens.
    for tile in range(0, blocks * HALVES):
        extra = None
        if BITS == 3:
            extra = tl.load(extra_ptr + tile // 2 * 4096) >> tl.cast(tile % 2 * 8, tl.int16)
        elif BITS == 8:
            extra = tl.load(extra_ptr + tile * 4096)
        codes = unpack(tl.load(code_ptr + tile * 4096), extra, BITS, STEEP, 0, FP16, PTX)
        if BITS == 8:
            residual = unpack(extra, None, BITS, 0, 0, FP16, PTX)
        for code in tl.static_range(CODES):
            at = tile * (CODES * 32) + code * 32
            if PADDED:
                at = tl.minimum(at, inputs - 32)  # weights of the padding are 0
            x = tl.load(x_ptr + at)
            if code % RUN == 0:
                theta = (tile * SPAN + code // RUN) * 128
                scale, zero = group_floats(theta_ptr + theta, BITS, STEEP, DTYPE)
                if BITS == 8:
                    fine, shift = group_floats(theta_extra_ptr + theta, BITS, 0, DTYPE)
            weight = weights_of(codes[code], scale, zero, BITS, STEEP, FP16, code, PTX)
            acc = tl.dot(weight, x, acc)
            if BITS == 8:
                weight = weights_of(residual[code], fine, shift, BITS, 0, FP16, code, PTX)
                acc = tl.dot(weight, x, acc)
    return acc


@triton.jit(do_not_specialize=["rows"])
def prefill_kernel(
    x_ptr: tl.tensor, code_ptr: tl.tensor, extra_ptr: tl.tensor, theta_ptr: tl.tensor,
    theta_extra_ptr: tl.tensor, y_ptr: tl.tensor, bias_ptr: tl.tensor, expert_ptr: tl.tensor,
    begin_ptr: tl.tensor, offsets_ptr: tl.tensor, slot_ptr: tl.tensor, rows: tl.tensor,
    inputs: tl.tensor, size: tl.tensor, padded_groups: tl.tensor, row_tiles: tl.tensor,
    blocks: tl.tensor, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr, PADDED: tl.constexpr,
    ROUTED: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, TOP_K: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, STEEP: tl.constexpr,
) -> None:  # fmt: skip
    """One row tile and one token tile; flags as in `decode_kernel`.

    Grid: (row tiles * 128 / BN, token tiles).
    """
    expert, row, end = token_rows(
        tl.program_id(1), expert_ptr, begin_ptr, offsets_ptr, rows, BM, ROUTED
    )
    if expert < 0:
        return
    valid = row < end
    row = tl.minimum(row, end - 1)
    place = row
    if GATHER or SCATTER:
        place = tl.load(slot_ptr + row)
    token = (place // TOP_K if GATHER else row).to(tl.int64)
    tile = expert.to(tl.int64) * row_tiles + tl.program_id(0) // (128 // BN)
    n = tl.program_id(0) % (128 // BN) * BN + tl.arange(0, BN)
    i = tl.arange(0, 32)
    within = n[:, None] * 32 + i[None, :]
    acc = multiply(
        x_ptr + token[None, :] * inputs + i[:, None],
        code_ptr + tile * blocks * (4096 * (2 if BITS == 3 else 1)) + within,
        extra_ptr + tile * blocks * 4096 + within, theta_ptr + tile * padded_groups * 128 + n,
        theta_extra_ptr + tile * padded_groups * 128 + n, inputs, blocks, BITS, GROUP, BN, BM,
        FP16, PTX, PADDED, STEEP,
    )  # fmt: skip
    if ACT >= 0:
        gate, up = gate_and_up(acc, BN, BM)
        out = activated(gate, ACT) * up
        at = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    else:
        out = acc
        at = tl.program_id(0) * BN + tl.arange(0, BN)
        if BIAS:
            bias = tl.load(bias_ptr + at, mask=at < size, other=0.0)
            out += bias.to(tl.float32)[:, None]
    to = (place if SCATTER else row).to(tl.int64)
    to = y_ptr + to[None, :] * size + at[:, None]
    keep = (at < size)[:, None] & valid[None, :]
    tl.store(to, out.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def dequantize_kernel(
    code_ptr: tl.tensor, extra_ptr: tl.tensor, theta_ptr: tl.tensor, theta_extra_ptr: tl.tensor,
    y_ptr: tl.tensor, rows: tl.tensor, inputs: tl.tensor, padded_groups: tl.tensor,
    row_tiles: tl.tensor, blocks: tl.tensor, expert: tl.tensor, BITS: tl.constexpr,
    GROUP: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr, PAIRED: tl.constexpr,
    STEEP: tl.constexpr,
) -> None:  # fmt: skip
    """Decode one block of one row tile to (N, K) in the dtype of y, rows in stored order.

    Grid: (row tiles, blocks, experts from `expert` on). The affine map is float32, as in
    `fissile.kernels.layout.affine`, and rounded once.
    """
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    CODES: tl.constexpr = slices(BITS) // HALVES
    RUN: tl.constexpr = GROUP // 32
    block = tl.program_id(1)
    tile = (expert + tl.program_id(2)).to(tl.int64) * row_tiles + tl.program_id(0)
    n = tl.arange(0, 128)
    i = tl.arange(0, 32)
    within = n[:, None] * 32 + i[None, :]
    if PAIRED:
        # Rows are interleaved by eight: eight of gate, the same eight neurons of up.
        neuron = tl.program_id(0) * 64 + n // 16 * 8 + n % 8
        row = neuron + n % 16 // 8 * (rows // 2)
        keep = neuron < rows // 2
    else:
        row = tl.program_id(0) * 128 + n
        keep = row < rows
    to = y_ptr + (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * inputs + i[None, :]
    theta = theta_ptr + tile * padded_groups * 128 + n
    theta_extra = theta_extra_ptr + tile * padded_groups * 128 + n
    extra = None
    if BITS == 3 or BITS == 8:
        extra = tl.load(extra_ptr + (tile * blocks + block) * 4096 + within)
    for half in tl.static_range(HALVES):
        word = tl.load(code_ptr + ((tile * blocks + block) * HALVES + half) * 4096 + within)
        codes = unpack(word, extra, BITS, STEEP, half, FP16, PTX)
        if BITS == 8:
            residual = unpack(extra, None, BITS, 0, half, FP16, PTX)
        for code in tl.static_range(CODES):
            at = block * (slices(BITS) * 32) + (half * CODES + code) * 32
            group = (block * (slices(BITS) // RUN) + (half * CODES + code) // RUN) * 128
            scale, zero = scale_zero(tl.load(theta + group), BITS, 0)
            value = exact(codes[code], BITS, STEEP, FP16, code)
            if STEEP > 0:
                value = 2 * value + bend_of(BITS, 2)
            weight = value * scale[:, None] + zero[:, None]
            if BITS == 8:
                scale, zero = scale_zero(tl.load(theta_extra + group), BITS, 0)
                fine = exact(residual[code], BITS, 0, FP16, code)
                weight += fine * scale[:, None] + zero[:, None]
            tl.store(
                to + at,
                weight.to(y_ptr.dtype.element_ty),
                mask=keep[:, None] & (at < inputs),
            )
