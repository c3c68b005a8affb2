"""Thresholds for a varying number of experts, and biases for an even load; functions of scores.

Shapes: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.refactor.oracle import chosen_mask, top_experts


def calibrate_threshold(scores_TE: Tensor, mean_k: float, max_k: int | None = None) -> float:
    """The score above which experts are taken so that a token takes `mean_k` in the mean.

    Without a cap it is the (1 - k/E) quantile of all scores of the layer. A cap makes tokens lose
    experts, so the threshold is then that of the scores that may still be taken.

    Args:
        scores_TE: what the router says of tokens on the converted model's own path, any balance
            bias added; recalibrate layer by layer, each on the outputs of the finished ones.
        mean_k: experts per token, in (0, max_k].
        max_k: most experts of one token, default E.

    Returns:
        A score: expert e is taken where score >= threshold.

    Raises:
        ValueError: `mean_k` cannot be met, or there are no tokens.
    """
    tokens, experts = scores_TE.shape
    most = experts if max_k is None else max_k
    if not tokens or not 1 <= most <= experts or not 0 < mean_k <= most:
        raise ValueError(f"{tokens} tokens, mean_k {mean_k:g} of at most {most} of {experts}")
    open_TK = torch.topk(scores_TE, most, dim=1).values
    count = max(1, round(mean_k * tokens))
    return float(open_TK.flatten().sort(descending=True).values[count - 1])


@dataclass(frozen=True, eq=False)
class Balance:
    """A load-balance bias and what it costs.

    Attributes:
        bias_E: added to the scores for the choice, float32, zero in the mean.
        imbalance_before: largest load over mean load without it.
        imbalance_after: the same with it.
        mass_loss: share of the output norms captured without it that are lost; 0.0 without norms.
        steps: updates made.
    """

    bias_E: Tensor
    imbalance_before: float
    imbalance_after: float
    mass_loss: float
    steps: int


def balance_bias(
    scores_TE: Tensor,
    top_k: int,
    *,
    norms_TE: Tensor | None = None,
    step: float = 1e-3,
    target: float = 1.3,
    tolerance: float = 0.02,
    max_steps: int = 2000,
) -> Balance:
    """Move choices from busy experts to idle ones: b_e += step * sign(mean load - load_e).

    Stops when the largest load is below `target` times the mean, or when the next bias would lose
    more than `tolerance` of what the unbiased choice captures.

    Args:
        scores_TE: what the router says of calibration tokens.
        top_k: experts per token.
        norms_TE: the experts' output norms, by which the loss is judged.
        step: in units of the scores' standard deviation within a token.
        target: largest load over mean load to reach.
        tolerance: largest share of the captured norms to give up.
        max_steps: bound on the updates.
    """
    scores = scores_TE.float()
    tokens, experts = scores.shape
    scale = float((scores - scores.mean(1, keepdim=True)).square().mean().sqrt())
    captured: list[float] = []

    def loads(bias_E: Tensor) -> tuple[Tensor, float]:
        """Load of every expert over the mean load, and the share of mass that is lost."""
        chosen_TE = chosen_mask(top_experts(scores + bias_E, top_k), experts)
        if norms_TE is not None:
            captured.append(float((norms_TE * chosen_TE).double().sum()))
        lost = 1 - captured[-1] / captured[0] if captured and captured[0] > 0 else 0.0
        return chosen_TE.sum(0) * (experts / (tokens * top_k)), lost

    best_E, lost, steps = torch.zeros(experts), 0.0, 0
    load_E, _ = loads(best_E)
    before = after = float(load_E.max())
    while after >= target and steps < max_steps:
        bias_E = best_E + step * scale * torch.sign(1 - load_E)
        next_E, next_lost = loads(bias_E)
        if next_lost > tolerance:
            break
        best_E, load_E, lost, after = bias_E, next_E, next_lost, float(next_E.max())
        steps += 1
    # A bias that is equal for all experts changes no choice, but it would move a threshold.
    return Balance(best_E - best_E.mean(), before, after, lost, steps)
