"""Six and eight bits: a second code for what four bits leave.

The residual of the 4-bit weight has a range and a distribution of its own, so its code is solved on
its own, with its own scales and zeros, after the nested code. The two most significant of its four
bits make six, all make eight.

Shapes: O output rows, I inputs; "..." leading dimensions (experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fissile.config import Effort
from fissile.kernels import layout
from fissile.quant.decouple import solve, with_loss
from fissile.quant.nested import NestedWeight


def with_residual(
    nested: NestedWeight,
    weight: Tensor,
    hessian: Tensor,
    widths: Sequence[int] = (6, 8),
    *,
    effort: Effort = "fast",
    damp: float = 0.01,
    seed: int = 0,
) -> NestedWeight:
    """Add widths 6 and 8 to a nested weight.

    Args:
        nested: with width 4.
        weight: float (..., O, I), what 6 and 8 bits shall come near.
        hessian: float (..., I, I), mean of x x^T over the inputs.
        widths: (6,), (8,) or both.
        effort: of the residual's solve.
        damp: ridge in units of the mean diagonal.
        seed: of the solve.

    Raises:
        ValueError: the weight has no 4-bit code, or `widths` are others.
    """
    if layout.STORED_BITS not in nested.widths:
        raise ValueError(f"widths {list(nested.widths)}: 6 and 8 bits are added to 4")
    if not widths or not {6, 8}.issuperset(widths):
        raise ValueError(f"residual widths {list(widths)}, accepted: 6, 8")
    own = tuple(sorted(k - layout.STORED_BITS for k in widths))
    rest = weight.float() - nested.dequantize(layout.STORED_BITS)
    found = solve(
        rest,
        hessian,
        widths=own,
        group_size=nested.group_size,
        omega={2: 1.0, 4: 1.0},
        effort=effort,
        damp=damp,
        seed=seed,
    )
    added = {k: k + layout.STORED_BITS for k in own}
    whole = replace(
        nested,
        widths=(*nested.widths, *added.values()),
        scale=nested.scale | {k: found.scale[r] for r, k in added.items()},
        zero=nested.zero | {k: found.zero[r] for r, k in added.items()},
        residual=found.codes,
    )
    return replace(whole, loss=nested.loss | with_loss(whole, weight.float(), hessian).loss)
