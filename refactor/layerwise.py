"""Routers inside each layer that need no training: solved from moments, or read off the weights.

Shapes: T tokens, D model width, F FFN width, E experts, Q feature width, R neurons per expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fissile.refactor.moments import Moments
from fissile.refactor.partition import Partition


def ranking_targets(
    norms_TE: Tensor, kind: Literal["centred", "log", "absolute"] = "centred"
) -> Tensor:
    """What a linear router regresses: only the order of a token's experts matters.

    Args:
        norms_TE: the experts' output norms (T, E).
        kind: "centred" norms minus the token's mean, so that tokens weigh by what is at stake;
            "log" norms minus the token's mean log, all tokens alike; "absolute" the norms as they
            are, for a threshold that lets tokens with more at stake have more experts.

    Returns:
        (T, E), each row sums to zero unless absolute.
    """
    if kind == "absolute":
        return norms_TE
    if kind == "log":
        # A tenth of a thousandth of the typical norm: a silent expert is bad, not infinitely bad.
        norms_TE = (norms_TE + 1e-4 * norms_TE.mean()).clamp_min(1e-30).log()
    elif kind != "centred":
        raise ValueError(f"kind {kind!r} is not one of centred, log, absolute")
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

    With the up rows, the keys of a gated FFN, it is avg-k of EMoE (section 3.2).

    Args:
        gate_FD: weight of the gate projection (F, D), or of the up projection.
        partition: disjoint experts.
    """
    weight_ED = gate_FD.double()[partition.experts_EM].mean(1)
    return _selector(weight_ED, weight_ED.new_zeros(len(weight_ED)))


def centroid_distance(features_FQ: Tensor, partition: Partition) -> Tensor:
    """Distance of each neuron's features to the mean of its expert, (F,); infinite where shared."""
    distance_F = features_FQ.new_full((len(features_FQ),), torch.inf)
    for index_M in partition.experts_EM:
        own_MQ = features_FQ[index_M]
        distance_F[index_M] = (own_MQ - own_MQ.mean(0)).norm(dim=1)
    return distance_F


def representative_selector(
    gate_FD: Tensor,
    up_FD: Tensor,
    partition: Partition,
    distance_F: Tensor,
    *,
    count: int = 1,
    normalise: bool = False,
) -> dict[str, Tensor]:
    """Score experts by neurons of theirs: |act(g x) (u x)| of the most typical (CMoE, section 4.2).

    Args:
        gate_FD: weight of the gate projection.
        up_FD: weight of the up projection.
        partition: disjoint experts.
        distance_F: of each neuron to the centre of its expert, see `centroid_distance`.
        count: R, neurons per expert, the nearest ones.
        normalise: scale rows to unit norm, as CMoE's code does; scores of different experts then
            have no common scale.

    Returns:
        `selector.gate` and `selector.up` (E * R, D), float32: for routing `selector: glu`,
        `selector_rank: R`.

    Raises:
        ValueError: an expert has fewer than `count` neurons.
    """
    index_EM = partition.experts_EM
    if not 1 <= count <= index_EM.shape[1]:
        raise ValueError(f"count {count} is not in 1..{index_EM.shape[1]}")
    nearest_ER = torch.argsort(distance_F[index_EM], dim=1, stable=True)[:, :count]
    rows = index_EM.gather(1, nearest_ER).flatten()
    gate, up = gate_FD[rows].float(), up_FD[rows].float()
    if normalise:
        gate, up = (torch.nn.functional.normalize(w, dim=1) for w in (gate, up))
    return {"selector.gate": gate, "selector.up": up}


def match_scale(
    selector: dict[str, Tensor], scores_TE: Tensor, norms_TE: Tensor
) -> dict[str, Tensor]:
    """Scale a "glu" or "spectral" selector so that each expert's mean score is its mean norm.

    A few neurons stand for their expert's course over tokens, not for its size.

    Args:
        selector: `selector.gate` and `selector.up`.
        scores_TE: what it says of calibration tokens.
        norms_TE: the experts' output norms on the same tokens.
    """
    ratio_E = norms_TE.double().mean(0) / scores_TE.double().mean(0).clamp_min(1e-30)
    up = selector["selector.up"]
    rank = len(up) // len(ratio_E)
    scaled = up.double() * ratio_E.repeat_interleave(rank)[:, None]
    return {**selector, "selector.up": scaled.float()}


def _selector(weight_ED: Tensor, bias_E: Tensor) -> dict[str, Tensor]:
    return {
        "selector.weight": weight_ED.to(torch.float32),
        "selector.bias": bias_E.to(torch.float32),
    }
