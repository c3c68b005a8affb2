"""Weights in the formats of servers: W = scale * (code - zero) with an integer zero.

compressed-tensors and AWQ store zero points as integers of the code's own width, GPTQ as read by
vLLM has one fixed zero in the middle. The integer step is the one of the nested solver; the float
step is least squares for the scales alone, which the fixed zeros leave linear:

    min over s of  (W - sum_g s_g X_g) H (W - sum_g s_g X_g)^T,   X = code - zero,

G coupled unknowns a row. Every step keeps the better of old and new per row.

Shapes: O output rows, I inputs, G groups, g = I/G inputs a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.kernels import layout
from fissile.quant.floats import loss_rows
from fissile.quant.integers import Floats, Levels, descend, start
from fissile.quant.metric import Metric, prepare, take

_SHRINKS = tuple(1.0 - 0.05 * i for i in range(11))
"""Ranges that are tried, relative to the smallest and largest weight of a group."""
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """Codes with integer zeros.

    Attributes:
        codes: uint8 (O, I).
        scale: float32 (O, G), exact in the dtype that was asked for, positive.
        zero: uint8 (O, G).
        bits: width of codes and zeros.
        group_size: inputs that share a scale and a zero.
        loss: float32 (O,), (W' - W) H (W' - W)^T a row, H as it was given.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    loss: Tensor

    def dequantize(self) -> Tensor:
        """Weights, float32 (O, I)."""
        return decode_integers(self.codes, self.scale, self.zero)


def decode_integers(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """scale * (code - zero), float32 (O, I)."""
    steps = codes.unflatten(-1, (scale.shape[-1], -1)).float() - zero.unsqueeze(-1).float()
    return steps.mul_(scale.unsqueeze(-1)).flatten(-2)


@torch.no_grad()
def solve_integer_zeros(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    rounds: int = 3,
    damp: float = 0.01,
) -> IntegerWeight:
    """Quantize one weight under the constraint of integer zeros.

    Args:
        weight: float (O, I).
        hessian: float (I, I), mean of x x^T over the inputs.
        bits: 4 or 8.
        group_size: inputs that share a scale and a zero; divides I.
        symmetric: the zero is 2^(bits - 1) everywhere.
        scale_dtype: in which scales are stored.
        rounds: alternations of scales and codes after the start.
        damp: ridge in units of the mean diagonal of the Hessian.

    Raises:
        ValueError: shapes or options that do not fit, or values that are not finite.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits {bits}, accepted: 4 or 8")
    if weight.dim() != 2 or hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"weight {tuple(weight.shape)}, hessian {tuple(hessian.shape)}: no fit")
    layout.check_shape(weight.shape[1], group_size)
    if not torch.isfinite(weight).all() or not torch.isfinite(hessian).all():
        raise ValueError("weight or hessian holds a value that is not finite")
    weight_BOI = weight.float()[None].contiguous()
    metric = prepare(hessian[None], group_size, damp)
    levels = Levels.build((bits,), {bits: 1.0}, weight.device)
    scale_OG, zero_OG = _grid(weight_BOI[0], metric, bits, symmetric, scale_dtype)
    weight_BIO = take(weight_BOI.transpose(1, 2).contiguous(), metric.order_BI)
    state = start(weight_BIO, metric, levels, _floats(scale_OG, zero_OG, bits))
    codes_OI = _natural(state, metric)
    for _ in range(rounds):
        fitted_OG = _refit(weight_BOI[0], metric, codes_OI, scale_OG, zero_OG, scale_dtype)
        floats = _floats(fitted_OG, zero_OG, bits)
        visited = take(codes_OI.T[None].contiguous(), metric.order_BI)
        moved_OI = _natural(descend(weight_BIO, metric, levels, floats, visited, 1), metric)
        better_O = _loss(weight_BOI, metric, moved_OI, fitted_OG, zero_OG) < _loss(
            weight_BOI, metric, codes_OI, scale_OG, zero_OG
        )
        codes_OI = torch.where(better_O[:, None], moved_OI, codes_OI)
        scale_OG = torch.where(better_O[:, None], fitted_OG, scale_OG)
    error_BOI = decode_integers(codes_OI, scale_OG, zero_OG)[None] - weight_BOI
    loss_O = loss_rows(error_BOI, hessian[None].float())[0].float()
    return IntegerWeight(codes_OI, scale_OG, zero_OG, bits, group_size, loss_O)


def _grid(
    weight_OI: Tensor, metric: Metric, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group with the least diagonal loss among shrunken ranges."""
    most = (1 << bits) - 1
    grouped = weight_OI.unflatten(1, (-1, metric.group_size))
    importance = metric.h_BII[0].diagonal().unflatten(0, (-1, metric.group_size))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in _SHRINKS:
        if symmetric:
            scale = 2 * torch.maximum(-low, high) * shrink / most
            zero = torch.full_like(scale, float(1 << (bits - 1)))
        else:
            scale = (high - low) * shrink / most
            zero = (-low * shrink / scale.clamp(min=1e-30)).round().clamp(0, most)
        scale = _stored(scale, dtype)
        codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, most)
        wrong = (codes - zero[..., None]) * scale[..., None] - grouped
        loss = (wrong.square() * importance).sum(-1)
        if best is None:
            best = loss, scale, zero
        keep = loss < best[0]
        best = (
            torch.where(keep, loss, best[0]),
            torch.where(keep, scale, best[1]),
            torch.where(keep, zero, best[2]),
        )
    assert best is not None
    return best[1], best[2].to(torch.uint8)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored: in their dtype, positive; a group of zeros has a tiny one."""
    return scale.clamp(min=2.0**-14).to(dtype).float()


def _floats(scale_OG: Tensor, zero_OG: Tensor, bits: int) -> Floats:
    """As the integer step wants them: around the middle of the codes, groups first."""
    offset_OG = scale_OG * (((1 << bits) - 1) / 2 - zero_OG.float())
    return Floats(
        scale_OG.T[None, :, None].contiguous(),
        offset_OG.T[None, :, None].contiguous(),
    )


def _natural(codes_BIO: Tensor, metric: Metric) -> Tensor:
    return take(codes_BIO, metric.inverse_BI)[0].T.contiguous()


def _loss(
    weight_BOI: Tensor, metric: Metric, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor
) -> Tensor:
    error_BOI = decode_integers(codes_OI, scale_OG, zero_OG)[None] - weight_BOI
    return loss_rows(error_BOI, metric.h_BII)[0]


def _refit(
    weight_OI: Tensor,
    metric: Metric,
    codes_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Least-squares scales for fixed codes and zeros; where one is not positive, the old row."""
    size, groups = metric.group_size, scale_OG.shape[1]
    steps_OI = codes_OI.double() - zero_OG.double().repeat_interleave(size, dim=1)
    h_II = metric.h_BII[0].double()
    right_OG = (steps_OI * (weight_OI.double() @ h_II)).unflatten(1, (groups, size)).sum(-1)
    system = steps_OI.new_empty(len(steps_OI), groups, groups)
    for group in range(groups):
        inside = slice(group * size, (group + 1) * size)
        part_OI = steps_OI[:, inside] @ h_II[inside]
        system[:, group] = (part_OI * steps_OI).unflatten(1, (groups, size)).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    # A group of zeros has an empty row; it keeps its scale by the rows' check below.
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float64).tiny
    found_OG = torch.linalg.solve(system, right_OG)
    usable_O = (torch.isfinite(found_OG) & (found_OG > 0)).all(1, keepdim=True)
    return torch.where(usable_O, _stored(found_OG.float(), dtype), scale_OG)
