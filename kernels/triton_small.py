"""Small kernels around the products: sums over splits and slots, the tile table.

Importing this module imports Triton; only launchers do, inside functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fissile.kernels.triton_decode import store_neurons


@triton.jit
def combine_neurons_kernel(
    part_ptr: tl.tensor,
    h_ptr: tl.tensor,
    splits: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    size: tl.tensor,
    ACT: tl.constexpr,
) -> None:
    """Add the parts (S, R, width) of gate and up rows and store neurons.

    Grid: (R, ceil(width / 256)); width is a multiple of 128.
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    at = tl.program_id(1) * 256 + tl.arange(0, 256)
    from_ = part_ptr + row.to(tl.int64)[None, :] * width + at[:, None]
    acc = tl.zeros((256, 1), tl.float32)
    for split in range(0, splits):
        at_split = from_ + tl.cast(split, tl.int64) * stride
        acc += tl.load(at_split, mask=at[:, None] < width, other=0.0)
    store_neurons(acc, h_ptr, row, row >= 0, tl.program_id(1) * 128, size, 256, 1, ACT)


@triton.jit
def combine_rows_kernel(
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    add_ptr: tl.tensor,
    y_ptr: tl.tensor,
    splits: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """y[t] = sum_k weight[t, k] sum_s part[s, t K + k] (+ add[t]), in the dtype of y.

    A slot of weight zero belongs to no expert and is not read. Grid: (T, ceil(N / CHUNK)).
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < size
    total = tl.zeros((CHUNK,), tl.float32)
    if ADD:
        total += tl.load(add_ptr + token * size + at, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        weight = tl.load(weight_ptr + slot).to(tl.float32) if WEIGHTED else 1.0
        if weight != 0.0:
            value = tl.zeros((CHUNK,), tl.float32)
            for split in range(0, splits):
                from_ = part_ptr + tl.cast(split, tl.int64) * stride + slot * size + at
                value += tl.load(from_, mask=inside, other=0.0).to(tl.float32)
            total += weight * value
    tl.store(y_ptr + token * size + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def route_keys(
    index_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    slot: tl.tensor,
    rows: tl.tensor,
    EXPERTS: tl.constexpr,
) -> tl.tensor:
    """Expert of each slot; EXPERTS where nothing is taken, so that it sorts last."""
    expert = tl.load(index_ptr + slot, mask=slot < rows, other=EXPERTS).to(tl.int32)
    weight = tl.load(weight_ptr + slot, mask=slot < rows, other=0.0).to(tl.float32)
    return tl.where(weight != 0.0, expert, EXPERTS)


@triton.jit
def route_kernel(
    index_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_begin_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    EXPERTS_PAD: tl.constexpr,
) -> None:
    """The whole table of `fissile.kernels.route.plan_routes` in one block of threads.

    ROWS, TILES and EXPERTS_PAD are powers of two not below rows, tiles and EXPERTS + 1. Tables are
    compared with each other in strips of 16, which the registers hold.
    """
    i = tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS_PAD)
    # A key with the position in it has no ties, so counting the smaller ones sorts stably.
    mine = route_keys(index_ptr, weight_ptr, i, rows, EXPERTS) * ROWS + i
    rank = tl.zeros((ROWS,), tl.int32)
    counts = tl.zeros((EXPERTS_PAD,), tl.int32)
    for begin in range(0, ROWS, 16):
        j = begin + tl.arange(0, 16)
        key = route_keys(index_ptr, weight_ptr, j, rows, EXPERTS)
        rank += tl.sum(((key * ROWS + j)[None, :] < mine[:, None]).to(tl.int32), axis=1)
        counts += tl.sum((key[None, :] == e[:, None]).to(tl.int32), axis=1)
    tl.store(slot_ptr + rank, i, mask=i < rows)
    counts = tl.where(e < EXPERTS, counts, 0)
    ends = tl.cumsum(counts, axis=0)
    tl.store(offsets_ptr + e, ends - counts, mask=e <= EXPERTS)
    taken = (counts + BLOCK - 1) // BLOCK
    tile_ends = tl.cumsum(taken, axis=0)
    first = ends - counts - (tile_ends - taken) * BLOCK
    for begin in range(0, TILES, 16):
        p = begin + tl.arange(0, 16)
        owner = tl.sum((tile_ends[None, :] <= p[:, None]).to(tl.int32), axis=1)
        chosen = (owner[:, None] == e[None, :]).to(tl.int32)
        start = tl.sum(chosen * first[None, :], axis=1)
        real = owner < EXPERTS
        tl.store(tile_expert_ptr + p, tl.where(real, owner, -1), mask=p < tiles)
        tl.store(tile_begin_ptr + p, tl.where(real, start + p * BLOCK, 0), mask=p < tiles)
