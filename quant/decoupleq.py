"""decoupleQ (arXiv 2404.12759) as published, for one width: a mode, and a baseline of the solver.

W = scale Q + zero with a float zero; alternately the integers for fixed floats and the
floats, in closed form, for fixed integers, each kept per row where it helps. The integer step has
the paper's two approximations. What is known to go wrong is mended: H is normalised by its mean
diagonal and damped once, the float step has no absolute epsilon and never expands groups, and the
search of the range needs no (O, O) product.

Shapes: B layers, O output rows, I inputs, G groups, g inputs a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fissile.kernels import layout
from fissile.quant.alternate import State
from fissile.quant.baselines import assemble, prepared, visited
from fissile.quant.floats import loss_rows, refit
from fissile.quant.integers import Floats, Levels, start
from fissile.quant.metric import Metric, take
from fissile.quant.nested import NestedWeight
from fissile.quant.ranges import half_steps, round_floats

Approximation = Literal["first", "second"]
"""Of the integer step: "first" keeps the box for columns not yet rounded and relaxes only that they
are integers (projected Adam); "second" drops the box as well, which is GPTQ."""

_SHRINKS = 160
_SHRINK_STEP = 0.005
_STOP = 1e-4
_RATE, _BETAS, _EPSILON = 0.05, (0.9, 0.999), 1e-5


@dataclass(frozen=True)
class FirstLevel:
    """Work of the first approximation.

    Attributes:
        warm_up: projected Adam steps before any column is rounded.
        inner: steps after each rounded block of columns.
        block: columns rounded at a time; 1 in the paper.
    """

    warm_up: int = 50
    inner: int = 5
    block: int = 1


@torch.no_grad()
def decoupleq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = 64,
    *,
    alternations: int = 4,
    approximation: Approximation = "second",
    first_level: FirstLevel | None = None,
    damp: float = 0.01,
) -> NestedWeight:
    """Quantize one weight, or a batch of equal shape, to one width.

    Args:
        weight: float (O, I) or (B, O, I).
        hessian: float (I, I) or (B, I, I), mean of x x^T over the inputs.
        bits: 2, 3 or 4.
        group_size: inputs that share a scale and a zero.
        alternations: N of the paper; 1 is GPTQ on the min-max grid.
        approximation: of the integer step.
        first_level: work of the first approximation.
        damp: ridge in units of the mean diagonal.

    Raises:
        ValueError: shapes, `bits` or values that do not fit.
    """
    layout.check_bits(bits, layout.NESTED)
    layout.check_shape(weight.shape[-1], group_size)
    metric, weight_BOI = prepared(weight, hessian, group_size, damp)
    levels = Levels.build((bits,), {bits: 1.0}, weight.device)
    work = _Alternation(weight_BOI, metric, levels, approximation, first_level or FirstLevel())
    state, history = work.run(alternations)
    half = float(half_steps(levels)[0])
    codes = take(state.codes_BIO, metric.inverse_BI).transpose(1, 2).reshape(weight.shape)
    shape = (*weight.shape[:-1], weight.shape[-1] // group_size)
    scale, centred = (
        x[:, :, 0].transpose(1, 2).reshape(shape).contiguous()
        for x in (state.floats.scale_BGWO, state.floats.zero_BGWO)
    )
    zero = (centred - scale * half).half().float()
    rows = [h.reshape(weight.shape[:-1]) for h in history]
    return assemble(codes, scale, zero, bits, weight, hessian, torch.stack(rows))


class _Alternation:
    def __init__(
        self,
        weight_BOI: Tensor,
        metric: Metric,
        levels: Levels,
        approximation: Approximation,
        first_level: FirstLevel,
    ) -> None:
        self.weight_BOI, self.metric, self.levels = weight_BOI, metric, levels
        self.weight_BIO = visited(weight_BOI, metric)
        self.approximation, self.first_level = approximation, first_level
        grouped = weight_BOI.unflatten(2, (-1, metric.group_size))
        # The range of a group includes zero, as in the reference.
        self.low_BOG, self.high_BOG = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def run(self, alternations: int) -> tuple[State, list[Tensor]]:
        grid = self._grid(torch.ones_like(self.low_BOG))
        state = self._state(self._rounded(grid), grid)
        state = state.better(self._state(self._integers(grid), grid))
        history = [state.objective_BO]
        for index in range(alternations - 1):
            given = self._restart() if index == 0 else state.floats
            proposal = self._state(self._integers(given), given)
            better_BO = proposal.objective_BO < state.objective_BO
            state = state.better(proposal)
            history.append(state.objective_BO)
            if better_BO.double().mean() < _STOP:
                break
            fitted = self._state(state.codes_BIO, state.floats, fit=True)
            better_BO = fitted.objective_BO < state.objective_BO
            state = state.better(fitted)
            history.append(state.objective_BO)
            if better_BO.double().mean() < _STOP:
                break
        return state, history

    def _grid(self, shrink_BOG: Tensor) -> Floats:
        """Grid over the shrunken range, rounded to what is stored."""
        low, high = self.low_BOG * shrink_BOG, self.high_BOG * shrink_BOG
        half = half_steps(self.levels)
        scale = (high - low)[..., None] / (2 * half)
        scale, zero = round_floats(scale, ((low + high) / 2)[..., None], half)
        return Floats(*(x.permute(0, 2, 3, 1).contiguous() for x in (scale, zero)))

    def _rounded(self, floats: Floats) -> Tensor:
        """Nearest codes (B, I, O), columns in visiting order."""
        group_BI = self.metric.group_BI
        scale = take(floats.scale_BGWO, group_BI)[:, :, 0]
        zero = take(floats.zero_BGWO, group_BI)[:, :, 0]
        steps = (self.weight_BIO - zero) / torch.where(scale > 0, scale, 1.0)
        top = self.levels.value_WQ.shape[1] - 1
        return (steps - self.levels.value_WQ[0, 0]).round_().clamp_(0, top).to(torch.uint8)

    def _state(self, codes_BIO: Tensor, floats: Floats, *, fit: bool = False) -> State:
        found = refit(self.weight_BOI, self.metric, self.levels, floats, codes_BIO)
        if fit:
            return State(codes_BIO, found.floats, found.after_WBO[0])
        return State(codes_BIO, floats, found.before_WBO[0])

    def _restart(self) -> Floats:
        """One shrink per row, by the loss of rounding; then the floats in closed form."""
        best_BO = torch.full(self.weight_BOI.shape[:2], torch.inf, dtype=torch.float64)
        best_BO = best_BO.to(self.weight_BOI.device)
        shrink_BO = torch.ones_like(best_BO, dtype=torch.float32)
        for step in range(_SHRINKS):
            shrink = 1 - step * _SHRINK_STEP
            floats = self._grid(torch.full_like(self.low_BOG, shrink))
            error_BOI = self._error(self._rounded(floats), floats)
            loss_BO = loss_rows(error_BOI, self.metric.h_BII)
            shrink_BO = torch.where(loss_BO < best_BO, shrink, shrink_BO)
            best_BO = torch.minimum(loss_BO, best_BO)
        grid = self._grid(shrink_BO[..., None].expand_as(self.low_BOG))
        return self._state(self._rounded(grid), grid, fit=True).floats

    def _error(self, codes_BIO: Tensor, floats: Floats) -> Tensor:
        group_BI = self.metric.group_BI
        value = self.levels.values(codes_BIO)[:, :, 0]
        scale, zero = (take(x, group_BI)[:, :, 0] for x in (floats.scale_BGWO, floats.zero_BGWO))
        error_BIO = torch.addcmul(zero - self.weight_BIO, scale, value)
        return take(error_BIO, self.metric.inverse_BI).transpose(1, 2)

    def _integers(self, floats: Floats) -> Tensor:
        if self.approximation == "second":
            return start(self.weight_BIO, self.metric, self.levels, floats)
        return self._box_constrained(floats)

    def _box_constrained(self, floats: Floats) -> Tensor:
        """Round column after column; after each, the rest is solved again inside its box."""
        group_BI, settings = self.metric.group_BI, self.first_level
        scale, zero = (take(x, group_BI)[:, :, 0] for x in (floats.scale_BGWO, floats.zero_BGWO))
        reach = scale * half_steps(self.levels)[0]
        box = (zero - reach, zero + reach)
        working = self.weight_BIO.clamp(*box)
        order = self.metric.order_BI
        h_BII = take(self.metric.h_BII, order)
        h_BII = h_BII.gather(2, order[:, None, :].expand_as(h_BII))
        adam = _Adam(working)
        adam.steps(settings.warm_up, self.weight_BIO, h_BII, box, 0)
        codes_BIO = torch.empty_like(working, dtype=torch.uint8)
        top = self.levels.value_WQ.shape[1] - 1
        for begin in range(0, working.shape[1], settings.block):
            cols = slice(begin, begin + settings.block)
            step = torch.where(scale[:, cols] > 0, scale[:, cols], 1.0)
            value = (working[:, cols] - zero[:, cols]) / step - self.levels.value_WQ[0, 0]
            codes_BIO[:, cols] = value.round().clamp_(0, top).to(torch.uint8)
            value = self.levels.values(codes_BIO[:, cols])[:, :, 0]
            working[:, cols] = torch.addcmul(zero[:, cols], scale[:, cols], value)
            adam.steps(settings.inner, self.weight_BIO, h_BII, box, begin + settings.block)
        return codes_BIO


class _Adam:
    """Projected Adam on `working` (B, I, O) in place, columns from `begin` on."""

    def __init__(self, working_BIO: Tensor) -> None:
        self.working_BIO, self.count = working_BIO, 0
        self.first, self.second = torch.zeros_like(working_BIO), torch.zeros_like(working_BIO)
        # In units of the weights; the published 1e-3 is this for weights of size 0.02.
        self.rate = _RATE * working_BIO.square().mean().sqrt().item()

    def steps(
        self,
        count: int,
        weight_BIO: Tensor,
        h_BII: Tensor,
        box: tuple[Tensor, Tensor],
        begin: int,
    ) -> None:
        rest = slice(begin, None)
        if begin >= weight_BIO.shape[1]:
            return
        for _ in range(count):
            self.count += 1
            gradient = torch.bmm(h_BII[:, rest], self.working_BIO - weight_BIO)
            first = self.first[:, rest].lerp_(gradient, 1 - _BETAS[0])
            second = self.second[:, rest].lerp_(gradient.square(), 1 - _BETAS[1])
            size = (second / (1 - _BETAS[1] ** self.count)).sqrt_().add_(_EPSILON * self.rate)
            move = first / (1 - _BETAS[0] ** self.count) / size
            moved = self.working_BIO[:, rest].sub_(move, alpha=self.rate)
            moved.copy_(moved.clamp(box[0][:, rest], box[1][:, rest]))
