"""Tied floats: those of narrower widths are three coefficients a row upon the widest's.

    scale_k = a_k scale_b        zero_k = o_k scale_b + e_k zero_b        b the widest, k < b

so that W_k = a_k scale_b value_k + o_k scale_b + e_k zero_b. For fixed integers the loss of a
width is a quadratic in its scales and zeros (`fissile.quant.floats`); these are linear in the
coefficients of a row and, for fixed coefficients, in the scales and zeros of the widest. So both
have a closed form: 3 unknowns a row and width, and 2G unknowns a row for all widths together.

Everything is judged as it will be stored, rounded to float16, and kept per row where it helps.

Shapes: B layers, n rows of a chunk, O output rows, I inputs, G groups, P = 2G scales and zeros, W
widths, V = W - 1 narrower ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.kernels.layout import tied_floats
from fissile.quant.alternate import State
from fissile.quant.effort import Plan
from fissile.quant.floats import System, newton_step, quadratic
from fissile.quant.integers import Floats, Levels, descend, start
from fissile.quant.metric import Metric, take
from fissile.quant.ranges import half_steps, round_floats
from fissile.quant.rows import row_chunks

_ROUNDS = 2  # of coefficients and floats for the same integers; more change nothing


@dataclass(frozen=True, eq=False)
class Tied:
    """Rows of a chunk with tied floats.

    Attributes:
        state: codes, floats of all widths as they decode, and the objective.
        ties_BOV3: float32, a, o and e of the narrower widths; representable in float16.
    """

    state: State
    ties_BOV3: Tensor

    def better(self, other: Tied) -> Tied:
        """Row by row the one with the lower objective, this one on a tie."""
        keep_BO = self.state.objective_BO <= other.state.objective_BO
        ties_BOV3 = torch.where(keep_BO[..., None, None], self.ties_BOV3, other.ties_BOV3)
        return Tied(self.state.better(other.state), ties_BOV3)


def tie(
    weight_BOI: Tensor,
    weight_BIO: Tensor,
    metric: Metric,
    levels: Levels,
    state: State,
    plan: Plan,
) -> tuple[Tied, list[Tensor]]:
    """Tie the floats of a solved chunk and let its integers follow.

    Args:
        weight_BOI: float32, natural column order; (W, B, O, I) for a target of its own per width.
        weight_BIO: the same with columns in visiting order, rows last; (B, I, W, O).
        metric: prepared Hessians.
        levels: at least two widths, and their weights.
        state: solved with floats of its own for every width.
        plan: as many rounds of descent and fit as it has alternations, the first `retries` of them
            from fresh codes too.

    Returns:
        The rows, and their objective (B, O) after every step, never rising.
    """
    ties_BOV3 = _aligned(levels).expand(*state.objective_BO.shape, -1, -1)
    tied = fit(weight_BOI, metric, levels, Tied(state, ties_BOV3))
    history = [tied.state.objective_BO]
    for index in range(plan.alternations):
        for fresh in (True, False) if index < plan.retries else (False,):
            floats, codes_BIO = tied.state.floats, tied.state.codes_BIO
            if fresh:  # the codes so far were found for other floats
                codes_BIO = start(weight_BIO, metric, levels, floats)
            codes_BIO = descend(weight_BIO, metric, levels, floats, codes_BIO, plan.sweeps)
            moved = Tied(State(codes_BIO, floats, history[-1]), tied.ties_BOV3)
            tied = tied.better(fit(weight_BOI, metric, levels, moved))
            history.append(tied.state.objective_BO)
    return tied, history


def fit(weight_BOI: Tensor, metric: Metric, levels: Levels, tied: Tied) -> Tied:
    """Least-squares coefficients, and floats of the widest width, for the codes as they are.

    Args:
        weight_BOI: float32, natural column order; (W, B, O, I) for a target of its own per width.
        metric: prepared Hessians.
        levels: widths and weights.
        tied: codes, coefficients, and floats of the widest width; what else it holds is not read.

    Returns:
        An objective that is at most that of the codes with the floats and coefficients given.
    """
    codes_BOI = take(tied.state.codes_BIO, metric.inverse_BI).transpose(1, 2)
    ones_BGG = metric.h_ones_BIG.unflatten(1, (-1, metric.group_size)).sum(2)
    scale_BGWO = tied.state.floats.scale_BGWO.clone()
    zero_BGWO = tied.state.floats.zero_BGWO.clone()
    ties_BOV3 = tied.ties_BOV3.clone()
    objective_BO = torch.empty_like(tied.state.objective_BO)
    batch, rows, inputs = weight_BOI.shape[-3:]
    kept_alive = batch * inputs * (len(levels.widths) + 1)
    for part in row_chunks(rows, kept_alive, weight_BOI.device):
        codes = codes_BOI[:, part].contiguous().int().flatten()
        chunk = _Rows(
            levels,
            scale_BGWO[:, :, -1, part].transpose(1, 2),
            zero_BGWO[:, :, -1, part].transpose(1, 2),
            ties_BOV3[:, part],
        )
        systems = []
        for w, own in enumerate(chunk.floats):
            value_BnI = levels.value_WQ[w].index_select(0, codes).view(batch, -1, inputs)
            wanted = weight_BOI if weight_BOI.dim() == 3 else weight_BOI[w]
            systems.append(quadratic(value_BnI, wanted[:, part], metric, ones_BGG, *own))
        chunk.solve(systems)
        for w, (scale_BnG, zero_BnG) in enumerate(chunk.floats):
            scale_BGWO[:, :, w, part] = scale_BnG.transpose(1, 2)
            zero_BGWO[:, :, w, part] = zero_BnG.transpose(1, 2)
        ties_BOV3[:, part] = chunk.ties_BnV3
        objective_BO[:, part] = chunk.objective()
    floats = Floats(scale_BGWO, zero_BGWO)
    return Tied(State(tied.state.codes_BIO, floats, objective_BO), ties_BOV3)


class _Rows:
    """Floats of a chunk of rows while they are fitted.

    Attributes:
        floats: scale and zero of the centred code of every width, (B, n, G), as they decode.
        ties_BnV3: as they will be stored.

    Args:
        levels: widths and weights.
        scale_BnG: of the widest width.
        zero_BnG: of its centred code.
        ties_BnV3: to start from.
    """

    def __init__(
        self, levels: Levels, scale_BnG: Tensor, zero_BnG: Tensor, ties_BnV3: Tensor
    ) -> None:
        self._weights = levels.weight_W.tolist()
        self._half_W = half_steps(levels)
        self._half = self._half_W.tolist()
        self.ties_BnV3 = ties_BnV3
        self.floats = self._decoded(scale_BnG, zero_BnG)
        self._systems: list[System] = []

    def solve(self, systems: list[System]) -> None:
        """Fit coefficients and floats; the losses near the floats they have are given, by width."""
        self._systems = systems
        for _ in range(_ROUNDS):
            self._fit_ties()
            self._fit_widest()
        self._fit_ties()

    def objective(self) -> Tensor:
        """Weighted sum of the losses, float64 (B, n)."""
        pairs = zip(self._weights, self._systems, strict=True)
        return torch.stack([weight * system.loss_Bn for weight, system in pairs]).sum(0)

    def _decoded(self, scale_BnG: Tensor, zero_BnG: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Floats of all widths for those of the widest and the coefficients at hand."""
        stored = (zero_BnG - scale_BnG * self._half[-1]).half().float()
        found = [self._own(v, scale_BnG, stored) for v in range(self.ties_BnV3.shape[2])]
        return [*found, (scale_BnG, stored + scale_BnG * self._half[-1])]

    def _own(self, v: int, scale_BnG: Tensor, stored_BnG: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = tied_floats(self.ties_BnV3[:, :, v], scale_BnG, stored_BnG)
        return scale, zero + scale * self._half[v]

    def _centred(self, v: int) -> tuple[Tensor, Tensor, Tensor]:
        """a, o, e as they act on centred codes and zeros, float64 (B, n)."""
        a, o, e = self.ties_BnV3[:, :, v].double().unbind(-1)
        return a, o + a * self._half[v] - e * self._half[-1], e

    def _gain(self, w: int, floats: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The step (B, n, P) to other floats of a width, and what it saves (B, n)."""
        pairs = zip(floats, self.floats[w], strict=True)
        step_BnP = torch.cat([new - old for new, old in pairs], dim=-1).double()
        return step_BnP, self._systems[w].gain(step_BnP)

    def _take(self, w: int, floats: tuple[Tensor, Tensor], rows_Bn: Tensor) -> None:
        """Give rows of a width other floats."""
        step_BnP, gain_Bn = self._gain(w, floats)
        moved = self._systems[w].moved(step_BnP, gain_Bn)
        self._systems[w] = moved.where(rows_Bn, self._systems[w])
        kept = rows_Bn[..., None]
        pairs = zip(floats, self.floats[w], strict=True)
        scale, zero = (torch.where(kept, new, old) for new, old in pairs)
        self.floats[w] = scale, zero

    def _fit_ties(self) -> None:
        """Coefficients of every narrower width: 3 unknowns a row."""
        scale_BnG, zero_BnG = self.floats[-1]
        none = torch.zeros_like(scale_BnG)
        columns = (
            torch.cat([scale_BnG, none], dim=-1),
            torch.cat([none, scale_BnG], dim=-1),
            torch.cat([none, zero_BnG], dim=-1),
        )
        basis_BnP3 = torch.stack(columns, dim=-1).double()
        stored = (zero_BnG - scale_BnG * self._half[-1]).half().float()
        for v in range(self.ties_BnV3.shape[2]):
            old = self.ties_BnV3
            step_Bn3 = newton_step(self._systems[v].projected(basis_BnP3))
            a, o, e = (x + d for x, d in zip(self._centred(v), step_Bn3.unbind(-1), strict=True))
            # A negative scale would order the codes of one width against those of another.
            a = torch.where(a > 0, a, old[:, :, v, 0].double()).half().double()
            e = e.half().double()
            o = o - a * self._half[v] + e * self._half[-1]
            self.ties_BnV3 = old.clone()
            self.ties_BnV3[:, :, v] = torch.stack([a, o, e], dim=-1).half().float()
            new = self._own(v, scale_BnG, stored)
            # What overflows float16 gives NaN here, which compares false.
            better_Bn = self._gain(v, new)[1] > 0
            self._take(v, new, better_Bn)
            self.ties_BnV3 = torch.where(better_Bn[..., None, None], self.ties_BnV3, old)

    def _fit_widest(self) -> None:
        """Scales and zeros of the widest width, which all others follow: 2G unknowns a row."""
        scale_BnG = self.floats[-1][0]
        joint: System | None = None
        for w, (weight, system) in enumerate(zip(self._weights, self._systems, strict=True)):
            own = system if w == len(self._systems) - 1 else system.mixed(*self._centred(w))
            joint = own.times(weight) if joint is None else joint.plus(own.times(weight))
        assert joint is not None
        step_BnP = newton_step(joint)
        scale, zero = (x + d for x, d in zip(self.floats[-1], step_BnP.chunk(2, -1), strict=True))
        scale = torch.where(scale > 0, scale, scale_BnG.double())
        new = self._decoded(*round_floats(scale, zero, self._half_W[-1:]))
        gains = [weight * self._gain(w, new[w])[1] for w, weight in enumerate(self._weights)]
        better_Bn = torch.stack(gains).sum(0) > 0
        for w, floats in enumerate(new):
            self._take(w, floats, better_Bn)


def _aligned(levels: Levels) -> Tensor:
    """Coefficients under which cells of all widths have the same centres: float32 (V, 3)."""
    half = half_steps(levels).double()
    a = levels.unit_W[:-1].double().half().double()
    return torch.stack([a, half[-1] - a * half[:-1], torch.ones_like(a)], dim=-1).half().float()
