"""Making up in weights that are there anyway for what a token does not compute.

Shapes: T tokens, D model width, F FFN width, I regressors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fissile.refactor.moments import Moments

RIDGES = (1e-3, 1e-2, 1e-1)
"""Penalties that are tried, in units of the mean variance of a block of regressors."""

Kind = Literal["none", "constant", "full"]


@dataclass(frozen=True, eq=False)
class Correction:
    """Something that may be added to a layer's output: W x + b.

    Args:
        kind: "none", "constant" (a bias alone) or "full".
        weight_DI: W, float64; None unless "full".
        bias_D: b, float64; zero where no constant may be used.
        ridge: penalty of a "full" correction.
    """

    kind: Kind
    weight_DI: Tensor | None
    bias_D: Tensor
    ridge: float | None = None

    def left(self, x_TI: Tensor, r_TD: Tensor) -> float:
        """Sum over tokens of ||r - W x - b||^2: what the correction leaves of a residual."""
        rest = r_TD.double() - self.bias_D
        if self.weight_DI is not None:
            rest -= (x_TI @ self.weight_DI.T.to(x_TI.dtype)).double()
        return float(rest.square().sum())


def corrections(
    moments: Moments,
    *,
    constant: bool = True,
    blocks: Sequence[int] | None = None,
    ridges: Sequence[float] = RIDGES,
) -> list[Correction]:
    """Candidates between which held-out tokens decide, the do-nothing one first.

    A full correction is W = E[r x^T] (E[x x^T] + lambda I)^-1, centred where a constant is fitted.

    Args:
        moments: sums over pairs of regressors x (T, I) and residuals r = dense - converted (T, D).
        constant: whether the layer may have a bias; stock architectures have none.
        blocks: sizes of groups of regressors of one scale; each has its own lambda.
        ridges: lambdas to try, in units of the mean variance of a block.

    Raises:
        ValueError: no tokens were added, or a ridge is not positive.
    """
    zero_D = torch.zeros_like(moments.sum_O)
    found = [Correction("none", None, zero_D)]
    if constant:
        found.append(Correction("constant", None, moments.mean_O()))
    for ridge in ridges:
        weight_DI, bias_D = moments.solve(ridge, constant=constant, blocks=blocks)
        found.append(Correction("full", weight_DI, bias_D, ridge))
    return found


def mean_restore(mean_F: Tensor, down_DF: Tensor, dropped: Tensor) -> Tensor:
    """Output of the dropped neurons at their mean activation: FLAP's bias (section 3.3).

    Args:
        mean_F: E[h] (F,).
        down_DF: weight of the down projection (D, F).
        dropped: int64, the neurons that are not computed.

    Returns:
        (D,) float64, to be added to the layer's output.
    """
    return down_DF[:, dropped].double() @ mean_F[dropped].double()


def is_held_out(window: int, every: int = 8) -> bool:
    """Whether a calibration window is kept for deciding: the last of every `every` windows."""
    return window % every == every - 1
