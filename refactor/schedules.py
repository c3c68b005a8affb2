"""Budget-aware learning-rate schedules: one formula, f(u) = 2u / (phi + (2 - phi) u).

With u = (1 + cos(pi p)) / 2 it is UBA (arXiv 2505.24452, section 4), and phi = 2 plain cosine; with
u = 1 - p, phi = 1 is REX (arXiv 2107.04197, section 4) and phi = 2 linear decay. The refined
schedule (arXiv 2310.07831) is linear decay corrected by the gradient norms of an earlier run; where
those are constant it is linear decay exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

Schedule = Literal["rex", "linear", "cosine", "uba", "refined"]
_SHAPE = {"rex": 1.0, "linear": 2.0, "cosine": 2.0}


def decay(
    progress: float, kind: Schedule, phi: float = 1.0, table: Sequence[float] | None = None
) -> float:
    """Share of the peak rate left, 1 at progress 0 and 0 at progress 1 (refined: 1 at its top).

    Args:
        progress: share of the budget that is spent, 0..1.
        kind: which schedule.
        phi: UBA's shape, above 0: 2 is cosine, near 0 stays high and drops late. Others ignore it.
        table: of `refined_table`, spread over the whole budget; "refined" needs it.

    Raises:
        ValueError: unknown kind, a value out of range, or "refined" without a table.
    """
    if kind not in get_args(Schedule):
        raise ValueError(f"schedule {kind!r} is not one of {', '.join(get_args(Schedule))}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} is not in 0..1")
    if phi <= 0:
        raise ValueError(f"phi {phi} must be positive")
    if kind == "refined":
        if table is None:
            raise ValueError("the refined schedule needs the table of an earlier run's norms")
        return float(np.interp(progress, np.linspace(0, 1, len(table)), table))
    shape = _SHAPE.get(kind, phi)
    curved = kind in ("cosine", "uba")
    u = (1 + math.cos(math.pi * progress)) / 2 if curved else 1 - progress
    return 2 * u / (shape + (2 - shape) * u)


def learning_rate(
    progress: float,
    *,
    peak: float,
    kind: Schedule = "rex",
    floor: float = 0.0,
    warmup: float = 0.0,
    stride: float = 0.0,
    phi: float = 1.0,
    table: Sequence[float] | None = None,
) -> float:
    """Rate of one step: linear warm-up to the peak, then decay towards the floor.

    Args:
        progress: share of the budget spent before the step, 0..1.
        peak: highest rate.
        kind: see `decay`.
        floor: rate that is decayed to.
        warmup: share of the budget in which the rate rises, below 1.
        stride: share that one step takes; with it the first step of a warm-up learns too.
        phi: see `decay`.
        table: see `decay`.

    Raises:
        ValueError: a value is out of range.
    """
    if not 0 <= progress <= 1 or not 0 <= warmup < 1:
        raise ValueError(f"progress {progress} and warmup {warmup} must be in 0..1")
    if progress < warmup:
        return peak * min(1.0, (progress + stride) / (warmup + stride))
    after = min(1.0, (progress - warmup) / (1 - warmup))
    return floor + (peak - floor) * decay(after, kind, phi, table)


def refined_table(
    norms: Sequence[float], *, power: float = 1.0, smoothing: float = 0.1
) -> list[float]:
    """Rates of the refined schedule from a run's gradient norms (arXiv 2310.07831, algorithm 1).

    With G the norms after a median filter and w = G ** -power, the rate of step t is
    w_t * sum_{s > t} w_s, divided by the largest of them.

    Args:
        norms: gradient norm of every step: L1 for Adam with power 1, L2 for SGD with power 2.
        power: see above.
        smoothing: width of the median filter as a share of the steps.

    Returns:
        One rate a step, at most 1; the last is 0.

    Raises:
        ValueError: fewer than two norms, or one is not finite and positive.
    """
    values = np.asarray(norms, dtype=np.float64)
    if len(values) < 2 or not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("the refined schedule needs at least two gradient norms, all positive")
    half = int(smoothing * len(values) / 2)
    padded = np.concatenate([np.full(half, values[0]), values, values[::-1][:half]])
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)
    weights = smooth**-power
    rates = weights * (weights.sum() - np.cumsum(weights))
    rates[-1] = 0.0
    return list(map(float, rates / rates.max()))
