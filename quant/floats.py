"""Float step: the scales and zeros of all groups of a row, solved together for fixed integers.

The groups are coupled through H, so each row and width is one linear system in 2G unknowns.
Its matrix is built from block sums of C H C and never by expanding the design matrix.

Shapes: B layers, n rows of a chunk, O output rows, I inputs, G groups, g inputs a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.quant.integers import Floats, Levels
from fissile.quant.metric import Metric, take
from fissile.quant.ranges import half_steps, round_floats
from fissile.quant.rows import row_chunks

_RIDGES = (1e-6, 1e-3)  # of the diagonal; the second for rows whose system is singular in float32


@dataclass(frozen=True, eq=False)
class Fit:
    """Outcome of a float step.

    Attributes:
        floats: the better of old and new, per row and width, rounded to float16.
        before_WBO: float64, loss of each width with the old floats.
        after_WBO: float64, loss with the returned floats; never above `before_WBO`.
    """

    floats: Floats
    before_WBO: Tensor
    after_WBO: Tensor


def refit(
    weight_BOI: Tensor, metric: Metric, levels: Levels, floats: Floats, codes_BIO: Tensor
) -> Fit:
    """Least-squares scales and zeros of every width, rounded, kept per row where they help.

    Args:
        weight_BOI: float32, natural column order; (W, B, O, I) for a target of its own per width.
        metric: prepared Hessians; losses are in its units.
        levels: widths and weights.
        floats: the maps to start from.
        codes_BIO: uint8, columns in visiting order.
    """
    codes_BOI = take(codes_BIO, metric.inverse_BI).transpose(1, 2)
    ones_BGG = metric.h_ones_BIG.unflatten(1, (-1, metric.group_size)).sum(2)
    scale, zero = floats.scale_BGWO.clone(), floats.zero_BGWO.clone()
    shape = (len(levels.widths), *weight_BOI.shape[-3:-1])
    before_WBO = torch.empty(shape, dtype=torch.float64, device=weight_BOI.device)
    after_WBO = torch.empty_like(before_WBO)
    batch, rows, inputs = weight_BOI.shape[-3:]
    for part in row_chunks(rows, batch * inputs, weight_BOI.device):
        codes = codes_BOI[:, part].contiguous().int().flatten()
        for w, half_step in enumerate(half_steps(levels).split(1)):
            value = levels.value_WQ[w].index_select(0, codes).view(batch, -1, inputs)
            old = (scale[:, :, w, part].transpose(1, 2), zero[:, :, w, part].transpose(1, 2))
            wanted = weight_BOI if weight_BOI.dim() == 3 else weight_BOI[w]
            system = quadratic(value, wanted[:, part], metric, ones_BGG, *old)
            new_scale, new_zero, gain = _solve(system, *old, half_step)
            scale[:, :, w, part] = new_scale.transpose(1, 2)
            zero[:, :, w, part] = new_zero.transpose(1, 2)
            before_WBO[w, :, part] = system.loss_Bn
            after_WBO[w, :, part] = system.loss_Bn - gain
    return Fit(Floats(scale, zero), before_WBO, after_WBO)


def loss_rows(error_BOI: Tensor, hessian_BII: Tensor) -> Tensor:
    """E H E^T of every row: float64 (B, O).

    Args:
        error_BOI: float32.
        hessian_BII: float, symmetric.
    """
    loss_BO = torch.empty(error_BOI.shape[:2], dtype=torch.float64, device=error_BOI.device)
    chunks = row_chunks(error_BOI.shape[1], len(error_BOI) * error_BOI.shape[2], error_BOI.device)
    for part in chunks:
        error = error_BOI[:, part]
        response = torch.bmm(error, hessian_BII.to(error.dtype))
        loss_BO[:, part] = response.mul_(error).sum(-1, dtype=torch.float64)
    return loss_BO


@dataclass(frozen=True, eq=False)
class System:
    """The loss near the current floats: loss + 2 gradient d + d^T matrix d, float64.

    d = [scales; zeros], P = 2G, or other unknowns that these are linear in.
    """

    loss_Bn: Tensor
    gradient_BnP: Tensor
    matrix_BnPP: Tensor

    def gain(self, step_BnP: Tensor) -> Tensor:
        """What a step saves, (B, n)."""
        curvature = torch.matmul(self.matrix_BnPP, step_BnP[..., None])[..., 0]
        return -((2 * self.gradient_BnP + curvature) * step_BnP).sum(-1)

    def moved(self, step_BnP: Tensor, gain_Bn: Tensor) -> System:
        """The same loss near the floats after a step and its gain."""
        change_BnP = torch.matmul(self.matrix_BnPP, step_BnP[..., None])[..., 0]
        gradient_BnP = self.gradient_BnP + change_BnP
        return System(self.loss_Bn - gain_Bn, gradient_BnP, self.matrix_BnPP)

    def where(self, keep_Bn: Tensor, other: System) -> System:
        """These rows where `keep_Bn`, rows of `other`, with the same matrix, elsewhere."""
        gradient_BnP = torch.where(keep_Bn[..., None], self.gradient_BnP, other.gradient_BnP)
        loss_Bn = torch.where(keep_Bn, self.loss_Bn, other.loss_Bn)
        return System(loss_Bn, gradient_BnP, self.matrix_BnPP)

    def projected(self, basis_BnPQ: Tensor) -> System:
        """In unknowns c with d = basis c."""
        gradient_BnQ = torch.matmul(basis_BnPQ.mT, self.gradient_BnP[..., None])[..., 0]
        matrix_BnQQ = basis_BnPQ.mT @ self.matrix_BnPP @ basis_BnPQ
        return System(self.loss_Bn, gradient_BnQ, matrix_BnQQ)

    def mixed(self, a_Bn: Tensor, o_Bn: Tensor, e_Bn: Tensor) -> System:
        """In unknowns s and z of every group with scales a s and zeros o s + e z."""
        groups = self.gradient_BnP.shape[-1] // 2
        a1, o1, e1 = (x[..., None] for x in (a_Bn, o_Bn, e_Bn))
        by_scale, by_zero = self.gradient_BnP.split(groups, -1)
        top, bottom = self.matrix_BnPP.split(groups, -2)
        (ss, sz), (_, zz) = top.split(groups, -1), bottom.split(groups, -1)
        a, o, e = (x[..., None] for x in (a1, o1, e1))
        cross = a * e * sz + o * e * zz
        matrix = torch.empty_like(self.matrix_BnPP)
        matrix[..., :groups, :groups] = a * a * ss + a * o * (sz + sz.mT) + o * o * zz
        matrix[..., :groups, groups:], matrix[..., groups:, :groups] = cross, cross.mT
        matrix[..., groups:, groups:] = e * e * zz
        gradient = torch.cat([a1 * by_scale + o1 * by_zero, e1 * by_zero], dim=-1)
        return System(self.loss_Bn, gradient, matrix)

    def times(self, weight: float) -> System:
        """A multiple of the loss."""
        return System(weight * self.loss_Bn, weight * self.gradient_BnP, weight * self.matrix_BnPP)

    def plus(self, other: System) -> System:
        """Sum of two losses in the same unknowns."""
        return System(
            self.loss_Bn + other.loss_Bn,
            self.gradient_BnP + other.gradient_BnP,
            self.matrix_BnPP + other.matrix_BnPP,
        )


def quadratic(
    value_BnI: Tensor,
    weight_BnI: Tensor,
    metric: Metric,
    ones_BGG: Tensor,
    scale_BnG: Tensor,
    zero_BnG: Tensor,
) -> System:
    """The loss of rows with these floats, and how it changes with them.

    Args:
        value_BnI: float32, centred values of the codes.
        weight_BnI: float32, what they shall come near.
        metric: prepared Hessians.
        ones_BGG: sums of H over pairs of groups.
        scale_BnG: float32.
        zero_BnG: float32, of the centred code.
    """
    size = metric.group_size
    groups = scale_BnG.shape[2]
    value_BnGg = value_BnI.unflatten(2, (groups, size))
    fitted = torch.addcmul(zero_BnG[..., None], value_BnGg, scale_BnG[..., None])
    error_BnI = fitted.flatten(2).sub_(weight_BnI)
    response_BnI = torch.bmm(error_BnI, metric.h_BII)
    loss_Bn = (response_BnI * error_BnI).sum(-1, dtype=torch.float64)
    response_BnGg = response_BnI.unflatten(2, (groups, size))
    by_zero = response_BnGg.sum(-1)
    by_scale = (response_BnGg * value_BnGg).sum(-1)
    cross_BnGG = torch.einsum(
        "bnkg,bkgl->bnkl", value_BnGg, metric.h_ones_BIG.unflatten(1, (groups, size))
    )
    matrix = value_BnI.new_empty(*value_BnI.shape[:2], 2 * groups, 2 * groups, dtype=torch.float64)
    matrix[..., :groups, :groups] = _gram(value_BnI, metric.h_BII, groups)
    matrix[..., :groups, groups:] = cross_BnGG
    matrix[..., groups:, :groups] = cross_BnGG.transpose(2, 3)
    matrix[..., groups:, groups:] = ones_BGG[:, None]
    return System(loss_Bn, torch.cat([by_scale, by_zero], dim=-1).double(), matrix)


def _gram(value_BnI: Tensor, h_BII: Tensor, groups: int) -> Tensor:
    """Block sums of C H C: entry (k, l) is c_k H_kl c_l^T, float32 (B, n, G, G)."""
    batch, rows, inputs = value_BnI.shape
    size = inputs // groups
    gram_BnGG = value_BnI.new_zeros(batch, rows, groups, groups)
    for g in range(groups):
        begin = g * size
        own_BnJ = value_BnI[:, :, begin : begin + size]
        part = torch.bmm(own_BnJ, h_BII[:, begin : begin + size, begin:])
        sums = part.mul_(value_BnI[:, :, begin:]).unflatten(2, (-1, size)).sum(-1)
        gram_BnGG[:, :, g, g:] = sums
        gram_BnGG[:, :, g:, g] = sums
    return gram_BnGG


def _solve(
    system: System, scale_BnG: Tensor, zero_BnG: Tensor, half_step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New scale and zero (B, n, G) and the loss they save (B, n), all zero where nothing is won."""
    groups = scale_BnG.shape[2]
    step = newton_step(system)
    new = scale_BnG + step[..., :groups], zero_BnG + step[..., groups:]
    # A negative scale would order the codes of one width against those of another.
    new_scale, new_zero = round_floats(
        torch.where(new[0] > 0, new[0], scale_BnG.double()), new[1], half_step
    )
    step = torch.cat([new_scale - scale_BnG, new_zero - zero_BnG], dim=-1).double()
    gain_Bn = system.gain(step)
    # Rows that overflow float16 give NaN here, which compares false and keeps the old floats.
    better_Bn = gain_Bn > 0
    kept = better_Bn[..., None]
    return (
        torch.where(kept, new_scale, scale_BnG),
        torch.where(kept, new_zero, zero_BnG),
        torch.where(better_Bn, gain_Bn, 0.0),
    )


def newton_step(system: System) -> Tensor:
    """Minimiser of the quadratic; NaN in rows that cannot be solved."""
    diagonal = system.matrix_BnPP.diagonal(dim1=-2, dim2=-1)
    floor = diagonal.mean(-1, keepdim=True) * 1e-12 + torch.finfo(torch.float64).tiny
    result = torch.full_like(system.gradient_BnP, torch.nan)
    todo = torch.ones_like(system.loss_Bn, dtype=torch.bool)
    for ridge in _RIDGES:
        matrix = system.matrix_BnPP[todo]
        matrix.diagonal(dim1=-2, dim2=-1).add_((diagonal * ridge + floor)[todo])
        factor, info = torch.linalg.cholesky_ex(matrix)
        solved = torch.cholesky_solve(-system.gradient_BnP[todo][..., None], factor)[..., 0]
        solved[info > 0] = torch.nan
        result[todo] = solved
        todo = torch.isnan(result).any(-1)
        if not todo.any():
            break
    return result
