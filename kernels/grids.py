"""Grids, flags and arguments of the Triton kernels; `fissile.kernels.launch` is the way in.

Shapes: T tokens, K inputs, N rows, S splits, R = T * slots sorted rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fissile.kernels.defaults import LaunchConfig
from fissile.kernels.device import on_device
from fissile.kernels.route import RoutePlan
from fissile.kernels.tiles import TILE_ROWS, TiledWeight

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
DTYPES = (torch.float16, torch.bfloat16)
CHUNK = 1024  # elements of a row that one program of a small kernel handles


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
    grid = (tiles * (TILE_ROWS // config.block_n), token_tiles, config.split)
    with on_device(x):
        decode_kernel[grid](
            *_operands(x, weight, y, plan, bias, rows),
            -(-blocks // config.split),
            y.stride(0) if y.dim() == 3 else 0,
            GATHER=plan is not None and (act is not None or gather),
            **_constants(x, weight, plan, config, act, bias is not None, scatter),
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

    grid = (weight.codes.shape[1] * (TILE_ROWS // config.block_n), token_tiles)
    with on_device(x):
        prefill_kernel[grid](
            *_operands(x, weight, y, plan, bias, rows),
            GATHER=plan is not None and act is not None,
            **_constants(x, weight, plan, config, act, bias is not None, scatter),
        )


def _operands(
    x: Tensor,
    weight: TiledWeight,
    y: Tensor,
    plan: RoutePlan | None,
    bias: Tensor | None,
    rows: int,
) -> tuple[Tensor | int | None, ...]:
    """What both products take first: tensors, then sizes."""
    tiles, blocks = weight.codes.shape[1:3]
    return (
        x,
        *weight_tensors(weight),
        y,
        x if bias is None else bias,
        *_tables(plan, weight.theta),
        rows,
        weight.shape[2],
        y.shape[-1],
        weight.theta.shape[2],
        tiles,
        blocks,
    )


def _constants(
    x: Tensor,
    weight: TiledWeight,
    plan: RoutePlan | None,
    config: LaunchConfig,
    act: Activation | None,
    biased: bool,
    scatter: bool,
) -> dict[str, Any]:
    """What both products are compiled for."""
    return {
        "BITS": weight.kernel_bits,
        "GROUP": weight.group_size,
        "STEEP": weight.steep,
        "BN": config.block_n,
        "BM": config.block_m,
        "FP16": x.dtype == torch.float16,
        "PTX": use_ptx(config.portable),
        "PADDED": weight.theta.shape[2] * weight.group_size != weight.shape[2],
        "ROUTED": plan is not None,
        "SCATTER": plan is not None and scatter,
        "TOP_K": plan.top_k if plan else 1,
        "ACT": -1 if act is None else ACTIVATIONS.index(act),
        "BIAS": biased,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def combine_rows(
    part: Tensor, weights_TK: Tensor | None, add: Tensor | None, dtype: torch.dtype, top_k: int
) -> Tensor:
    """Add splits and slots of (S, T K, N), weighted, and `add`: (T, N) in `dtype`."""
    tokens, size = part.shape[1] // top_k, part.shape[2]
    y = torch.empty(tokens, size, dtype=dtype, device=part.device)
    if tokens:
        from fissile.kernels.triton_small import combine_rows_kernel

        with on_device(part):
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
