"""Closed-form linear routers inside each layer, solved from streamed moments.

Shapes: T tokens, D model width, F FFN width, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fissile.refactor.moments import Moments
from fissile.refactor.partition import Partition


def ranking_targets(norms_TE: Tensor, kind: Literal["centred", "log"] = "centred") -> Tensor:
    """What a linear router regresses: only the order of a token's experts matters.

    Args:
        norms_TE: the experts' output norms (T, E).
        kind: "centred" norms minus the token's mean, so that tokens weigh by what is at stake;
            "log" norms minus the token's mean log, all tokens alike.

    Returns:
        (T, E), each row sums to zero.
    """
    if kind == "log":
        # A tenth of a thousandth of the typical norm: a silent expert is bad, not infinitely bad.
        norms_TE = (norms_TE + 1e-4 * norms_TE.mean()).clamp_min(1e-30).log()
    elif kind != "centred":
        raise ValueError(f"kind {kind!r} is not one of centred, log")
    return norms_TE - norms_TE.mean(1, keepdim=True)


def ridge_selector(moments: Moments, ridge: float) -> dict[str, Tensor]:
    """Linear router from the moments of (x, targets), x being the FFN's input.

    Args:
        moments: sums over pairs x (T, D) and `ranking_targets` (T, E).
        ridge: penalty in units of the mean variance of x.

    Returns:
        `selector.weight` (E, D) and `selector.bias` (E), float32, scaled so that the regressed
        targets have unit standard deviation: logits of every layer are then of one scale.

    Raises:
        ValueError: no tokens were added.
    """
    weight_ED, bias_E = moments.solve(ridge)
    mean_E = moments.shift_O + moments.sum_O / moments.count
    variance = moments.error(None, mean_E) / len(mean_E)
    scale = variance**-0.5 if variance > 0 else 1.0
    return _selector(weight_ED * scale, bias_E * scale)


def mean_gate_selector(gate_FD: Tensor, partition: Partition) -> dict[str, Tensor]:
    """A control without calibration: the mean gate row of every expert (ExpertWeaver, section 3.3).

    Args:
        gate_FD: weight of the gate projection (F, D).
        partition: disjoint experts.
    """
    weight_ED = gate_FD.double()[partition.experts_EM].mean(1)
    return _selector(weight_ED, weight_ED.new_zeros(len(weight_ED)))


def _selector(weight_ED: Tensor, bias_E: Tensor) -> dict[str, Tensor]:
    return {
        "selector.weight": weight_ED.to(torch.float32),
        "selector.bias": bias_E.to(torch.float32),
    }
