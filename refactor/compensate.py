"""Making up in always-computed weights for what a token does not compute.

Shapes: T tokens, D model width, F FFN width, S shared neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fissile.refactor.moments import Moments


@dataclass(frozen=True, eq=False)
class Refit:
    """A correction of the shared down projection and what it does on held-out tokens.

    Args:
        kind: "full" correction, "constant" only, or "none" when neither lowers the held-out error.
        delta_DS: added to the shared down projection, float64; zero unless `kind` is "full".
        bias_D: added to the layer's output, float64; zero where `kind` is "none".
        error_before: held-out mean over tokens of ||r||^2, r being dense minus converted output.
        error_after: the same of what the correction leaves.
    """

    kind: Literal["full", "constant", "none"]
    delta_DS: Tensor
    bias_D: Tensor
    error_before: float
    error_after: float


def refit_shared(train: Moments, held: Moments, *, ridge: float, constant: bool = True) -> Refit:
    """Least-squares re-fit of the shared down projection, decided on held-out tokens.

    delta = E[r h^T] (E[h h^T] + lambda I)^-1, centred where a constant is fitted.

    Args:
        train: sums over pairs of shared activations (T, S) and residuals dense - converted (T, D).
        held: the same over other tokens; the correction with the lowest error here is returned.
        ridge: lambda in units of the mean diagonal.
        constant: whether the layer may have a bias; stock architectures have none.

    Raises:
        ValueError: one of the two saw no tokens, or `ridge` is not positive.
    """
    delta_DS, bias_D = train.solve(ridge, constant=constant)
    zero_DS = delta_DS.new_zeros(delta_DS.shape)
    before = held.error()
    options = [
        (before, Refit("none", zero_DS, bias_D.new_zeros(bias_D.shape), before, before)),
    ]
    if constant:
        mean_D = train.shift_O + train.sum_O / train.count
        after = held.error(None, mean_D)
        options.append((after, Refit("constant", zero_DS, mean_D, before, after)))
    after = held.error(delta_DS, bias_D)
    options.append((after, Refit("full", delta_DS, bias_D, before, after)))
    return min(options, key=lambda option: option[0])[1]


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
