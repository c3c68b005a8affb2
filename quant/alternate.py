"""The alternation on a chunk of rows: starts, coordinate descent, float steps, fresh proposals.

Shapes: B layers, O output rows, I inputs, G groups, W widths, S stacked copies of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.quant.effort import Plan
from fissile.quant.floats import refit
from fissile.quant.integers import Floats, Levels, Noise, descend, start
from fissile.quant.metric import Metric, take
from fissile.quant.ranges import half_steps, initial_floats, round_floats, search

# Found on correlated synthetic layers: 0.003 samples too little, 0.1 too much, flat between.
TEMPERATURE = 0.02
# Spread of sampled floats: of a scale in its own size, of a zero in steps of the narrowest width.
_SPREAD = (0.02, 0.03)


@dataclass(frozen=True, eq=False)
class State:
    """Codes (columns in visiting order), floats and objective of the rows of a chunk."""

    codes_BIO: Tensor
    floats: Floats
    objective_BO: Tensor

    def better(self, other: State) -> State:
        """Row by row the state with the lower objective, this one on a tie."""
        keep_BO = self.objective_BO <= other.objective_BO
        return State(
            torch.where(keep_BO[:, None], self.codes_BIO, other.codes_BIO),
            self.floats.where(keep_BO, other.floats),
            torch.where(keep_BO, self.objective_BO, other.objective_BO),
        )

    def unstack(self, copies: int) -> list[State]:
        """Undo the stacking of copies along the rows."""
        return [
            State(codes, Floats(scale, zero), objective)
            for codes, scale, zero, objective in zip(
                self.codes_BIO.chunk(copies, dim=-1),
                self.floats.scale_BGWO.chunk(copies, dim=-1),
                self.floats.zero_BGWO.chunk(copies, dim=-1),
                self.objective_BO.chunk(copies, dim=-1),
                strict=True,
            )
        ]


class Alternation:
    """Solves rows of a batch of layers against one metric.

    Args:
        weight_BOI: float32, the rows; (W, B, O, I) where every width has a target of its own.
        metric: prepared Hessians.
        levels: widths and weights.
        plan: how much work to do.
        seed: of the sampled proposals.

    Attributes:
        weight_BIO: the rows with columns in visiting order; (B, I, W, O) with targets of its own.
    """

    def __init__(
        self, weight_BOI: Tensor, metric: Metric, levels: Levels, plan: Plan, seed: int
    ) -> None:
        self._weight_BOI, self._metric, self._levels, self._plan = weight_BOI, metric, levels, plan
        # Rows last: operations on a column then run over contiguous memory.
        by_input = (0, 2, 1) if weight_BOI.dim() == 3 else (1, 3, 0, 2)
        self.weight_BIO = take(weight_BOI.permute(by_input).contiguous(), metric.order_BI)
        self._generator = torch.Generator(weight_BOI.device).manual_seed(seed)

    def run(self, state: State | None = None) -> tuple[State, list[Tensor]]:
        """Return the final state and the objective (B, O) after every step, never rising.

        Args:
            state: of the same rows under another ridge, to go on from; None to start anew.
        """
        if state is None:
            state = self._start()
        else:
            state = self._fitted(self._weight_BOI, state.codes_BIO, state.floats)
        history = [state.objective_BO]
        for index in range(self._plan.alternations):
            if index < self._plan.retries:
                state = _best([state, *self._proposals(state)])
                history.append(state.objective_BO)
            codes_BIO = descend(
                self.weight_BIO,
                self._metric,
                self._levels,
                state.floats,
                state.codes_BIO,
                self._plan.sweeps,
            )
            state = state.better(self._fitted(self._weight_BOI, codes_BIO, state.floats))
            history.append(state.objective_BO)
        return state, history

    def _start(self) -> State:
        """Greedy starts from several ranges, fitted; the best of each row."""
        diagonal_BI = self._metric.h_BII.diagonal(dim1=1, dim2=2)
        ranges = search(
            self._weight_BOI if self._weight_BOI.dim() == 3 else self._weight_BOI[-1],
            diagonal_BI,
            self._levels,
            self._metric.group_size,
            self._plan.shrinks,
        )
        grids = _stack([initial_floats(*ranges, self._levels, m) for m in self._plan.multipliers])
        copies = len(self._plan.multipliers)
        codes_BIO = start(_repeat(self.weight_BIO, copies, -1), self._metric, self._levels, grids)
        fitted = self._fitted(_repeat(self._weight_BOI, copies, -2), codes_BIO, grids)
        return _best(fitted.unstack(copies))

    def _proposals(self, state: State) -> list[State]:
        """New codes for the floats of `state`: one greedy, the others sampled."""
        copies = 1 + self._plan.samples
        weight_BIO = _repeat(self.weight_BIO, copies, -1)
        floats = _stack([state.floats, *self._moved(state.floats)])
        noise = None
        if self._plan.samples:
            inputs, codes = weight_BIO.shape[1], self._levels.value_WQ.shape[1]
            noise = Noise.draw(inputs, codes, copies, TEMPERATURE, self._generator)
        codes_BIO = start(weight_BIO, self._metric, self._levels, floats, noise)
        # Unpolished proposals lose against codes that have been through a descent.
        codes_BIO = descend(weight_BIO, self._metric, self._levels, floats, codes_BIO, sweeps=1)
        weight_BOI = _repeat(self._weight_BOI, copies, -2)
        return self._fitted(weight_BOI, codes_BIO, floats).unstack(copies)

    def _moved(self, floats: Floats) -> Iterator[Floats]:
        """Floats of the sampled proposals: those of a group move alike in all rows and widths."""
        half_step_W1 = half_steps(self._levels)[:, None]
        scale_BGWO, zero_BGWO = floats.scale_BGWO, floats.zero_BGWO
        for _ in range(self._plan.samples):
            # As with the noise, all rows share the draws.
            shape, device = (2, scale_BGWO.shape[1], 1, 1), scale_BGWO.device
            scale_G11, zero_G11 = torch.randn(shape, generator=self._generator, device=device)
            scale, zero = round_floats(
                scale_BGWO * (1 + _SPREAD[0] * scale_G11),
                zero_BGWO + _SPREAD[1] * zero_G11 * scale_BGWO[:, :, :1],
                half_step_W1,
            )
            fits_BGWO = scale.isfinite() & zero.isfinite()
            yield Floats(
                torch.where(fits_BGWO, scale, scale_BGWO), torch.where(fits_BGWO, zero, zero_BGWO)
            )

    def _fitted(self, weight_BOI: Tensor, codes_BIO: Tensor, floats: Floats) -> State:
        fit = refit(weight_BOI, self._metric, self._levels, floats, codes_BIO)
        objective_BO = torch.einsum("w,wbo->bo", self._levels.weight_W.double(), fit.after_WBO)
        return State(codes_BIO, fit.floats, objective_BO)


def _best(states: Sequence[State]) -> State:
    best = states[0]
    for state in states[1:]:
        best = best.better(state)
    return best


def _repeat(x: Tensor, copies: int, dim: int) -> Tensor:
    return x if copies == 1 else torch.cat([x] * copies, dim=dim)


def _stack(floats: Sequence[Floats]) -> Floats:
    return Floats(
        torch.cat([f.scale_BGWO for f in floats], dim=-1),
        torch.cat([f.zero_BGWO for f in floats], dim=-1),
    )
