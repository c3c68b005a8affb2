"""decoupleQ on nested codes: integers and floats of all widths, alternately, until neither helps.

Minimises, row by row,

    J = sum_k lambda_k (W_k - W) H (W_k - W)^T,    W_k = scale_k code_k + zero_k a group,

where code_k are the k most significant bits of one code, H is normalised by its mean diagonal and
damped once, and lambda_k = 4^k omega_k. Every step keeps the better of old and new per row, so J
of a row never rises. With one width this is decoupleQ (arXiv 2404.12759) with static groups, box
constrained descent and additive float zeros.

Shapes: B layers (experts) of equal shape, O output rows, I inputs, G groups, W widths, S steps,
R rows of a stack of starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fissile.config import Effort
from fissile.kernels import layout
from fissile.quant.alternate import Alternation, State
from fissile.quant.effort import ERROR_VALUES, PLANS, Plan
from fissile.quant.floats import loss_rows
from fissile.quant.integers import Levels
from fissile.quant.metric import prepare, take
from fissile.quant.nested import NestedWeight, joined
from fissile.quant.ranges import half_steps
from fissile.quant.rows import slices
from fissile.quant.tied import tie

_HESSIAN_VALUES = 1 << 24
"""Float32 values of the Hessians of layers that are solved at once."""
_PROBED_ROWS = 64


@torch.no_grad()
def solve(
    weight: Tensor,
    hessian: Tensor,
    *,
    widths: Sequence[int] = (2, 3, 4),
    group_size: int = 64,
    omega: Mapping[int, float] | None = None,
    effort: Effort = "balanced",
    companding: float | None = 1.0,
    damp: float = 0.01,
    seed: int = 0,
    targets: Mapping[int, Tensor] | None = None,
    tied: bool = False,
) -> NestedWeight:
    """Quantize one weight, or a batch of equal shape, to a bit-nested code.

    Args:
        weight: float (O, I), or (B, O, I) for B layers solved in one go.
        hessian: float (I, I) or (B, I, I), mean of x x^T over the inputs; any scale. Zeros mean
            that nothing is known of the inputs: plain squared error.
        widths: ascending subset of (2, 3, 4). One width is the dedicated mode: a k-bit code,
            stored shifted left by 4 - k.
        group_size: inputs that share a scale and a zero; divides I, and I is a multiple of 8.
        omega: weight of each width's loss, relative to 4^width; default {2: 3, 3: 1, 4: 1}.
        effort: how many starts and alternations, see `PLANS`.
        companding: table of the values at 3 and 4 bits, 1 or a key of `layout.COMPANDED`; None for
            the one whose quick solve of some rows ends lowest.
        damp: ridge in units of the mean diagonal of the Hessian.
        seed: of the sampled starts; the result is a function of the arguments.
        targets: width to what that width shall come near, shaped as `weight`; `weight` for all
            without it.
        tied: floats of narrower widths hang on the widest's, see `fissile.quant.tied`.

    Returns:
        NestedWeight with the leading dimension of `weight`, if any; scales are not negative.

    Raises:
        ValueError: shapes, widths or options that do not fit, values that are not finite, a
            Hessian that is far from positive semi-definite, or weights outside float16.
    """
    weights = dict(omega or {2: 3.0, 3: 1.0, 4: 1.0})
    _check(weight, hessian, tuple(widths), group_size, weights, effort, damp, tied)
    single = weight.dim() == 2
    weight_BOI = _aims(weight.reshape(-1, *weight.shape[-2:]), targets, widths)
    hessian_BII = hessian.reshape(-1, *hessian.shape[-2:])
    inputs = weight.shape[-1]
    if companding is None:
        companding = choose_companding(
            weight_BOI, hessian_BII, tuple(widths), weights, group_size, damp
        )
    levels = Levels.build(tuple(widths), weights, weight.device, companding)
    rest = (levels, group_size, PLANS[effort], damp, seed, tied)
    solved = [
        _solve_batch(weight_BOI[..., part, :, :], hessian_BII[part], *rest)
        for part in slices(len(hessian_BII), max(1, _HESSIAN_VALUES // inputs**2))
    ]
    result = joined(solved, dim=0)
    return _squeezed(result) if single else result


def _aims(
    weight_BOI: Tensor, targets: Mapping[int, Tensor] | None, widths: Sequence[int]
) -> Tensor:
    """The weight, or the widths' targets stacked along a leading dimension."""
    if targets is None:
        return weight_BOI
    return torch.stack([targets[k].reshape(weight_BOI.shape) for k in widths])


def choose_companding(
    weight_BOI: Tensor,
    hessian_BII: Tensor,
    widths: tuple[int, ...],
    omega: Mapping[int, float],
    group_size: int,
    damp: float,
) -> float:
    """The table under which a quick solve of some rows ends with the lowest objective.

    Args:
        weight_BOI: float.
        hessian_BII: float.
        widths: ascending.
        omega: weight of each width.
        group_size: inputs that share a scale and a zero.
        damp: ridge in units of the mean diagonal.

    Returns:
        1 or a key of `layout.COMPANDED`.
    """
    if widths[-1] == layout.NESTED[0]:
        return 1.0  # no width has a table
    layers, inputs = len(hessian_BII), weight_BOI.shape[-1]
    layers = max(1, min(layers, _HESSIAN_VALUES // inputs**2))
    rows = probed_rows(weight_BOI.shape[-2]).to(weight_BOI.device)
    sample_BOI = weight_BOI[..., :layers, :, :][..., rows, :].float()
    metric = prepare(hessian_BII[:layers], group_size, damp)
    objective = {}
    for ratio in (1.0, *layout.COMPANDED):
        levels = Levels.build(widths, omega, weight_BOI.device, ratio)
        state, _ = Alternation(sample_BOI, metric, levels, PLANS["fast"], 0).run()
        objective[ratio] = float(state.objective_BO.sum())
    return min(objective, key=lambda ratio: objective[ratio])


def probed_rows(rows: int) -> Tensor:
    """Rows that `choose_companding` looks at, of so many, int64; of themselves, all."""
    return torch.linspace(0, rows - 1, _PROBED_ROWS).round().long().unique()


def _solve_batch(
    weight_BOI: Tensor,
    hessian_BII: Tensor,
    levels: Levels,
    group_size: int,
    plan: Plan,
    damp: float,
    seed: int,
    tied: bool,
) -> NestedWeight:
    batch, outputs, inputs = weight_BOI.shape[-3:]
    per_row = batch * inputs * len(levels.widths) * plan.copies
    parts = list(slices(outputs, max(64, ERROR_VALUES // per_row)))
    states: list[State | None] = [None] * len(parts)
    solved: list[NestedWeight] = []
    for stage, ridge in enumerate(plan.ridges, start=1):
        metric = prepare(hessian_BII, group_size, damp * ridge)
        for i, part in enumerate(parts):
            chunk_BOI = weight_BOI[..., part, :].float().contiguous()
            rows = Alternation(chunk_BOI, metric, levels, plan, seed + (stage << 32))
            states[i], history = state, _ = rows.run(states[i])
            if stage < len(plan.ridges):
                continue
            ties_BOV3 = None
            if tied:
                # What came before had floats of its own: another, lower objective.
                found, history = tie(chunk_BOI, rows.weight_BIO, metric, levels, state, plan)
                state, ties_BOV3 = found.state, found.ties_BOV3
            nested = _assemble(state, history, metric.inverse_BI, levels, group_size, ties_BOV3)
            solved.append(with_loss(nested, chunk_BOI, hessian_BII))
        del metric, rows  # as large as the Hessians: one at a time
    return joined(solved, dim=1)


def _assemble(
    state: State,
    history: list[Tensor],
    inverse_BI: Tensor,
    levels: Levels,
    group_size: int,
    ties_BOV3: Tensor | None = None,
) -> NestedWeight:
    """Codes in natural order, shifted to 4 bits; floats of the uncentred codes."""
    shift = layout.STORED_BITS - levels.widths[-1]
    codes_BOI = take(state.codes_BIO, inverse_BI).transpose(1, 2).contiguous() << shift
    scale, zero = {}, {}
    for w, half_step in enumerate(half_steps(levels).tolist()):
        width = levels.widths[w]
        scale[width] = state.floats.scale_BGWO[:, :, w].transpose(1, 2).contiguous()
        centred = state.floats.zero_BGWO[:, :, w].transpose(1, 2)
        # Rounding again removes the last-bit error of centring: the value was a float16 before.
        zero[width] = (centred - scale[width] * half_step).half().float()
    tied: dict[int, Tensor] = {}
    if ties_BOV3 is not None:
        base = levels.widths[-1]
        for width, ties_BO3 in zip(levels.widths, ties_BOV3.unbind(2), strict=False):
            scale[width], zero[width] = layout.tied_floats(ties_BO3, scale[base], zero[base])
            tied[width] = ties_BO3.contiguous()
    return NestedWeight(
        codes_BOI,
        scale,
        zero,
        levels.widths,
        group_size,
        history=torch.stack(history),
        companding=levels.companding,
        tied=tied,
    )


def with_loss(nested: NestedWeight, weight: Tensor, hessian: Tensor) -> NestedWeight:
    """The same weight with `loss` measured on what it decodes to, H as given.

    Args:
        nested: codes (..., O, I).
        weight: float32 (..., O, I), the original; (W, B, O, I) where every width has its own.
        hessian: float (..., I, I).
    """
    hessian_BII = hessian.reshape(-1, *hessian.shape[-2:])
    losses = {}
    for w, width in enumerate(nested.widths):
        wanted = weight[w] if weight.dim() > nested.codes.dim() else weight
        error_BOI = nested.dequantize(width).sub_(wanted).reshape(-1, *weight.shape[-2:])
        losses[width] = loss_rows(error_BOI, hessian_BII).float().reshape(wanted.shape[:-1])
    return replace(nested, loss=losses)


def _squeezed(nested: NestedWeight) -> NestedWeight:
    """Drop the leading dimension of one layer."""

    def first(values: dict[int, Tensor]) -> dict[int, Tensor]:
        return {k: x[0] for k, x in values.items()}

    return replace(
        nested,
        codes=nested.codes[0],
        scale=first(nested.scale),
        zero=first(nested.zero),
        tied=first(nested.tied),
        loss=first(nested.loss),
        history=nested.history[:, 0] if nested.history.numel() else nested.history,
    )


def _check(
    weight: Tensor,
    hessian: Tensor,
    widths: tuple[int, ...],
    group_size: int,
    omega: Mapping[int, float],
    effort: str,
    damp: float,
    tied: bool,
) -> None:
    if weight.dim() not in (2, 3) or hessian.shape != (*weight.shape[:-2], *weight.shape[-1:] * 2):
        raise ValueError(
            f"weight {tuple(weight.shape)} and hessian {tuple(hessian.shape)} do not fit, "
            "accepted: (O, I) with (I, I), or (B, O, I) with (B, I, I)"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight {tuple(weight.shape)} is empty")
    layout.check_shape(weight.shape[-1], group_size)
    if not widths or widths != tuple(k for k in layout.NESTED if k in widths):
        raise ValueError(f"widths {list(widths)}, accepted: ascending, of {list(layout.NESTED)}")
    if tied and len(widths) < 2:
        raise ValueError(f"widths {list(widths)}: tied floats need two or three")
    for k in widths:
        if not omega.get(k, 0) > 0:
            raise ValueError(f"omega of width {k} is {omega.get(k)}, accepted: above 0")
    if effort not in PLANS:
        raise ValueError(f"effort {effort!r}, accepted: {', '.join(PLANS)}")
    if not damp > 0:
        raise ValueError(f"damp {damp}, accepted: above 0")
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds a value that is not finite")
