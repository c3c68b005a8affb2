"""What nested weights are measured against: round to nearest, GPTQ and GPTAQ.

All use the min-max range of every (row, group), as in their papers: no search, no re-fit. Zeros
are floats, as everywhere here, so bits per weight are those of the nested format at that width.

Shapes: B layers, O output rows, I inputs, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fissile.kernels import layout
from fissile.quant.decouple import with_loss
from fissile.quant.integers import Floats, Levels, start
from fissile.quant.metric import Metric, permuted, prepare, take
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
    return assemble(codes, scale, zero, bits, weight, hessian)


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
    metric, weight_BOI = prepared(weight, hessian, group_size, damp)
    weight_BIO = visited(weight_BOI, metric)
    levels = Levels.build((bits,), {bits: 1.0}, weight.device)
    centred = zero + scale * ((1 << bits) - 1) / 2
    scale_BGWO, zero_BGWO = (
        x.reshape(len(weight_BIO), *x.shape[-2:]).transpose(1, 2)[:, :, None].contiguous()
        for x in (scale, centred)
    )
    codes_BIO = start(weight_BIO, metric, levels, Floats(scale_BGWO, zero_BGWO))
    codes = take(codes_BIO, metric.inverse_BI).transpose(1, 2).reshape(weight.shape)
    return assemble(codes, scale, zero, bits, weight, hessian)


@torch.no_grad()
def gptaq(
    weight: Tensor,
    hessian: Tensor,
    drift: Tensor,
    bits: int,
    group_size: int = 64,
    damp: float = 0.01,
    blend: float = 0.25,
) -> NestedWeight:
    """GPTAQ (arXiv 2504.02692): GPTQ towards the outputs of the full-precision model.

    Beside the error of a column, the columns after it also take over what the column's inputs have
    drifted from those of the float model, W[:, j:] += w_j P[j, j:], P = ((D U^T) above the
    diagonal) U with H^-1 = U^T U and D the drift.

    Args:
        weight: float (O, I) or (B, O, I).
        hessian: float (I, I) or (B, I, I), mean of x x^T over the quantized model's inputs x.
        drift: as `hessian`, mean of (y - x) x^T, y the float model's inputs.
        bits: 2, 3 or 4.
        group_size: inputs that share a scale and a zero.
        damp: ridge in units of the mean diagonal.
        blend: share of the drift that is made up for.

    Raises:
        ValueError: shapes, `bits` or values that do not fit.
    """
    scale, zero = _grid(weight, bits, group_size)
    metric, weight_BOI = prepared(weight, hessian, group_size, damp)
    working_BIO = visited(weight_BOI, metric)
    identity = torch.eye(weight.shape[-1], dtype=torch.float64, device=weight.device)
    unit_BII = metric.feedback_BII.double() + identity
    upper_BII = torch.linalg.solve_triangular(unit_BII, identity.expand_as(unit_BII), upper=True)
    upper_BII = upper_BII / metric.pivot_BI.double().sqrt()[:, :, None]
    mean_B = hessian.reshape(unit_BII.shape).diagonal(dim1=1, dim2=2).double().mean(1)
    drift_BII = permuted(drift.reshape(unit_BII.shape).double(), metric.order_BI)
    drift_BII = drift_BII / mean_B.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
    taken_BII = blend * ((drift_BII @ upper_BII.mT).triu(1) @ upper_BII)
    taken_BII, upper_BII = taken_BII.float(), upper_BII.float()
    group_BI, top = metric.group_BI, (1 << bits) - 1
    scale_BGO, zero_BGO = (
        x.reshape(len(unit_BII), *x.shape[-2:]).transpose(1, 2) for x in (scale, zero)
    )
    scale_BIO, zero_BIO = take(scale_BGO, group_BI), take(zero_BGO, group_BI)
    codes_BIO = torch.empty_like(working_BIO, dtype=torch.uint8)
    for j in range(working_BIO.shape[1]):
        column_BO = working_BIO[:, j].clone()
        step_BO = torch.where(scale_BIO[:, j] > 0, scale_BIO[:, j], 1.0)
        code_BO = ((column_BO - zero_BIO[:, j]) / step_BO).round_().clamp_(0, top)
        codes_BIO[:, j] = code_BO.to(torch.uint8)
        error_BO = column_BO - torch.addcmul(zero_BIO[:, j], scale_BIO[:, j], code_BO)
        error_BO = error_BO / upper_BII[:, j, j, None]
        working_BIO[:, j:] -= upper_BII[:, j, j:, None] * error_BO[:, None]
        working_BIO[:, j:] += taken_BII[:, j, j:, None] * column_BO[:, None]
    codes = take(codes_BIO, metric.inverse_BI).transpose(1, 2).reshape(weight.shape)
    return assemble(codes, scale, zero, bits, weight, hessian)


def prepared(
    weight: Tensor, hessian: Tensor, group_size: int, damp: float
) -> tuple[Metric, Tensor]:
    """Metric, and the weight as float32 (B, O, I).

    Raises:
        ValueError: the shapes do not fit, or the Hessian is not positive semi-definite.
    """
    if hessian.shape != (*weight.shape[:-2], weight.shape[-1], weight.shape[-1]):
        raise ValueError(f"weight {tuple(weight.shape)}, hessian {tuple(hessian.shape)}: no fit")
    metric = prepare(hessian.reshape(-1, *hessian.shape[-2:]), group_size, damp)
    return metric, weight.reshape(-1, *weight.shape[-2:]).float()


def visited(weight_BOI: Tensor, metric: Metric) -> Tensor:
    """The weight as (B, I, O) with columns in visiting order."""
    return take(weight_BOI.transpose(1, 2).contiguous(), metric.order_BI)


def _grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Min-max scale and zero (..., O, G), float32 rounded to float16."""
    layout.check_bits(bits, layout.NESTED)
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight {tuple(weight.shape)}, accepted: (O, I) or (B, O, I)")
    layout.check_shape(weight.shape[-1], group_size)
    grouped = weight.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    return layout.decode_theta(layout.encode_theta((high - low) / ((1 << bits) - 1), low))


def assemble(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    weight: Tensor,
    hessian: Tensor | None,
    history: Tensor | None = None,
) -> NestedWeight:
    """A nested weight of one width from codes of that width, with its loss.

    Args:
        codes: uint8 (..., O, I), 0 .. 2^bits - 1.
        scale: float32 (..., O, G), representable in float16.
        zero: float32 (..., O, G), likewise.
        bits: the width.
        weight: float (..., O, I), the original.
        hessian: float (..., I, I); None for the identity.
        history: objective a row after every step, if any.
    """
    shift = layout.STORED_BITS - bits
    group_size = weight.shape[-1] // scale.shape[-1]
    nested = NestedWeight(codes << shift, {bits: scale}, {bits: zero}, (bits,), group_size)
    if history is not None:
        nested = replace(nested, history=history)
    if hessian is None:
        hessian = torch.eye(weight.shape[-1], device=weight.device)
        hessian = hessian.expand(*weight.shape[:-2], -1, -1)
    return with_loss(nested, weight.float(), hessian)
