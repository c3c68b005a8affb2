"""Closed-form routers on planted rankings."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from fissile.models.routers_fissile import selector_scores
from fissile.refactor.fit import fit_selector
from fissile.refactor.layerwise import (
    centroid_distance,
    match_scale,
    mean_gate_selector,
    ranking_targets,
    representative_selector,
    ridge_selector,
)
from fissile.refactor.moments import Moments
from fissile.refactor.partition import random_partition

D, E, T = 16, 6, 4000


@pytest.mark.parametrize("kind", ["centred", "log"])
def test_targets_keep_the_order_of_each_token(kind: str) -> None:
    norms = torch.rand(50, E, generator=torch.Generator().manual_seed(0)) * 9 + 0.1
    targets = ranking_targets(norms, kind)  # type: ignore[arg-type]
    assert torch.equal(targets.argsort(1), norms.argsort(1))
    assert targets.sum(1).abs().max() < 1e-5
    # Tokens weigh by their norms in one kind, all alike in the other.
    louder = ranking_targets(norms * 10, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(louder, targets * (10 if kind == "centred" else 1))
    assert torch.equal(ranking_targets(norms, "absolute"), norms)


def test_targets_of_a_silent_expert_are_finite() -> None:
    norms = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert ranking_targets(norms, "log").isfinite().all()
    with pytest.raises(ValueError, match="kind 'rank' is not one of"):
        ranking_targets(norms, "rank")  # type: ignore[arg-type]


def test_ridge_selector_learns_a_linear_ranking() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2 * T, D, generator=rng) + 2
    truth = torch.randn(E, D, generator=rng)
    norms = (x - 2) @ truth.T + 30 + torch.rand(2 * T, 1, generator=rng) * 5
    moments = Moments(D, E)
    moments.add(x[:T], ranking_targets(norms[:T]))
    selector = ridge_selector(moments, 1e-4)
    assert selector["selector.weight"].shape == (E, D)
    logits = x[T:] @ selector["selector.weight"].T + selector["selector.bias"]
    agree = (logits.argmax(1) == norms[T:].argmax(1)).double().mean()
    assert agree > 0.99
    assert logits.std().item() == pytest.approx(1.0, abs=0.1)  # 2.4 before scaling


def test_mean_gate_selector_is_the_mean_of_gate_rows() -> None:
    gate = torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    partition = random_partition(torch.rand(30), shared_size=6, num_experts=4, seed=0)
    selector = mean_gate_selector(gate, partition)
    for e, index in enumerate(partition.expert_indices()):
        torch.testing.assert_close(selector["selector.weight"][e], gate[index].mean(0))
    assert selector["selector.bias"].tolist() == [0.0] * 4


def test_representatives_are_the_neurons_nearest_the_middle() -> None:
    rng = torch.Generator().manual_seed(0)
    gate, up, features = (torch.randn(30, n, generator=rng) for n in (D, D, 5))
    partition = random_partition(torch.rand(30), shared_size=6, num_experts=4, seed=0)
    distance = centroid_distance(features, partition)
    assert bool(distance[partition.shared].isinf().all())
    selector = representative_selector(gate, up, partition, distance, count=2, normalise=True)
    x = torch.randn(20, D, generator=rng)
    weights = {k.removeprefix("selector."): v for k, v in selector.items()}
    found = selector_scores("glu", weights, x, 4, torch.relu)
    for e, index in enumerate(partition.expert_indices()):
        middle = features[index].double().mean(0)
        ranked = sorted(index.tolist(), key=lambda i: float((features[i].double() - middle).norm()))
        want = torch.zeros(20)
        for i in ranked[:2]:
            g, u = gate[i] / gate[i].norm(), up[i] / up[i].norm()
            want += (torch.relu(x @ g) * (x @ u)).abs() / 2
        torch.testing.assert_close(found[:, e], want)
    norms = torch.rand(20, 4, generator=rng)
    scaled = match_scale(selector, found, norms)
    weights = {k.removeprefix("selector."): v for k, v in scaled.items()}
    matched = selector_scores("glu", weights, x, 4, torch.relu)
    torch.testing.assert_close(matched.mean(0), norms.mean(0))
    torch.testing.assert_close(matched, found * (norms.mean(0) / found.mean(0)))
    with pytest.raises(ValueError, match=r"count 7 is not in 1\.\.6"):
        representative_selector(gate, up, partition, distance, count=7)


def planted(kind: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Norms that a linear router ranks well but regression does not, being heavy-tailed."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=rng) @ torch.randn(D, D, generator=rng) + 1
    truth = torch.randn(E, D, generator=rng) / 4
    norms = (x @ truth.T + 0.2 * torch.randn(T, E, generator=rng)).exp()
    moments = Moments(D, E)
    moments.add(x, ranking_targets(norms))
    start = ridge_selector(moments, 1e-2 if kind == "ridge" else 1e3)
    return x, norms, start


@pytest.mark.parametrize("loss", ["membership", "threshold", "listwise"])
def test_the_fit_reaches_the_minimum(
    loss: Literal["membership", "threshold", "listwise"],
) -> None:
    """The objective, written down once more, is flat at the answer; being convex, that is all."""
    penalty = 1e-2
    x, norms, start = planted("flat")
    held = torch.arange(T) % 4 == 3
    found = fit_selector(
        start,
        x,
        norms,
        held,
        top_k=2,
        loss=loss,
        steps=200,
        penalty=penalty,
    )
    assert found.recall_after > found.recall_before + 0.05
    assert found.loss_after < 0.9 * found.loss_before
    xf, nf = x[~held].double(), norms[~held].double()
    root = torch.linalg.cholesky(torch.cov(xf.T, correction=0))
    w0 = start["selector.weight"].double()

    def objective(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        logits = xf @ w.T + b
        if loss == "listwise":
            target = nf - nf.mean(1, keepdim=True)
            p = (target / target.std() / 0.5).softmax(1)
            value = (p * (p.clamp_min(1e-300).log() - logits.log_softmax(1))).sum(1).mean()
        else:
            member = torch.zeros_like(nf).scatter_(1, nf.topk(2).indices, 1.0)
            if loss == "threshold":
                member = (nf >= nf.flatten().topk(2 * len(nf)).values[-1]).double()
            value = -(torch.where(member > 0, logits, -logits).sigmoid().log()).sum(1).mean()
        return value + penalty * ((w - w0) @ root).square().sum()

    slopes = []
    for tensors in (start, found.tensors):
        w, b = (tensors[f"selector.{n}"].double().requires_grad_() for n in ("weight", "bias"))
        value = objective(w, b)
        value.backward()
        assert w.grad is not None
        assert b.grad is not None
        slopes.append(float((w.grad @ torch.linalg.inv(root).T).norm() + b.grad.norm()))
    assert value.item() == pytest.approx(found.loss_after, abs=2e-3)
    assert slopes[1] < 0.01 * slopes[0]


def test_a_fit_that_does_not_help_is_dropped() -> None:
    """With few tokens the fit learns them by heart, and the start is kept."""
    x, norms, start = planted("ridge")
    held = torch.arange(T) >= 30
    found = fit_selector(start, x, norms, held, top_k=2, penalty=0.0)
    assert found.recall_after < found.recall_before
    assert found.tensors is start
    with pytest.raises(ValueError, match="held-out tokens"):
        fit_selector(start, x, norms, torch.zeros(T, dtype=torch.bool), top_k=2)
    with pytest.raises(ValueError, match="loss 'hinge'"):
        fit_selector(start, x, norms, held, top_k=2, loss="hinge")  # type: ignore[arg-type]
