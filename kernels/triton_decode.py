"""Products with packed weights for few tokens a tile: floats are applied a group, not a weight.

Weights are the left operand of the matrix instruction and go from packed words to registers;
tokens are the narrow side. Within a group y = s (p - c) + z x1, with p the product of
offset + code, c the offsets' share of it and x1 the sum of the inputs: both of them come out of one
more matrix instruction, whose rows are ones and offsets (`counters`).

Importing this module imports Triton; only launchers do, inside functions.

Shapes: BN rows of a tile (a divisor of the resident 128), BM tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fissile.kernels.triton_parts import (
    activated,
    gate_and_up,
    lift,
    scale_zero,
    slices,
    unpack,
    zero_code,
)


@triton.jit
def token_rows(
    tile: tl.tensor,
    expert_ptr: tl.tensor,
    begin_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    rows: tl.tensor,
    BM: tl.constexpr,
    ROUTED: tl.constexpr,
) -> tl.tuple:
    """Expert of a token tile, its rows in sorted order, and the end of the expert's rows."""
    if ROUTED:
        expert = tl.load(expert_ptr + tile)
        begin = tl.load(begin_ptr + tile)
        end = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
    else:
        expert = tile * 0
        begin = tile * BM
        end = rows
    return expert, begin + tl.arange(0, BM), end


@triton.jit
def counters(offset: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Rows that sum up tokens: eight of ones, eight of the offset of a slice, (16, 32)."""
    row = tl.arange(0, 16)[:, None] + tl.zeros((16, 32), tl.int32)
    return tl.where(row < 8, 1.0, offset).to(DTYPE)


@triton.jit
def both_sums(sums: tl.tensor, BN: tl.constexpr, BM: tl.constexpr) -> tl.tuple:
    """What `counters` summed up, as (BN, BM): inputs, and offsets' share.

    A thread holds row r and row r + 8 of a matrix instruction's result, in the columns of every
    eight rows of a product, so nothing moves between threads.
    """
    one, offset = tl.split(tl.permute(tl.reshape(sums, (2, 8, BM)), (1, 2, 0)))
    one = tl.reshape(tl.broadcast_to(one[None], (BN // 8, 8, BM)), (BN, BM))
    return one, tl.reshape(tl.broadcast_to(offset[None], (BN // 8, 8, BM)), (BN, BM))


@triton.jit
def corrected(
    acc: tl.tensor, product: tl.tensor, theta_ptr: tl.tensor, one: tl.tensor, offset: tl.tensor,
    BITS: tl.constexpr, STEEP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """acc + s (product - c) + z x1 of one group."""
    scale, zero = scale_zero(tl.load(theta_ptr), BITS, STEEP)
    # Two statements, so that each is one fused multiply-add.
    acc += scale[:, None] * (product - lift(STEEP) * offset)
    acc += zero[:, None] * one
    return acc


@triton.jit
def accumulate(
    x_ptr: tl.tensor, code_ptr: tl.tensor, extra_ptr: tl.tensor, theta_ptr: tl.tensor,
    theta_extra_ptr: tl.tensor, first: tl.tensor, last: tl.tensor, inputs: tl.tensor,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    FP16: tl.constexpr, PTX: tl.constexpr, PADDED: tl.constexpr, STEEP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sum over the blocks first .. last of one row tile and token tile, float32 (BN, BM).

    Args:
        x_ptr: (32, BM) addresses of the first slice of each token.
        code_ptr: (BN, 32) addresses of the first block; extra_ptr likewise.
        theta_ptr: (BN,) addresses of the first group; theta_extra_ptr likewise.
    """
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    CODES: tl.constexpr = slices(BITS) // HALVES
    RUN: tl.constexpr = GROUP // 32
    SPAN: tl.constexpr = slices(BITS) // RUN
    DTYPE: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(first, last):
        extra = None
        if BITS == 3 or BITS == 8:
            extra = tl.load(extra_ptr + block * 4096, eviction_policy="evict_first")
        for half in tl.static_range(HALVES):
            word = tl.load(
                code_ptr + block * (4096 * HALVES) + half * 4096, eviction_policy="evict_first"
            )
            codes = unpack(word, extra, BITS, STEEP, half, FP16, PTX)
            if BITS == 8:
                residual = unpack(extra, None, BITS, 0, half, FP16, PTX)
            for code in tl.static_range(CODES):
                at = block * (slices(BITS) * 32) + (half * CODES + code) * 32
                if PADDED:
                    # Scales and zeros of the padding are 0, so any inputs do; no mask is needed.
                    at = tl.minimum(at, inputs - 32)
                x = tl.load(x_ptr + at)
                if code % RUN == 0:
                    product = tl.zeros((BN, BM), tl.float32)
                    other = tl.zeros((BN, BM), tl.float32)
                    sums = tl.zeros((16, BM), tl.float32)
                product = tl.dot(codes[code], x, product)
                ones = counters(zero_code(BITS, STEEP, FP16, code), DTYPE)
                sums = tl.dot(ones, x, sums)
                if BITS == 8:
                    other = tl.dot(residual[code], x, other)
                if code % RUN == RUN - 1:
                    group = block * SPAN + (half * CODES + code) // RUN
                    one, offset = both_sums(sums, BN, BM)
                    theta = theta_ptr + group * 128
                    acc = corrected(acc, product, theta, one, offset, BITS, STEEP)
                    if BITS == 8:
                        theta = theta_extra_ptr + group * 128
                        acc = corrected(acc, other, theta, one, offset, BITS, 0)
    return acc


@triton.jit
def store_neurons(
    acc: tl.tensor, h_ptr: tl.tensor, row: tl.tensor, valid: tl.tensor, first: tl.tensor,
    size: tl.tensor, BN: tl.constexpr, BM: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """Store h = act(gate) * up.

    Args:
        acc: (BN, BM) gate and up rows of BN/2 neurons from `first` on.
        h_ptr: (R, F).
        row: (BM,) rows of h; valid: which of them exist.
    """
    gate, up = gate_and_up(acc, BN, BM)
    h = (activated(gate, ACT) * up).to(h_ptr.dtype.element_ty)
    neuron = first + tl.arange(0, BN // 2)
    keep = (neuron < size)[:, None] & valid[None, :]
    tl.store(h_ptr + row.to(tl.int64)[None, :] * size + neuron[:, None], h, mask=keep)


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    x_ptr: tl.tensor, code_ptr: tl.tensor, extra_ptr: tl.tensor, theta_ptr: tl.tensor,
    theta_extra_ptr: tl.tensor, y_ptr: tl.tensor, bias_ptr: tl.tensor, expert_ptr: tl.tensor,
    begin_ptr: tl.tensor, offsets_ptr: tl.tensor, slot_ptr: tl.tensor, rows: tl.tensor,
    inputs: tl.tensor, size: tl.tensor, padded_groups: tl.tensor, row_tiles: tl.tensor,
    blocks: tl.tensor, split_blocks: tl.tensor, split_stride: tl.tensor, BITS: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, FP16: tl.constexpr,
    PTX: tl.constexpr, PADDED: tl.constexpr, ROUTED: tl.constexpr, GATHER: tl.constexpr,
    SCATTER: tl.constexpr, TOP_K: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    STEEP: tl.constexpr,
) -> None:  # fmt: skip
    """One row tile, one token tile and one part of the inputs.

    Grid: (row tiles * 128 / BN, token tiles, splits). ACT -1 stores rows as they are; otherwise
    rows are gate and up and neurons are stored. GATHER reads token slot // TOP_K, SCATTER writes
    row slot; `size` is the row length of y.
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
    part = tl.program_id(0) % (128 // BN)
    tile = expert.to(tl.int64) * row_tiles + tl.program_id(0) // (128 // BN)
    n = part * BN + tl.arange(0, BN)
    i = tl.arange(0, 32)
    within = n[:, None] * 32 + i[None, :]
    first = tl.program_id(2) * split_blocks
    acc = accumulate(
        x_ptr + token[None, :] * inputs + i[:, None],
        code_ptr + tile * blocks * (4096 * (2 if BITS == 3 else 1)) + within,
        extra_ptr + tile * blocks * 4096 + within, theta_ptr + tile * padded_groups * 128 + n,
        theta_extra_ptr + tile * padded_groups * 128 + n, first,
        tl.minimum(first + split_blocks, blocks), inputs, BITS, GROUP, BN, BM, FP16, PTX,
        PADDED, STEEP,
    )  # fmt: skip
    begin = tl.program_id(0) * BN
    if ACT >= 0:
        store_neurons(acc, y_ptr, row, valid, begin // 2, size, BN, BM, ACT)
    else:
        at = begin + tl.arange(0, BN)
        if BIAS:
            # One of the parts that are added up holds it.
            inside = (at < size) & (tl.program_id(2) == 0)
            acc += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        out = (place if SCATTER else row).to(tl.int64)
        to = y_ptr + tl.program_id(2).to(tl.int64) * split_stride + out[None, :] * size
        keep = (at < size)[:, None] & valid[None, :]
        tl.store(to + at[:, None], acc.to(y_ptr.dtype.element_ty), mask=keep)
