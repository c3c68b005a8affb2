"""Grids, flags and arguments of the Triton kernels; `fissile.kernels.launch` is the way in.

Shapes: T tokens, K inputs, N rows, S splits, R = T * slots sorted rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fissile.kernels.route import RoutePlan
from fissile.kernels.tiles import TILE_ROWS, TiledWeight

Activation = Literal["silu", "gelu", "gelu_tanh"]
Kind = Literal["decode", "prefill"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
DTYPES = (torch.float16, torch.bfloat16)
CHUNK = 1024  # elements of a row that one program of a small kernel handles


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


def default_config(
    kind: Kind, bits: int, rows_per_expert: int, group_size: int = 128
) -> LaunchConfig:
    """A safe choice where no tuning table speaks.

    Args:
        kind: "decode" applies floats a group, "prefill" a weight.
        bits: width of the weight.
        rows_per_expert: tokens of one expert, in the mean.
        group_size: of the weight.
    """
    hip = torch.version.hip is not None
    if kind == "prefill":
        return _prefill_config(128 if rows_per_expert > 64 and not hip else 64)
    # Matrix instructions take eight tokens on NVIDIA and sixteen on AMD.
    blocks = (16,) if hip else (8, 16, 32)
    block_m = next((b for b in blocks if rows_per_expert <= b), blocks[-1])
    return _decode_config(block_m, bits, group_size)


def _prefill_config(block_m: int) -> LaunchConfig:
    # Two stages leave shared memory for a second block of threads, which multiplies while the
    # first unpacks.
    return LaunchConfig(block_m, num_warps=8 if block_m >= 64 else 4, num_stages=2)


def _decode_config(block_m: int, bits: int, group_size: int, block_n: int = 128) -> LaunchConfig:
    # A warp of 64 rows shares the cost of floats and tokens among more weights, where its
    # registers suffice; one of 32 always fits.
    if block_n < TILE_ROWS:
        warps = block_n // 32
    elif block_m == 8 and (bits in (4, 8) or (bits == 2 and group_size == 128)):
        warps = 2
    else:
        warps = 8 if block_m >= 64 or (bits == 3 and block_m >= 32) else 4
    if torch.version.hip is not None:
        # The tokens of two blocks of three bits do not fit the shared memory.
        return LaunchConfig(block_m, block_n, warps, 1 if bits == 3 else 2)
    # A block of three bits is large enough for two stages to keep memory busy, and narrow tiles
    # need more of them under way.
    stages = 3 if block_m < 64 and bits != 3 else 2
    return LaunchConfig(block_m, block_n, warps, stages + {128: 0, 64: 1, 32: 3}[block_n])


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
    if config.block_m > 8 or programs >= count or torch.version.hip is not None:
        return replace(config, split=1)
    block_n = 64 if 2 * programs >= count else 32
    return _decode_config(config.block_m, weight.kernel_bits, weight.group_size, block_n)


def check_activations(x: Tensor, weight: TiledWeight) -> None:
    """Raise ValueError unless `x` is a contiguous half-precision matrix that fits `weight`."""
    if x.dtype not in DTYPES:
        raise ValueError(f"activations are {x.dtype}, the kernels take float16 and bfloat16")
    if x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"activations {tuple(x.shape)} do not fit a weight {weight.shape}")
    if not x.is_contiguous():
        raise ValueError("activations are not contiguous")


def check_paired(weight: TiledWeight) -> None:
    """Raise ValueError unless rows are interleaved gate and up rows."""
    if not weight.paired:
        raise ValueError("the weight's rows are not gate and up pairs (tile(…, paired=True))")


def planned_config(
    kind: Kind, plan: RoutePlan | None, rows: int, weight: TiledWeight
) -> LaunchConfig:
    """Default for a plan's tiles, or for all rows as one expert's."""
    if plan is None:
        return default_config(kind, weight.kernel_bits, rows, weight.group_size)
    if kind == "prefill":
        return _prefill_config(plan.block)
    return _decode_config(plan.block, weight.kernel_bits, weight.group_size)


def use_ptx(portable: bool) -> bool:
    """Whether codes are unpacked by PTX: on NVIDIA, unless plain operations are asked for."""
    return not portable and torch.version.hip is None


def weight_tensors(weight: TiledWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, extra, theta, theta_extra; what is absent is never read, so anything stands in."""
    codes, theta = weight.codes, weight.theta
    return (
        codes,
        codes if weight.extra is None else weight.extra,
        theta,
        theta if weight.theta_extra is None else weight.theta_extra,
    )


def parts_buffer(x: Tensor, rows: int, width: int, config: LaunchConfig) -> Tensor:
    """Space for what each split computes: float32 (S, rows, width)."""
    return torch.empty(config.split, rows, width, dtype=torch.float32, device=x.device)


def _tables(plan: RoutePlan | None, stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if plan is None:
        return stand_in, stand_in, stand_in, stand_in
    return plan.tile_expert, plan.tile_begin, plan.offsets, plan.slot


def _token_tiles(rows: int, plan: RoutePlan | None, config: LaunchConfig) -> int:
    if plan is None:
        return -(-rows // config.block_m)
    if plan.block != config.block_m:
        raise ValueError(f"tiles of {config.block_m} rows asked of a plan of {plan.block}")
    return len(plan.tile_expert)


def run_decode(
    x: Tensor,
    weight: TiledWeight,
    y: Tensor,
    plan: RoutePlan | None,
    config: LaunchConfig,
    *,
    act: Activation | None = None,
    bias: Tensor | None = None,
    gather: bool = False,
    scatter: bool = False,
) -> None:
    """Launch the decode kernel; see there. `y` is the result, or (S, rows, N) parts of it."""
    rows = len(x) if plan is None else len(plan.slot)
    token_tiles = _token_tiles(rows, plan, config)
    if not token_tiles:
        return
    from fissile.kernels.triton_decode import decode_kernel

    tiles, blocks = weight.codes.shape[1:3]
    groups = weight.theta.shape[2]
    decode_kernel[(tiles * (TILE_ROWS // config.block_n), token_tiles, config.split)](
        x,
        *weight_tensors(weight),
        y,
        x if bias is None else bias,
        *_tables(plan, weight.theta),
        rows,
        weight.shape[2],
        y.shape[-1],
        groups,
        tiles,
        blocks,
        -(-blocks // config.split),
        y.stride(0) if y.dim() == 3 else 0,
        BITS=weight.kernel_bits,
        GROUP=weight.group_size,
        STEEP=weight.steep,
        BN=config.block_n,
        BM=config.block_m,
        FP16=x.dtype == torch.float16,
        PTX=use_ptx(config.portable),
        PADDED=groups * weight.group_size != weight.shape[2],
        ROUTED=plan is not None,
        GATHER=plan is not None and (act is not None or gather),
        SCATTER=plan is not None and scatter,
        TOP_K=plan.top_k if plan else 1,
        ACT=-1 if act is None else ACTIVATIONS.index(act),
        BIAS=bias is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def run_prefill(
    x: Tensor,
    weight: TiledWeight,
    y: Tensor,
    plan: RoutePlan | None,
    config: LaunchConfig,
    *,
    act: Activation | None = None,
    bias: Tensor | None = None,
    scatter: bool = False,
) -> None:
    """Launch the prefill kernel; see there."""
    rows = len(x) if plan is None else len(plan.slot)
    token_tiles = _token_tiles(rows, plan, config)
    if not token_tiles:
        return
    from fissile.kernels.triton_prefill import prefill_kernel

    tiles, blocks = weight.codes.shape[1:3]
    groups = weight.theta.shape[2]
    prefill_kernel[(tiles * (TILE_ROWS // config.block_n), token_tiles)](
        x,
        *weight_tensors(weight),
        y,
        x if bias is None else bias,
        *_tables(plan, weight.theta),
        rows,
        weight.shape[2],
        y.shape[-1],
        groups,
        tiles,
        blocks,
        BITS=weight.kernel_bits,
        GROUP=weight.group_size,
        STEEP=weight.steep,
        BN=config.block_n,
        BM=config.block_m,
        FP16=x.dtype == torch.float16,
        PTX=use_ptx(config.portable),
        PADDED=groups * weight.group_size != weight.shape[2],
        ROUTED=plan is not None,
        GATHER=plan is not None and act is not None,
        SCATTER=plan is not None and scatter,
        TOP_K=plan.top_k if plan else 1,
        ACT=-1 if act is None else ACTIVATIONS.index(act),
        BIAS=bias is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def combine_rows(
    part: Tensor, weights_TK: Tensor | None, add: Tensor | None, dtype: torch.dtype, top_k: int
) -> Tensor:
    """Add splits and slots of (S, T K, N), weighted, and `add`: (T, N) in `dtype`."""
    tokens, size = part.shape[1] // top_k, part.shape[2]
    y = torch.empty(tokens, size, dtype=dtype, device=part.device)
    if tokens:
        from fissile.kernels.triton_small import combine_rows_kernel

        combine_rows_kernel[(tokens, -(-size // CHUNK))](
            part,
            part if weights_TK is None else weights_TK.contiguous(),
            part if add is None else add.contiguous(),
            y,
            len(part),
            part.stride(0),
            size,
            TOP_K=top_k,
            WEIGHTED=weights_TK is not None,
            ADD=add is not None,
            CHUNK=CHUNK,
            num_warps=4,
        )
    return y
