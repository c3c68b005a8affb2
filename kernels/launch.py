"""Launchers of the Triton kernels: plain functions on tensors, grids and flags worked out here.

They take CUDA (or ROCm) tensors; under Triton's interpreter also CPU tensors, which is how they are
proved without a GPU. Nothing here synchronises with the host or tunes at run time.

Shapes: T tokens, K inputs, N rows, F neurons, E experts, R = T * slots sorted rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fissile.kernels.defaults import LaunchConfig, default_config, planned_config
from fissile.kernels.device import on_device
from fissile.kernels.grids import (
    ACTIVATIONS,
    Activation,
    check_activations,
    check_paired,
    combine_rows,
    parts_buffer,
    run_decode,
    run_prefill,
    use_ptx,
    weight_tensors,
)
from fissile.kernels.route import RoutePlan
from fissile.kernels.tiles import TILE_ROWS, TiledWeight

__all__ = [
    "LaunchConfig",
    "decode_dense",
    "decode_down",
    "decode_gate_up",
    "default_config",
    "dequantize_rows",
    "prefill_dense",
    "prefill_down",
    "prefill_gate_up",
]


def decode_dense(
    x: Tensor,
    weight: TiledWeight,
    *,
    bias: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """x W^T (+ bias) for few tokens: (T, N) in the dtype of x.

    Args:
        x: float16 or bfloat16 (T, K), contiguous.
        weight: one matrix, not paired.
        bias: (N,).
        config: None takes `default_config`.

    Raises:
        ValueError: `x` has another dtype, shape or memory order.
    """
    check_activations(x, weight)
    config = config or planned_config("decode", None, len(x), weight)
    rows = weight.shape[1]
    if not len(x) or config.split == 1:
        y = x.new_empty(len(x), rows)
        run_decode(x, weight, y, None, config, bias=bias)
        return y
    part = parts_buffer(x, len(x), rows, config)
    run_decode(x, weight, part, None, config, bias=bias)
    return combine_rows(part, None, None, x.dtype, 1)


def decode_gate_up(
    x: Tensor,
    weight: TiledWeight,
    plan: RoutePlan | None,
    act: Activation,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """h = act(gate) * up of the chosen experts: (R, F) in sorted order, rows of none undefined.

    Args:
        x: float16 or bfloat16 (T, K), contiguous.
        weight: paired, (E, 2F, K).
        plan: which rows meet which expert; None: one matrix for all tokens.
        act: activation of the gate.
        config: None takes `default_config`.

    Raises:
        ValueError: see `decode_dense`; `weight` is not paired.
    """
    check_activations(x, weight)
    check_paired(weight)
    rows = len(x) if plan is None else len(plan.slot)
    config = config or planned_config("decode", plan, len(x), weight)
    h = x.new_empty(rows, weight.shape[1] // 2)
    if not rows or config.split == 1:
        run_decode(x, weight, h, plan, config, act=act)
        return h
    width = weight.codes.shape[1] * TILE_ROWS
    part = parts_buffer(x, rows, width, config)
    run_decode(x, weight, part, plan, config, gather=True)
    from fissile.kernels.triton_small import combine_neurons_kernel as combine

    with on_device(x):
        combine[(rows, -(-width // 256))](
            part,
            h,
            config.split,
            part.stride(0),
            width,
            h.shape[1],
            ACT=ACTIVATIONS.index(act),
            num_warps=4,
        )
    return h


def decode_down(
    h: Tensor,
    weight: TiledWeight,
    plan: RoutePlan | None,
    weights_TK: Tensor | None,
    *,
    add: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Sum over a token's experts of weight times output (+ add): (T, N) in the dtype of h.

    Sums over slots and splits run in a fixed order; there are no atomics.

    Args:
        h: (R, F) in sorted order, as `decode_gate_up` gives it.
        weight: (E, N, F).
        plan: as for `decode_gate_up`.
        weights_TK: weight of each choice; slots of weight zero are not read. None without a plan.
        add: (T, N) that is added, the shared expert's output for instance.
        config: None takes `default_config`.

    Raises:
        ValueError: see `decode_dense`.
    """
    check_activations(h, weight)
    config = config or planned_config("decode", plan, len(h), weight)
    if plan is None and config.split == 1:
        y = h.new_empty(len(h), weight.shape[1])
        run_decode(h, weight, y, None, config)
        return y if add is None else y + add
    part = parts_buffer(h, len(h), weight.shape[1], config)
    run_decode(h, weight, part, plan, config, scatter=True)
    return combine_rows(part, weights_TK, add, h.dtype, plan.top_k if plan else 1)


def prefill_dense(
    x: Tensor,
    weight: TiledWeight,
    *,
    bias: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """x W^T (+ bias) for many tokens; arguments as for `decode_dense`."""
    check_activations(x, weight)
    y = x.new_empty(len(x), weight.shape[1])
    run_prefill(
        x, weight, y, None, config or planned_config("prefill", None, len(x), weight), bias=bias
    )
    return y


def prefill_gate_up(
    x: Tensor,
    weight: TiledWeight,
    plan: RoutePlan | None,
    act: Activation,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """h = act(gate) * up, (R, F) in sorted order; arguments as for `decode_gate_up`."""
    check_activations(x, weight)
    check_paired(weight)
    rows = len(x) if plan is None else len(plan.slot)
    h = x.new_empty(rows, weight.shape[1] // 2)
    run_prefill(
        x, weight, h, plan, config or planned_config("prefill", plan, len(x), weight), act=act
    )
    return h


def prefill_down(
    h: Tensor,
    weight: TiledWeight,
    plan: RoutePlan | None,
    weights_TK: Tensor | None,
    *,
    add: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Sum over a token's experts of weight times output (+ add); arguments as for `decode_down`."""
    check_activations(h, weight)
    config = config or planned_config("prefill", plan, len(h), weight)
    y = h.new_empty(len(h), weight.shape[1])
    run_prefill(h, weight, y, plan, config, scatter=True)
    if plan is None:
        return y if add is None else y + add
    return combine_rows(y[None], weights_TK, add, h.dtype, plan.top_k)


def dequantize_rows(
    weight: TiledWeight,
    dtype: torch.dtype,
    expert: int | None = None,
    out: Tensor | None = None,
    *,
    portable: bool = False,
) -> Tensor:
    """Decode to a matrix in stored order, for products so large that decoding costs little.

    Args:
        weight: any tiled weight.
        dtype: float16 or bfloat16.
        expert: one of a stack; None decodes all.
        out: contiguous scratch of the result's shape and dtype.
        portable: plain operations instead of PTX.

    Returns:
        (N, K) of one expert, or (E, N, K).
    """
    from fissile.kernels.triton_prefill import dequantize_kernel

    experts, rows, inputs = weight.shape
    shape = weight.shape if expert is None else weight.shape[1:]
    y = torch.empty(shape, dtype=dtype, device=weight.device) if out is None else out
    assert y.is_contiguous()
    tiles, blocks = weight.codes.shape[1:3]
    with on_device(y):
        dequantize_kernel[(tiles, blocks, experts if expert is None else 1)](
            *weight_tensors(weight),
            y,
            rows,
            inputs,
            weight.theta.shape[2],
            tiles,
            blocks,
            expert or 0,
            BITS=weight.kernel_bits,
            GROUP=weight.group_size,
            STEEP=weight.steep,
            FP16=dtype == torch.float16,
            PTX=use_ptx(portable),
            PAIRED=weight.paired,
            num_warps=8,
        )
    return y
