"""Budget-aware learning-rate schedules: one formula, f(u) = 2u / (phi + (2 - phi) u).

With u = (1 + cos(pi p)) / 2 it is UBA (arXiv 2505.24452, section 4), and phi = 2 plain cosine; with
u = 1 - p, phi = 1 is REX (arXiv 2107.04197, section 4) and phi = 2 linear decay.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["rex", "linear", "cosine", "uba"]


def decay(progress: float, kind: Schedule, phi: float = 1.0) -> float:
    """Share of the peak rate left, 1 at progress 0 and 0 at progress 1.

    Args:
        progress: share of the budget that is spent, 0..1.
        kind: which schedule.
        phi: UBA's shape, above 0: 2 is cosine, near 0 stays high and drops late. Others ignore it.

    Raises:
        ValueError: unknown kind, or a value out of range.
    """
    if kind not in get_args(Schedule):
        raise ValueError(f"schedule {kind!r} is not one of {', '.join(get_args(Schedule))}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} is not in 0..1")
    if phi <= 0:
        raise ValueError(f"phi {phi} must be positive")
    shape = {"rex": 1.0, "linear": 2.0, "cosine": 2.0, "uba": phi}[kind]
    curved = kind in ("cosine", "uba")
    u = (1 + math.cos(math.pi * progress)) / 2 if curved else 1 - progress
    return 2 * u / (shape + (2 - shape) * u)


def learning_rate(
    step: int,
    total: int,
    *,
    peak: float,
    kind: Schedule = "rex",
    floor: float = 0.0,
    warmup: int = 0,
    phi: float = 1.0,
) -> float:
    """Rate of one step: linear warm-up to the peak, then decay towards the floor.

    Args:
        step: 0..total-1; the last step still learns, at 1 / (total - warmup) of the way to zero.
        total: steps in all, warm-up included.
        peak: highest rate.
        kind: see `decay`.
        floor: rate that is decayed to.
        warmup: steps of warm-up, below `total`.
        phi: see `decay`.

    Raises:
        ValueError: `step` or `warmup` is out of range.
    """
    if not 0 <= step < total or not 0 <= warmup < total:
        raise ValueError(f"step {step} and warmup {warmup} must be in 0..{total - 1}")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return floor + (peak - floor) * decay((step - warmup) / (total - warmup), kind, phi)
