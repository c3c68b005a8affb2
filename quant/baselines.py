"""What nested weights are measured against: round to nearest, and plain GPTQ.

Both use the min-max range of every (row, group), as in their papers: no search, no re-fit. Zeros
are floats, as everywhere here, so bits per weight are those of the nested format at that width.

Shapes: B layers, O output rows, I inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fissile.kernels import layout
from fissile.quant.decouple import with_loss
from fissile.quant.integers import Floats, Levels, start
from fissile.quant.metric import prepare, take
from fissile.quant.nested import NestedWeight


@torch.no_grad()
def rtn(
    weight: Tensor, bits: int, group_size: int = 64, hessian: Tensor | None = None
) -> NestedWeight:
    """Round to nearest on the min-max grid of every group.

    Args:
        weight: float (O, I) or (B, O, I).
        bits: 2, 3 or 4.
        group_size: inputs that share a scale and a zero.
        hessian: float (I, I) or (B, I, I), only to report `loss`; default the identity.

    Raises:
        ValueError: shapes, `bits` or values that do not fit.
    """
    scale, zero = _grid(weight, bits, group_size)
    grouped = weight.float().unflatten(-1, (-1, group_size))
    steps = (grouped - zero[..., None]) / torch.where(scale > 0, scale, 1.0)[..., None]
    codes = steps.round_().clamp_(0, (1 << bits) - 1).flatten(-2).to(torch.uint8)
    return _assemble(codes, scale, zero, bits, weight, hessian)


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int = 64, damp: float = 0.01
) -> NestedWeight:
    """GPTQ (arXiv 2210.17323): min-max grids fixed beforehand, act-order, error feedback.

    Args:
        weight: float (O, I) or (B, O, I).
        hessian: float (I, I) or (B, I, I), mean of x x^T over the inputs.
        bits: 2, 3 or 4.
        group_size: inputs that share a scale and a zero.
        damp: ridge in units of the mean diagonal.

    Raises:
        ValueError: shapes, `bits` or values that do not fit.
    """
    scale, zero = _grid(weight, bits, group_size)
    if hessian.shape != (*weight.shape[:-2], weight.shape[-1], weight.shape[-1]):
        raise ValueError(f"weight {tuple(weight.shape)}, hessian {tuple(hessian.shape)}: no fit")
    shape = (-1, *weight.shape[-2:])
    metric = prepare(hessian.reshape(-1, *hessian.shape[-2:]), group_size, damp)
    weight_BIO = take(weight.reshape(shape).float().transpose(1, 2).contiguous(), metric.order_BI)
    levels = Levels.build((bits,), {bits: 1.0}, weight.device)
    centred = zero + scale * ((1 << bits) - 1) / 2
    scale_BGWO, zero_BGWO = (
        x.reshape(len(weight_BIO), *x.shape[-2:]).transpose(1, 2)[:, :, None].contiguous()
        for x in (scale, centred)
    )
    codes_BIO = start(weight_BIO, metric, levels, Floats(scale_BGWO, zero_BGWO))
    codes = take(codes_BIO, metric.inverse_BI).transpose(1, 2).reshape(weight.shape)
    return _assemble(codes, scale, zero, bits, weight, hessian)


def _grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Min-max scale and zero (..., O, G), float32 rounded to float16."""
    layout.check_bits(bits)
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight {tuple(weight.shape)}, accepted: (O, I) or (B, O, I)")
    layout.check_shape(weight.shape[-1], group_size)
    grouped = weight.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    return layout.decode_theta(layout.encode_theta((high - low) / ((1 << bits) - 1), low))


def _assemble(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, weight: Tensor, hessian: Tensor | None
) -> NestedWeight:
    shift = layout.STORED_BITS - bits
    group_size = weight.shape[-1] // scale.shape[-1]
    nested = NestedWeight(codes << shift, {bits: scale}, {bits: zero}, (bits,), group_size)
    if hessian is None:
        hessian = torch.eye(weight.shape[-1], device=weight.device)
        hessian = hessian.expand(*weight.shape[:-2], -1, -1)
    return with_loss(nested, weight.float(), hessian)
