"""Closed-form routers on planted rankings."""

from __future__ import annotations

import pytest
import torch

from fissile.refactor.layerwise import mean_gate_selector, ranking_targets, ridge_selector
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
