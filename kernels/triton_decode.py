"""Products with packed weights for few tokens a tile: floats are applied a group, not a weight.

Weights are the left operand of the matrix instruction and go from packed words to registers;
tokens are the narrow side. Within a group y = s (p - c) + z x1, with p the product of
offset + code, c the offsets' share of it and x1 the sum of the inputs (`group_sums`).

Importing this module imports Triton; only launchers do, inside functions.

Shapes: BN rows of a tile (a divisor of the resident 128), BM tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fissile.kernels.triton_parts import (
    activated,
    gate_and_up,
    scale_zero,
    slice_offset,
    slices,
    unpack,
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
def corrected(
    acc: tl.tensor,
    product: tl.tensor,
    theta_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    group: tl.tensor,
    groups: tl.tensor,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """acc + s (product - c) + z x1 of one group."""
    scale, zero = scale_zero(tl.load(theta_ptr))
    if PADDED:
        inside = group < groups
        total = tl.load(sums_ptr, mask=inside, other=0.0)
        offset = tl.load(sums_ptr + groups, mask=inside, other=0.0)
    else:
        total = tl.load(sums_ptr)
        offset = tl.load(sums_ptr + groups)
    # Two statements, so that each is one fused multiply-add.
    acc += scale[:, None] * (product - offset[None, :])
    acc += zero[:, None] * total[None, :]
    return acc


@triton.jit
def accumulate(
    x_ptr: tl.tensor, sums_ptr: tl.tensor, code_ptr: tl.tensor, extra_ptr: tl.tensor,
    theta_ptr: tl.tensor, theta_extra_ptr: tl.tensor, first: tl.tensor, last: tl.tensor,
    inputs: tl.tensor, groups: tl.tensor, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sum over the blocks first .. last of one row tile and token tile, float32 (BN, BM).

    Args:
        x_ptr: (32, BM) addresses of the first slice of each token.
        sums_ptr: (BM,) addresses of the first group of each token.
        code_ptr: (BN, 32) addresses of the first block; extra_ptr likewise.
        theta_ptr: (BN,) addresses of the first group; theta_extra_ptr likewise.
    """
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    CODES: tl.constexpr = slices(BITS) // HALVES
    RUN: tl.constexpr = GROUP // 32
    SPAN: tl.constexpr = slices(BITS) // RUN
    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(first, last):
        third = None
        if BITS == 3 or BITS == 8:
            third = tl.load(extra_ptr + block * 4096, eviction_policy="evict_first")
        for half in tl.static_range(HALVES):
            word = tl.load(
                code_ptr + block * (4096 * HALVES) + half * 4096, eviction_policy="evict_first"
            )
            codes = unpack(word, third, BITS, half, FP16, PTX)
            if BITS == 8:
                residual = unpack(third, None, BITS, half, FP16, PTX)
            for code in tl.static_range(CODES):
                at = block * (slices(BITS) * 32) + (half * CODES + code) * 32
                if PADDED:
                    x = tl.load(x_ptr + at, mask=at < inputs, other=0.0)
                else:
                    x = tl.load(x_ptr + at)
                if code % RUN == 0:
                    product = tl.zeros((BN, BM), tl.float32)
                    other = tl.zeros((BN, BM), tl.float32)
                product = tl.dot(codes[code], x, product)
                if BITS == 8:
                    other = tl.dot(residual[code], x, other)
                if code % RUN == RUN - 1:
                    group = block * SPAN + (half * CODES + code) // RUN
                    sums = sums_ptr + group
                    acc = corrected(
                        acc, product, theta_ptr + group * 128, sums, group, groups, PADDED
                    )
                    if BITS == 8:
                        theta = theta_extra_ptr + group * 128
                        acc = corrected(acc, other, theta, sums, group, groups, PADDED)
    return acc


@triton.jit
def store_neurons(
    acc: tl.tensor, h_ptr: tl.tensor, sums_ptr: tl.tensor, row: tl.tensor, valid: tl.tensor,
    first: tl.tensor, size: tl.tensor, groups: tl.tensor, BN: tl.constexpr, BM: tl.constexpr,
    ACT: tl.constexpr, NEXT_BITS: tl.constexpr, NEXT_GROUP: tl.constexpr, FP16: tl.constexpr,
) -> None:  # fmt: skip
    """Store h = act(gate) * up and the group sums that the down projection will need.

    Args:
        acc: (BN, BM) gate and up rows of BN/2 neurons from `first` on.
        h_ptr: (R, F); sums_ptr: float32 (R, 2, G), zeroed where a group spans several tiles.
        row: (BM,) rows of h; valid: which of them exist.
    """
    HALF: tl.constexpr = BN // 2
    gate, up = gate_and_up(acc, BN, BM)
    h = (activated(gate, ACT) * up).to(h_ptr.dtype.element_ty)
    neuron = first + tl.arange(0, HALF)
    keep = (neuron < size)[:, None] & valid[None, :]
    tl.store(h_ptr + row.to(tl.int64)[None, :] * size + neuron[:, None], h, mask=keep)
    # The sums are those of the rounded values, which the next product reads.
    part = tl.sum(tl.reshape(h.to(tl.float32), (HALF // 32, 32, BM)), axis=1)
    at = first // 32 + tl.arange(0, HALF // 32)
    shifted = part * slice_offset(at, NEXT_BITS, FP16)[:, None]
    RUN: tl.constexpr = NEXT_GROUP // 32
    SPAN: tl.constexpr = min(RUN, HALF // 32)
    part = tl.sum(tl.reshape(part, (HALF // 32 // SPAN, SPAN, BM)), axis=1)
    shifted = tl.sum(tl.reshape(shifted, (HALF // 32 // SPAN, SPAN, BM)), axis=1)
    group = first // NEXT_GROUP + tl.arange(0, HALF // 32 // SPAN)
    to = sums_ptr + row.to(tl.int64)[None, :] * (2 * groups) + group[:, None]
    keep = (group < groups)[:, None] & valid[None, :]
    if SPAN == RUN:
        tl.store(to, part, mask=keep)
        tl.store(to + groups, shifted, mask=keep)
    else:
        # Two summands on a zero: their order does not matter.
        tl.atomic_add(to, part, mask=keep, sem="relaxed")
        tl.atomic_add(to + groups, shifted, mask=keep, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    x_ptr: tl.tensor, sums_ptr: tl.tensor, code_ptr: tl.tensor, extra_ptr: tl.tensor,
    theta_ptr: tl.tensor, theta_extra_ptr: tl.tensor, y_ptr: tl.tensor, y_sums_ptr: tl.tensor,
    bias_ptr: tl.tensor, expert_ptr: tl.tensor, begin_ptr: tl.tensor, offsets_ptr: tl.tensor,
    slot_ptr: tl.tensor, rows: tl.tensor, inputs: tl.tensor, size: tl.tensor, groups: tl.tensor,
    padded_groups: tl.tensor, next_groups: tl.tensor, row_tiles: tl.tensor, blocks: tl.tensor,
    split_blocks: tl.tensor, split_stride: tl.tensor, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr,
    PADDED: tl.constexpr, ROUTED: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    TOP_K: tl.constexpr, ACT: tl.constexpr, NEXT_BITS: tl.constexpr, NEXT_GROUP: tl.constexpr,
    BIAS: tl.constexpr,
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
        x_ptr + token[None, :] * inputs + i[:, None], sums_ptr + token * (2 * groups),
        code_ptr + tile * blocks * (4096 * (2 if BITS == 3 else 1)) + within,
        extra_ptr + tile * blocks * 4096 + within, theta_ptr + tile * padded_groups * 128 + n,
        theta_extra_ptr + tile * padded_groups * 128 + n, first,
        tl.minimum(first + split_blocks, blocks), inputs, groups, BITS, GROUP, BN, BM, FP16, PTX,
        PADDED,
    )  # fmt: skip
    begin = tl.program_id(0) * BN
    if ACT >= 0:
        store_neurons(
            acc, y_ptr, y_sums_ptr, row, valid, begin // 2, size, next_groups,
            BN, BM, ACT, NEXT_BITS, NEXT_GROUP, FP16,
        )  # fmt: skip
    else:
        at = begin + tl.arange(0, BN)
        if BIAS:
            bias = tl.load(bias_ptr + at, mask=at < size, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        out = (place if SCATTER else row).to(tl.int64)
        to = y_ptr + tl.program_id(2).to(tl.int64) * split_stride + out[None, :] * size
        keep = (at < size)[:, None] & valid[None, :]
        tl.store(to + at[:, None], acc.to(y_ptr.dtype.element_ty), mask=keep)
