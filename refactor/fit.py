"""A convex fit of a linear router from a closed-form start: it ranks, where ridge regresses.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fissile.refactor.balance import calibrate_threshold
from fissile.refactor.layerwise import ranking_targets
from fissile.refactor.oracle import chosen_mask, top_experts

Loss = Literal["membership", "threshold", "listwise"]
_ROWS = 8192
"""Tokens per product."""


@dataclass(frozen=True, eq=False)
class FittedSelector:
    """Outcome of a fit.

    Attributes:
        tensors: `selector.weight` (E, D) and `selector.bias` (E), float32: the start's or the
            fit's, whichever finds more of the oracle's experts on held-out tokens.
        recall_before: share of the oracle's choices that the start finds on held-out tokens.
        recall_after: the same of the fit.
        loss_before: objective per token before the first step, nats.
        loss_after: after the last.
    """

    tensors: dict[str, Tensor]
    recall_before: float
    recall_after: float
    loss_before: float
    loss_after: float


def fit_selector(
    start: dict[str, Tensor],
    x_TD: Tensor,
    norms_TE: Tensor,
    held_T: Tensor,
    *,
    top_k: int,
    loss: Loss = "membership",
    temperature: float = 0.5,
    steps: int = 100,
    penalty: float = 1e-3,
) -> FittedSelector:
    """Move a linear router from its closed-form start to the minimum of a convex ranking loss.

    "membership" is the logistic loss of whether the oracle chooses an expert: its minimiser ranks
    experts by their probability of being chosen, which is what recall asks for. "threshold" is the
    same for an oracle that takes the K*T largest norms of all tokens, not K of each: for routers
    with a threshold, judged by the same number of largest scores. "listwise" is
    KL(softmax(target / temperature) || softmax(logits)) with `ranking_targets` of unit deviation.
    Full-batch L-BFGS in the coordinates in which the inputs are white; tokens pass in chunks.

    Args:
        start: `selector.weight` (E, D), `selector.bias` (E), e.g. of `ridge_selector`.
        x_TD: the FFN's inputs, any float dtype (bfloat16 halves the memory of a large sample).
        norms_TE: the experts' output norms.
        held_T: bool (T,), tokens that decide between start and fit and are not fitted.
        top_k: experts per token.
        loss: see above.
        temperature: of the listwise targets.
        steps: most iterations of L-BFGS; two to three passes over the tokens each.
        penalty: of the squared distance from the start in the white coordinates, per expert.

    Raises:
        ValueError: nothing is held out or nothing is left to fit, or an unknown loss.
    """
    if not bool(held_T.any()) or bool(held_T.all()):
        raise ValueError("a fit needs tokens to learn from and held-out tokens to be judged by")
    x_fit, norms_fit = x_TD[~held_T], norms_TE[~held_T]
    targets = _targets(norms_fit, loss, top_k, temperature)
    fitted, losses = _minimise(start, x_fit, targets, loss, steps, penalty)
    before, after = (
        _recall(s, x_TD[held_T], norms_TE[held_T], top_k, loss) for s in (start, fitted)
    )
    better = fitted if after > before else start
    return FittedSelector(better, before, after, losses[0], min(losses))


def _minimise(
    start: dict[str, Tensor],
    x_TD: Tensor,
    targets_TE: Tensor,
    loss: Loss,
    steps: int,
    penalty: float,
) -> tuple[dict[str, Tensor], list[float]]:
    """The router of least loss, and the objective at every evaluation."""
    whiten_DD, mean_D = _whitening(x_TD)
    weight, bias = start["selector.weight"].double(), start["selector.bias"].double()
    # x W' + b = (x - mean) Z V' + c with W = V Z', Z Z' the inverse covariance.
    anchor_ED = torch.linalg.solve(whiten_DD, weight.T).T
    v_ED = anchor_ED.clone().requires_grad_()
    c_E = (bias + weight @ mean_D).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [v_ED, c_E],
        max_iter=steps,
        max_eval=3 * steps,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-9,
    )
    losses: list[float] = []

    def closure() -> float:
        w_ED = v_ED.detach() @ whiten_DD.T
        b_E = c_E.detach() - w_ED @ mean_D
        value, grad_ED, grad_E = _objective(x_TD, targets_TE, w_ED, b_E, loss)
        gap_ED = v_ED.detach() - anchor_ED
        v_ED.grad = (grad_ED - torch.outer(grad_E, mean_D)) @ whiten_DD + 2 * penalty * gap_ED
        c_E.grad = grad_E
        losses.append(value + penalty * float(gap_ED.square().sum()))
        return losses[-1]

    optimiser.step(closure)
    w_ED = v_ED.detach() @ whiten_DD.T
    bias_E = c_E.detach() - w_ED @ mean_D
    return {"selector.weight": w_ED.float(), "selector.bias": bias_E.float()}, losses


def _targets(norms_TE: Tensor, loss: Loss, top_k: int, temperature: float) -> Tensor:
    if loss == "membership":
        return chosen_mask(top_experts(norms_TE, top_k), norms_TE.shape[1]).float()
    if loss == "threshold":
        return _above(norms_TE, top_k).float()
    if loss != "listwise":
        raise ValueError(f"loss {loss!r} is not one of membership, threshold, listwise")
    targets = ranking_targets(norms_TE)
    return torch.softmax(targets / targets.std().clamp_min(1e-12) / temperature, dim=1)


def _whitening(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Z (D, D) with Z Z' = Cov(x)^-1 (damped), and the mean of x (D,), float64."""
    mean = torch.stack([x.double().sum(0) for x in x_TD.split(_ROWS)]).sum(0) / len(x_TD)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=x_TD.device)
    for x in x_TD.split(_ROWS):
        centred = (x.double() - mean).float()
        covariance += (centred.T @ centred).double() / len(x_TD)
    damping = 1e-4 * covariance.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(mean), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(covariance + damping * eye)
    return torch.linalg.solve_triangular(factor, eye, upper=False).T, mean


def _objective(
    x_TD: Tensor, targets_TE: Tensor, w_ED: Tensor, b_E: Tensor, loss: Loss
) -> tuple[float, Tensor, Tensor]:
    """Loss per token and its gradients for the weight (E, D) and the bias (E,), float64."""
    value, grad_ED, grad_E = 0.0, torch.zeros_like(w_ED), torch.zeros_like(b_E)
    for x, target in zip(x_TD.split(_ROWS), targets_TE.split(_ROWS), strict=True):
        x = x.float()
        logits = x @ w_ED.float().T + b_E.float()
        if loss != "listwise":
            excess = torch.sigmoid(logits) - target
            each = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        else:
            log_q = torch.log_softmax(logits, dim=1)
            excess = log_q.exp() - target
            each = nn.functional.kl_div(log_q, target, reduction="sum")
        value += float(each)
        grad_ED += (excess.T @ x).double()
        grad_E += excess.double().sum(0)
    return value / len(x_TD), grad_ED / len(x_TD), grad_E / len(x_TD)


def _above(scores_TE: Tensor, mean_k: int) -> Tensor:
    """bool (T, E): the K*T largest of all scores."""
    return scores_TE >= calibrate_threshold(scores_TE, mean_k)


def _recall(
    selector: dict[str, Tensor], x_TD: Tensor, norms_TE: Tensor, top_k: int, loss: Loss
) -> float:
    rows = [
        x.float() @ selector["selector.weight"].T + selector["selector.bias"]
        for x in x_TD.split(_ROWS)
    ]
    masks = []
    for scores in (torch.cat(rows), norms_TE):
        fixed = chosen_mask(top_experts(scores, top_k), scores.shape[1])
        masks.append(_above(scores, top_k) if loss == "threshold" else fixed)
    return float((masks[0] & masks[1]).sum() / masks[1].sum())
