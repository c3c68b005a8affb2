"""One routing decision as a table of token tiles, shared by all layers of a step.

Slots (token, choice) are sorted by expert once; every layer's kernels then walk the same tiles. No
value goes through the host, so the table can be made inside a CUDA graph.

Shapes: T tokens, K slots a token, R = T*K sorted rows, E experts, P tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.kernels.device import on_device

ONE_LAUNCH_ROWS = 256
ONE_LAUNCH_EXPERTS = 127


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """Which rows each token tile computes.

    Attributes:
        tile_expert: int32 (P,), expert of a tile; -1 pads the table to its worst case.
        tile_begin: int32 (P,), first sorted row of a tile.
        offsets: int32 (E + 1,); rows of expert e are offsets[e] .. offsets[e + 1].
        slot: int32 (R,), t*K + k of each sorted row. Slots of weight zero come last and belong to
            no expert.
        block: rows of a tile.
        top_k: K.
    """

    tile_expert: Tensor
    tile_begin: Tensor
    offsets: Tensor
    slot: Tensor
    block: int
    top_k: int


def most_tiles(rows: int, experts: int, block: int) -> int:
    """Tiles of the worst distribution of `rows` over `experts`; fixes the grid without a sync."""
    return min(rows, (rows + experts * (block - 1)) // block)


def plan_routes(
    index_TK: Tensor, weights_TK: Tensor, num_experts: int, block: int, *, fused: bool | None = None
) -> RoutePlan:
    """Sort slots by expert and cut every expert's rows into tiles.

    Args:
        index_TK: chosen experts, integers below E.
        weights_TK: weight of each choice; where it is zero nothing is computed.
        num_experts: E.
        block: rows of a tile.
        fused: one Triton launch instead of torch operations; by default where there is a GPU and
            the step is small enough (`ONE_LAUNCH_ROWS` slots).
    """
    rows, top_k = index_TK.numel(), index_TK.shape[1]
    tiles = most_tiles(rows, num_experts, block)
    small = rows <= ONE_LAUNCH_ROWS and num_experts <= ONE_LAUNCH_EXPERTS
    if fused is None:
        fused = index_TK.is_cuda and small
    if fused and rows:
        assert small
        return _plan_fused(index_TK, weights_TK, num_experts, block, tiles)
    key = torch.where(weights_TK.reshape(-1) != 0, index_TK.reshape(-1).long(), num_experts)
    slot = torch.argsort(key, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=key.device)
    counts = counts.scatter_add(0, key, torch.ones_like(key))[:num_experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    expert, begin = _cut(offsets, tiles, block)
    return RoutePlan(expert, begin, offsets.int(), slot.int(), block, top_k)


def retile(plan: RoutePlan, block: int) -> RoutePlan:
    """The same sorted rows in tiles of another height."""
    experts = len(plan.offsets) - 1
    tiles = most_tiles(len(plan.slot), experts, block)
    expert, begin = _cut(plan.offsets.long(), tiles, block)
    return RoutePlan(expert, begin, plan.offsets, plan.slot, block, plan.top_k)


def _cut(offsets: Tensor, tiles: int, block: int) -> tuple[Tensor, Tensor]:
    """Expert and first row of each tile, given where every expert's rows begin."""
    experts = len(offsets) - 1
    needed = (offsets.diff() + block - 1) // block
    ends = needed.cumsum(0)
    tile = torch.arange(tiles, device=offsets.device)
    expert = torch.searchsorted(ends, tile, right=True)
    real = expert < experts
    own = expert.clamp(max=experts - 1)
    begin = offsets[own] + (tile - (ends - needed)[own]) * block
    return torch.where(real, expert, -1).int(), torch.where(real, begin, 0).int()


def _plan_fused(
    index_TK: Tensor, weights_TK: Tensor, experts: int, block: int, tiles: int
) -> RoutePlan:
    from fissile.kernels.triton_small import route_kernel

    rows = index_TK.numel()
    new = torch.empty(2 * tiles + experts + 1 + rows, dtype=torch.int32, device=index_TK.device)
    expert, begin, offsets, slot = new.split([tiles, tiles, experts + 1, rows])
    with on_device(index_TK):
        route_kernel[(1,)](
            index_TK.contiguous(),
            weights_TK.contiguous(),
            expert,
            begin,
            offsets,
            slot,
            rows,
            tiles,
            EXPERTS=experts,
            BLOCK=block,
            ROWS=max(16, 1 << (rows - 1).bit_length()),
            TILES=max(16, 1 << (tiles - 1).bit_length()),
            EXPERTS_PAD=max(16, 1 << experts.bit_length()),
            num_warps=4,
        )
    return RoutePlan(expert, begin, offsets, slot, block, index_TK.shape[1])
