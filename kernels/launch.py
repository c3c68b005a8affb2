"""Launchers of the Triton kernels: plain functions on tensors, grids and flags worked out here.

They take CUDA (or ROCm) tensors; under Triton's interpreter also CPU tensors, which is how they are
proved without a GPU. Nothing here synchronises with the host or tunes at run time.

Shapes: T tokens, K inputs, N rows, F neurons, E experts, R = T * slots sorted rows, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fissile.kernels.grids import (
    ACTIVATIONS,
    CHUNK,
    Activation,
    LaunchConfig,
    check_activations,
    check_paired,
    combine_rows,
    default_config,
    parts_buffer,
    planned_config,
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
    "group_sums",
    "prefill_dense",
    "prefill_down",
    "prefill_gate_up",
]


def group_sums(x: Tensor, weight: TiledWeight) -> Tensor:
    """Sums over each group of inputs, which turn into offsets' and zeros' share of a product.

    They depend on the width, group size and inputs of `weight` and on nothing else of it.

    Args:
        x: float16 or bfloat16 (T, K), contiguous.
        weight: any weight that `x` will be multiplied with.

    Returns:
        float32 (T, 2, G): sums, and sums with every input times its code's offset.

    Raises:
        ValueError: `x` has another dtype, shape or memory order.
    """
    check_activations(x, weight)
    inputs, groups = weight.shape[2], weight.shape[2] // weight.group_size
    sums = torch.empty(len(x), 2, groups, dtype=torch.float32, device=x.device)
    if len(x):
        from fissile.kernels.triton_small import group_sums_kernel

        group_sums_kernel[(len(x), -(-inputs // CHUNK))](
            x,
            sums,
            inputs,
            groups,
            BITS=weight.bits,
            GROUP=weight.group_size,
            FP16=x.dtype == torch.float16,
            CHUNK=CHUNK,
            num_warps=4,
        )
    return sums


def decode_dense(
    x: Tensor,
    weight: TiledWeight,
    *,
    sums: Tensor | None = None,
    bias: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """x W^T (+ bias) for few tokens: (T, N) in the dtype of x.

    Args:
        x: float16 or bfloat16 (T, K), contiguous.
        weight: one matrix, not paired.
        sums: `group_sums(x, weight)`, if at hand.
        bias: (N,).
        config: None takes `default_config`.

    Raises:
        ValueError: see `group_sums`.
    """
    config = config or planned_config("decode", None, len(x), weight)
    sums = group_sums(x, weight) if sums is None else sums
    rows = weight.shape[1]
    if not len(x) or config.split == 1:
        y = x.new_empty(len(x), rows)
        run_decode(x, sums, weight, y, None, config, bias=bias)
        return y
    part = parts_buffer(x, len(x), rows, config)
    run_decode(x, sums, weight, part, None, config)
    y = combine_rows(part, None, None, x.dtype, 1)
    return y if bias is None else y + bias


def decode_gate_up(
    x: Tensor,
    weight: TiledWeight,
    plan: RoutePlan | None,
    act: Activation,
    down: TiledWeight,
    *,
    sums: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """h = act(gate) * up of the chosen experts, and the group sums of h for `down`.

    Args:
        x: float16 or bfloat16 (T, K), contiguous.
        weight: paired, (E, 2F, K).
        plan: which rows meet which expert; None: one matrix for all tokens.
        act: activation of the gate.
        down: the weight that h is multiplied with.
        sums, config: as for `decode_dense`.

    Returns:
        h (R, F) in sorted order and its sums, float32 (R, 2, G); rows of no expert are undefined.

    Raises:
        ValueError: see `group_sums`; `weight` is not paired.
    """
    check_paired(weight)
    rows = len(x) if plan is None else len(plan.slot)
    config = config or planned_config("decode", plan, len(x), weight)
    sums = group_sums(x, weight) if sums is None else sums
    h, groups = x.new_empty(rows, weight.shape[1] // 2), down.shape[2] // down.group_size
    # A group that several tiles share is added up, from zero.
    shared = config.split == 1 and config.block_n // 2 < down.group_size
    new = torch.zeros if shared else torch.empty
    h_sums = new(rows, 2, groups, dtype=torch.float32, device=x.device)
    if not rows or config.split == 1:
        run_decode(x, sums, weight, h, plan, config, act=act, down=down, y_sums=h_sums)
        # Two tiles add in either order to the same sum; the order of more would show.
        return h, group_sums(h, down) if config.block_n < down.group_size else h_sums
    width = weight.codes.shape[1] * TILE_ROWS
    part = parts_buffer(x, rows, width, config)
    run_decode(x, sums, weight, part, plan, config, gather=True)
    from fissile.kernels.triton_small import combine_neurons_kernel as combine

    combine[(rows, -(-width // 256))](
        part,
        h,
        h_sums,
        config.split,
        part.stride(0),
        width,
        h.shape[1],
        groups,
        ACT=ACTIVATIONS.index(act),
        NEXT_BITS=down.bits,
        NEXT_GROUP=down.group_size,
        FP16=x.dtype == torch.float16,
        num_warps=4,
    )
    return h, h_sums


def decode_down(
    h: Tensor,
    h_sums: Tensor,
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
        h_sums: float32 (R, 2, G), likewise.
        weight: (E, N, F).
        plan: as for `decode_gate_up`.
        weights_TK: weight of each choice; slots of weight zero are not read. None without a plan.
        add: (T, N) that is added, the shared expert's output for instance.
        config: None takes `default_config`.

    Raises:
        ValueError: see `group_sums`.
    """
    check_activations(h, weight)
    config = config or planned_config("decode", plan, len(h), weight)
    if plan is None and config.split == 1:
        y = h.new_empty(len(h), weight.shape[1])
        run_decode(h, h_sums, weight, y, None, config)
        return y if add is None else y + add
    part = parts_buffer(h, len(h), weight.shape[1], config)
    run_decode(h, h_sums, weight, part, plan, config, scatter=True)
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
    dequantize_kernel[(tiles, blocks, experts if expert is None else 1)](
        *weight_tensors(weight),
        y,
        rows,
        inputs,
        weight.theta.shape[2],
        tiles,
        blocks,
        expert or 0,
        BITS=weight.bits,
        GROUP=weight.group_size,
        FP16=dtype == torch.float16,
        PTX=use_ptx(portable),
        PAIRED=weight.paired,
        num_warps=8,
    )
    return y
