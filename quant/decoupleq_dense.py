"""decoupleQ's reference algorithm in its dense formulation, to be timed against.

The same alternation as `decoupleq`, computed as its reference code computes it: the range of a row
is searched with an (O, O) product of which only the diagonal is used, columns are rounded one by
one with an update of all that follow, and scales and zeros are fitted through the expanded design
matrix of every row, (I, 2G). H is damped twice. It is here for its cost; nothing calls it but a
benchmark and its test.

Shapes: O output rows, R rows of a chunk, I inputs, G groups, P = 2G floats of a row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SHRINKS, _SHRINK_STEP = 160, 0.005
_STOP = 1e-4
_CHUNK_VALUES = 1 << 25
"""Entries of the expanded design matrices that are alive at once."""


@dataclass
class DenseResult:
    """What the reference algorithm found.

    Attributes:
        weight_OI: float32, dequantized.
        loss_O: float64, W H W^T of the error of every row under the damped H.
        seconds: by step: search, integers, floats.
    """

    weight_OI: Tensor
    loss_O: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def decoupleq_dense(
    weight_OI: Tensor,
    hessian_II: Tensor,
    bits: int,
    group_size: int = 64,
    *,
    alternations: int = 4,
    damp: float = 0.01,
    shrinks: int = _SHRINKS,
) -> DenseResult:
    """Quantize one weight to one width.

    Args:
        weight_OI: float.
        hessian_II: float, mean of x x^T over the inputs.
        bits: the width.
        group_size: inputs that share a scale and a zero; divides I.
        alternations: N of the paper.
        damp: ridge in units of the mean diagonal, added before everything and before the integers.
        shrinks: ranges that the search tries, in steps of 0.005 from 1.
    """
    work = _Reference(weight_OI.float(), hessian_II.float(), bits, group_size, damp, shrinks)
    return work.run(alternations)


@dataclass(frozen=True, eq=False)
class _State:
    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    loss_O: Tensor


class _Reference:
    def __init__(
        self, weight: Tensor, hessian: Tensor, bits: int, group_size: int, damp: float, shrinks: int
    ) -> None:
        self.weight_OI, self.size, self.damp, self.shrinks = weight, group_size, damp, shrinks
        self.low, self.high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        self.h_II = _damped(hessian, damp)
        grouped = weight.unflatten(1, (-1, group_size))
        self.least_OG, self.most_OG = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        self.seconds: dict[str, float] = {}

    def run(self, alternations: int) -> DenseResult:
        grid = self._grid(torch.ones(len(self.weight_OI), 1))
        state = self._state(self._rounded(*grid), *grid)
        with self._step("integers"):
            codes_OI = self._integers(*grid)
        state = _better(state, self._state(codes_OI, *grid))
        for index in range(alternations - 1):
            floats = (state.scale_OG, state.zero_OG)
            if index == 0:
                with self._step("search"):
                    grid = self._search()
                with self._step("floats"):
                    floats = self._floats(self._rounded(*grid))
            with self._step("integers"):
                codes_OI = self._integers(*floats)
            found = self._state(codes_OI, *floats)
            settled = _settled(state, found)
            state = _better(state, found)
            if settled:
                break
            with self._step("floats"):
                floats = self._floats(state.codes_OI)
            found = self._state(state.codes_OI, *floats)
            settled = _settled(state, found)
            state = _better(state, found)
            if settled:
                break
        dense_OI = self._dense(state.codes_OI, state.scale_OG, state.zero_OG)
        return DenseResult(dense_OI, state.loss_O, self.seconds)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def _grid(self, shrink_O1: Tensor) -> tuple[Tensor, Tensor]:
        least, most = self.least_OG * shrink_O1, self.most_OG * shrink_O1
        scale = (most - least) / (self.high - self.low)
        return scale, least - scale * self.low

    def _spread(self, x_OG: Tensor) -> Tensor:
        return x_OG.repeat_interleave(self.size, dim=1)

    def _rounded(self, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        steps = (self.weight_OI - self._spread(zero_OG)) / self._spread(_divisor(scale_OG))
        return steps.round_().clamp_(self.low, self.high)

    def _dense(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        return self._spread(scale_OG) * codes_OI + self._spread(zero_OG)

    def _state(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> _State:
        error = (self._dense(codes_OI, scale_OG, zero_OG) - self.weight_OI).double()
        loss_O = ((error @ self.h_II.double()) * error).sum(1)
        return _State(codes_OI, scale_OG, zero_OG, loss_O)

    def _search(self) -> tuple[Tensor, Tensor]:
        """One shrink a row, by rounding alone; the loss is the diagonal of an (O, O) product."""
        best_O = torch.full((len(self.weight_OI),), torch.inf)
        shrink_O = torch.ones_like(best_O)
        for index in range(self.shrinks):
            shrink = 1 - index * _SHRINK_STEP
            grid = self._grid(torch.full((len(self.weight_OI), 1), shrink))
            error_OI = self._dense(self._rounded(*grid), *grid) - self.weight_OI
            loss_O = (error_OI @ self.h_II @ error_OI.T).diagonal()
            shrink_O = torch.where(loss_O < best_O, shrink, shrink_O)
            best_O = torch.minimum(loss_O, best_O)
        return self._grid(shrink_O[:, None])

    def _integers(self, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """GPTQ with act-order and static groups, column by column."""
        order_I = self.h_II.diagonal().argsort(descending=True)
        h_II = _damped(self.h_II, self.damp)[order_I][:, order_I].double()
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(h_II))
        upper_II = torch.linalg.cholesky(inverse_II, upper=True).float()
        scale_OI = self._spread(_divisor(scale_OG))[:, order_I]
        zero_OI = self._spread(zero_OG)[:, order_I]
        working_OI = self.weight_OI[:, order_I].clone()
        codes_OI = torch.empty_like(working_OI)
        for i in range(working_OI.shape[1]):
            column_O, scale_O, zero_O = working_OI[:, i], scale_OI[:, i], zero_OI[:, i]
            code_O = ((column_O - zero_O) / scale_O).round_().clamp_(self.low, self.high)
            codes_OI[:, i] = code_O
            error_O = (column_O - (scale_O * code_O + zero_O)) / upper_II[i, i]
            working_OI[:, i:] -= error_O[:, None] * upper_II[i, i:]
        return codes_OI[:, order_I.argsort()]

    def _floats(self, codes_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros through [diag(Q) E, E] of every row, E the indicator of the groups."""
        inputs = codes_OI.shape[1]
        groups = inputs // self.size
        member_IG = torch.arange(inputs)[:, None] // self.size == torch.arange(groups)
        member_IG = member_IG.to(codes_OI.dtype)
        solved = []
        for rows in torch.arange(len(codes_OI)).split(
            max(1, _CHUNK_VALUES // (2 * inputs * groups))
        ):
            scaled_RIG = codes_OI[rows][:, :, None] * member_IG
            design_RIP = torch.cat([scaled_RIG, member_IG.expand(len(rows), -1, -1)], dim=2)
            response_RIP = torch.matmul(self.h_II, design_RIP)
            system_RPP = torch.matmul(design_RIP.mT, response_RIP).double()
            right_RP = torch.einsum("ri,rip->rp", self.weight_OI[rows], response_RIP).double()
            ridge = 1e-6 * system_RPP.diagonal(dim1=1, dim2=2).mean(1)
            system_RPP.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
            solved.append(torch.linalg.solve(system_RPP, right_RP).float())
        scale_OG, zero_OG = torch.cat(solved).split(groups, dim=1)
        return scale_OG, zero_OG


def _damped(h_II: Tensor, damp: float) -> Tensor:
    return h_II + damp * h_II.diagonal().mean() * torch.eye(len(h_II))


def _divisor(scale_OG: Tensor) -> Tensor:
    return torch.where(scale_OG != 0, scale_OG, 1.0)


def _better(old: _State, new: _State) -> _State:
    """Row by row the one with the lower loss."""
    keep_O = old.loss_O <= new.loss_O
    return _State(
        torch.where(keep_O[:, None], old.codes_OI, new.codes_OI),
        torch.where(keep_O[:, None], old.scale_OG, new.scale_OG),
        torch.where(keep_O[:, None], old.zero_OG, new.zero_OG),
        torch.where(keep_O, old.loss_O, new.loss_O),
    )


def _settled(old: _State, new: _State) -> bool:
    return bool((new.loss_O < old.loss_O).double().mean() < _STOP)
