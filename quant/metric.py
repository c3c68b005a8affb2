"""The quadratic form a solver minimises, prepared once for a batch of layers.

Shapes: B layers (experts) of equal shape, I inputs, G groups, g = I/G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_ESCALATIONS = 4


@dataclass(frozen=True, eq=False)
class Metric:
    """Normalised, damped Hessians with what the solver derives from them.

    Attributes:
        h_BII: float32, mean diagonal 1 before damping, natural column order.
        order_BI: int64, columns by descending diagonal: the order in which they are quantized.
        inverse_BI: int64, inverse permutation of `order_BI`.
        feedback_BII: float32, strictly upper triangular, both axes in visiting order. With
            M = feedback + identity, h = M diag(pivot) M^T: quantizing column j against
            w_j - sum_{i<j} e_i M_ij is the greedy rule of GPTQ (LDLQ).
        pivot_BI: float32, in visiting order; the loss of that rule is sum_j pivot_j r_j^2.
        h_ones_BIG: float32, sums of the columns of h over each group.
        group_size: g.
    """

    h_BII: Tensor
    order_BI: Tensor
    inverse_BI: Tensor
    feedback_BII: Tensor
    pivot_BI: Tensor
    h_ones_BIG: Tensor
    group_size: int

    @property
    def group_BI(self) -> Tensor:
        """Group of each column, in visiting order."""
        return self.order_BI // self.group_size


def prepare(hessian_BII: Tensor, group_size: int, damp: float) -> Metric:
    """Normalise by the mean diagonal, damp once, factor in float64.

    A Hessian of zeros (a layer that no token reached) becomes the identity: plain squared error.
    Damping grows tenfold, up to `_MAX_ESCALATIONS` times, where a Hessian is indefinite.

    Args:
        hessian_BII: float (B, I, I), symmetric.
        group_size: inputs a group.
        damp: ridge in units of the mean diagonal.

    Raises:
        ValueError: a diagonal entry is negative, or the matrix is far from positive semi-definite.
    """
    diagonal_BI = hessian_BII.diagonal(dim1=1, dim2=2)
    if (diagonal_BI < 0).any():
        raise ValueError(f"hessian has a negative diagonal entry {diagonal_BI.min().item():g}")
    mean_B = diagonal_BI.double().mean(1)
    dead_B = mean_B <= torch.finfo(torch.float32).tiny
    h_BII = hessian_BII.float() / torch.where(dead_B, 1.0, mean_B).float()[:, None, None]
    h_BII = (h_BII + h_BII.transpose(1, 2)).mul_(0.5)
    h_BII.diagonal(dim1=1, dim2=2)[dead_B] = 1.0
    order_BI = h_BII.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    feedback_BII, pivot_BI = _factor(h_BII, order_BI, damp)
    h_ones_BIG = h_BII.unflatten(2, (-1, group_size)).sum(-1)
    return Metric(
        h_BII, order_BI, order_BI.argsort(dim=1), feedback_BII, pivot_BI, h_ones_BIG, group_size
    )


def _factor(h_BII: Tensor, order_BI: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Damp `h_BII` in place until it factors; unit upper factor and pivots in visiting order."""
    # Columns are visited first to last and each sees the errors before it, so the factor wanted is
    # upper triangular: the Cholesky factor of the matrix with both axes reversed.
    reverse_BI = order_BI.flip(1)
    diagonal_BI = h_BII.diagonal(dim1=1, dim2=2)
    ridge_B = torch.full((len(h_BII), 1), damp, dtype=h_BII.dtype, device=h_BII.device)
    added_B = torch.zeros_like(ridge_B)
    info_B = torch.empty(len(h_BII), dtype=torch.int32, device=h_BII.device)
    for _ in range(_MAX_ESCALATIONS + 1):
        diagonal_BI += ridge_B - added_B
        added_B = ridge_B
        # In place and in the order of LAPACK, which a symmetric matrix has transposed: this is the
        # most memory that a solve takes.
        lower_BII = permuted(h_BII, reverse_BI).double().mT
        torch.linalg.cholesky_ex(lower_BII, out=(lower_BII, info_B))
        if not info_B.any():
            pivot_BI = lower_BII.diagonal(dim1=1, dim2=2).clone()
            lower_BII.div_(pivot_BI[:, None, :]).diagonal(dim1=1, dim2=2).zero_()
            feedback_BII = torch.empty_like(h_BII).copy_(lower_BII)
            del lower_BII
            return feedback_BII.flip(1, 2), pivot_BI.square().float().flip(1)
        ridge_B = torch.where(info_B[:, None] > 0, ridge_B * 10, ridge_B)
    raise ValueError(f"hessian {int(info_B.argmax())} of the batch is not positive semi-definite")


def permuted(h_BII: Tensor, order_BI: Tensor) -> Tensor:
    """Both axes of each matrix in the given order."""
    rows_BII = take(h_BII, order_BI)
    return rows_BII.gather(2, order_BI[:, None, :].expand_as(rows_BII))


def take(x_BN: Tensor, index_BC: Tensor) -> Tensor:
    """Select along dimension 1, per batch entry: (B, N, ...), (B, C) to (B, C, ...)."""
    # One index_select over whole slabs copies memory; gather would expand the index to every value.
    offset_B1 = torch.arange(len(x_BN), device=x_BN.device)[:, None] * x_BN.shape[1]
    rows = x_BN.flatten(0, 1).index_select(0, (index_BC + offset_B1).flatten())
    return rows.unflatten(0, tuple(index_BC.shape))
