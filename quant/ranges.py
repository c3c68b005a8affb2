"""Where the grid of each group starts: a search over ranges with the joint scalar encoder.

Least squares and coordinate descent cannot move a range far, so a poor one costs up to half of
the loss at 4 bits. The search scores a range by the error that rounding alone would leave, each
column weighted by its diagonal Hessian entry.

Shapes: B layers, O output rows, G groups, g inputs a group, W widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fissile.quant.integers import Floats, Levels
from fissile.quant.rows import row_chunks


def search(
    weight_BOI: Tensor,
    diagonal_BI: Tensor,
    levels: Levels,
    group_size: int,
    shrinks: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Centre and half-range of every (row, group).

    Candidates are the shrinks of the min-max half-range around its middle and around the mean.

    Args:
        weight_BOI: float32.
        diagonal_BI: float32, weights of the columns.
        levels: widths and weights.
        group_size: g.
        shrinks: factors of the half-range.

    Returns:
        centre and half-range, float32 (B, O, G); the half-range of a constant group is 0.
    """
    batch, rows, inputs = weight_BOI.shape
    shape = (batch, rows, inputs // group_size)
    centre_BOG, half_BOG = weight_BOI.new_empty(shape), weight_BOI.new_empty(shape)
    diagonal_B1Gg = diagonal_BI.unflatten(1, (-1, group_size))[:, None]
    for part in row_chunks(rows, batch * inputs, weight_BOI.device):
        x_BnGg = weight_BOI[:, part].unflatten(2, (-1, group_size))
        centre_BOG[:, part], half_BOG[:, part] = _search(x_BnGg, diagonal_B1Gg, levels, shrinks)
    return centre_BOG, half_BOG


def initial_floats(
    centre_BOG: Tensor, half_BOG: Tensor, levels: Levels, multiplier: float
) -> Floats:
    """Grids of all widths over centre +- multiplier * half-range, cell centres aligned.

    Args:
        centre_BOG: float32.
        half_BOG: float32.
        levels: widths and weights.
        multiplier: above 1 where errors of other columns will be compensated.

    Raises:
        ValueError: a value does not fit float16.
    """
    step_BOG = half_BOG * (multiplier / float(half_steps(levels)[-1]))
    scale = torch.stack([step_BOG * unit for unit in levels.unit_W.tolist()], dim=-1)
    zero = centre_BOG[..., None].expand_as(scale)
    scale, zero = round_floats(scale, zero, half_steps(levels))
    if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
        worst = (centre_BOG.abs() + half_BOG * multiplier).max().item()
        raise ValueError(f"a weight range reaches {worst:g}: its zero does not fit float16 (65504)")
    return Floats(*(x.permute(0, 2, 3, 1).contiguous() for x in (scale, zero)))


def half_steps(levels: Levels) -> Tensor:
    """Value of code 0 of each width, negated: (2^k - 1)/2 without companding; float32 (W,)."""
    return -levels.value_WQ[:, 0]


def round_floats(scale: Tensor, zero: Tensor, half_step: Tensor) -> tuple[Tensor, Tensor]:
    """Round to what is stored: float16 scale, and float16 zero of the uncentred code.

    Args:
        scale: float (..., W).
        zero: float (..., W), of the centred code.
        half_step: float32 (W,).

    Returns:
        float32 scale and zero of the centred code; infinite where float16 overflows.
    """
    scale = scale.half().float()
    stored_zero = (zero - scale * half_step).half().float()
    return scale, stored_zero + scale * half_step


def _search(
    x_BnGg: Tensor, diagonal_B1Gg: Tensor, levels: Levels, shrinks: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    low, high = x_BnGg.amin(-1), x_BnGg.amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2
    best_cost = torch.full_like(half, torch.inf)
    best_centre, best_half = middle.clone(), half.clone()
    for centre in (middle, x_BnGg.mean(-1)):
        distance = (x_BnGg - centre[..., None]).abs_()  # grids are symmetric around the centre
        for shrink in shrinks:
            reach = half * shrink
            z = distance / reach.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
            cost = (_encoder_cost(z, levels).mul_(diagonal_B1Gg)).sum(-1) * reach.square()
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            best_centre = torch.where(better, centre, best_centre)
            best_half = torch.where(better, reach, best_half)
    return best_centre, best_half


def _encoder_cost(z: Tensor, levels: Levels) -> Tensor:
    """Least sum_k lambda_k (z - T_k(q))^2 over the codes, for z >= 0 in units of the half-range."""
    grid_WQ = levels.value_WQ.cpu() * levels.unit_W.cpu()[:, None]
    grid_WQ = grid_WQ / grid_WQ[-1, -1]
    weight_W1 = levels.weight_W.cpu()[:, None]
    # The cost is z^2 - 2 m_q z + c_q: the lower envelope of straight lines, one a code. For z >= 0
    # the upper half of the codes suffices.
    half = grid_WQ.shape[1] // 2
    line_m = (weight_W1 * grid_WQ).sum(0)[half:].tolist()
    line_c = (weight_W1 * grid_WQ.square()).sum(0)[half:].tolist()
    envelope, line = torch.mul(z, -2 * line_m[0]).add_(line_c[0]), torch.empty_like(z)
    for m, c in zip(line_m[1:], line_c[1:], strict=True):
        torch.minimum(envelope, torch.mul(z, -2 * m, out=line).add_(c), out=envelope)
    return envelope.add_(z.square_())
