"""Allocation of widths by integer programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from fissile.quant.allocate import Choice


def least_loss(choices: Mapping[str, Sequence[Choice]], budget: int) -> float:
    """Least loss over all allocations within the budget."""
    flat = [choice for own in choices.values() for choice in own]
    owner = np.repeat(np.arange(len(choices)), [len(own) for own in choices.values()])
    one_each = (owner == np.arange(len(choices))[:, None]).astype(float)
    limits = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint([[choice.bytes for choice in flat]], 0, budget),
    ]
    losses = np.array([choice.loss for choice in flat])
    found = milp(
        losses / losses.max(),
        constraints=limits,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert found.success
    return float(losses @ np.round(found.x))
