"""How products are cut where no tuning table speaks: choices that spill no registers.

`fissile.kernels.proof.gates` compiles every one of them for every target, width, tile and group
size, so a line here that does not fit the registers is a failing test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from fissile.kernels.route import RoutePlan
from fissile.kernels.tiles import TILE_ROWS, TiledWeight

Kind = Literal["decode", "prefill"]
Arch = Literal["sm_80", "sm_90", "gfx942"]


@dataclass(frozen=True)
class LaunchConfig:
    """How one product is cut into blocks of threads.

    Attributes:
        block_m: tokens of a tile; equals the plan's where there is one.
        block_n: rows of a tile, 32, 64 or 128.
        num_warps: of 32 threads.
        num_stages: of the software pipeline.
        split: parts of the inputs that are computed apart and added afterwards (decode only).
        portable: plain operations instead of PTX; implied on ROCm.
    """

    block_m: int
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 3
    split: int = 1
    portable: bool = False


@lru_cache
def current_arch() -> Arch:
    """The target whose choices this process's GPU takes; sm_90 without a GPU."""
    if torch.version.hip is not None:
        return "gfx942"
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)
    return "sm_80" if old else "sm_90"


def decode_blocks(arch: Arch) -> tuple[int, ...]:
    """Tokens of a tile that decoding uses, ascending.

    Matrix instructions take eight tokens on NVIDIA and sixteen on AMD. Before sm_90 the warps of 32
    tokens would each unpack the same weights, which costs more than two tiles of 16.
    """
    return {"gfx942": (16,), "sm_80": (8, 16), "sm_90": (8, 16, 32)}[arch]


def prefill_blocks(arch: Arch) -> tuple[int, ...]:
    """Tokens of a tile that prefill uses, ascending."""
    return (64,) if arch == "gfx942" else (64, 128)


def default_config(
    kind: Kind,
    bits: int,
    rows_per_expert: int,
    group_size: int = 128,
    arch: Arch | None = None,
) -> LaunchConfig:
    """A safe choice where no tuning table speaks.

    Args:
        kind: "decode" applies floats a group, "prefill" a weight.
        bits: width of the weight.
        rows_per_expert: tokens of one expert, in the mean.
        group_size: of the weight.
        arch: default that of this process's GPU.
    """
    arch = arch or current_arch()
    blocks = prefill_blocks(arch) if kind == "prefill" else decode_blocks(arch)
    block_m = next((b for b in blocks if rows_per_expert <= b), blocks[-1])
    return config_of(kind, bits, block_m, group_size, arch)


def config_of(
    kind: Kind, bits: int, block_m: int, group_size: int, arch: Arch | None = None
) -> LaunchConfig:
    """The choice for tiles of `block_m` tokens; other arguments as for `default_config`."""
    arch = arch or current_arch()
    if kind == "prefill":
        # Two stages leave shared memory for a second block of threads, which multiplies while the
        # first unpacks.
        return LaunchConfig(block_m, num_warps=8 if block_m >= 64 else 4, num_stages=2)
    if arch == "gfx942":
        # The tokens of two blocks of three bits do not fit the shared memory.
        return LaunchConfig(block_m, num_stages=1 if bits == 3 else 2)
    if block_m <= 8:
        return _single(bits, group_size, block_m)
    if block_m <= 16:
        if bits == 3:
            warps, stages = (2, 2) if group_size == 64 else (4, 3)
            return LaunchConfig(block_m, 64, warps, stages)
        return LaunchConfig(block_m, num_stages=2 if (bits, group_size) == (2, 32) else 3)
    if block_m <= 32 and bits != 3:
        fits = bits == 4 or group_size == 128
        return LaunchConfig(block_m, num_warps=4 if fits else 8)
    return LaunchConfig(block_m, num_warps=8, num_stages=2)


def _single(bits: int, group_size: int, block_m: int) -> LaunchConfig:
    """Tiles of at most eight tokens.

    A warp of 64 rows shares the cost of floats and tokens among more weights than one of 32, where
    its registers suffice; narrow tiles need more stages under way.
    """
    if bits == 3:
        if group_size == 128:
            return LaunchConfig(block_m, 32, 1, 4)
        return LaunchConfig(block_m, 64, 2, 2 if group_size == 32 else 3)
    if (bits, group_size) == (2, 64):
        return LaunchConfig(block_m, 64, 1, 4)
    if group_size == 32 and bits != 4:
        return LaunchConfig(block_m, 64, 2, 4)
    return LaunchConfig(block_m, 128, 2, 3)


def narrow_config(bits: int, group_size: int, block_n: int) -> LaunchConfig:
    """Tiles of eight tokens and 64 or 32 rows, for products that must fill the GPU unsplit."""
    if block_n == TILE_ROWS // 2:
        wide = _single(bits, group_size, 8)
        return wide if wide.block_n <= block_n else LaunchConfig(8, block_n, 2, 4)
    return LaunchConfig(8, block_n, 1, 5 if bits == 3 else 6)


def narrowed(
    config: LaunchConfig, weight: TiledWeight, token_tiles: int, count: int
) -> LaunchConfig:
    """A product that must not be split over its inputs, in tiles so narrow that they fill the GPU.

    Args:
        config: of few tokens; others are returned whole.
        weight: its rows are cut.
        token_tiles: of the grid.
        count: processors of the GPU.
    """
    programs = weight.codes.shape[1] * token_tiles
    if config.block_m > 8 or programs >= count or current_arch() == "gfx942":
        return replace(config, split=1)
    return narrow_config(weight.kernel_bits, weight.group_size, 64 if 2 * programs >= count else 32)


def planned_config(
    kind: Kind, plan: RoutePlan | None, rows: int, weight: TiledWeight
) -> LaunchConfig:
    """Default for a plan's tiles, or for all rows as one expert's."""
    if plan is None:
        return default_config(kind, weight.kernel_bits, rows, weight.group_size)
    return config_of(kind, weight.kernel_bits, plan.block, weight.group_size)
