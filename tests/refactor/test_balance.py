"""Thresholds against sorting by hand; biases against the loads that they are to even out."""

from __future__ import annotations

import pytest
import torch

from fissile.models.routers_fissile import choose
from fissile.refactor.balance import balance_bias, calibrate_threshold

T, E, K = 2000, 8, 2


def skewed() -> torch.Tensor:
    scores = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    return scores + torch.linspace(1.5, -1.5, E)


@pytest.mark.parametrize("mean_k", [0.7, 2.0, 3.3])
def test_threshold_is_a_quantile_of_all_scores(mean_k: float) -> None:
    scores = skewed()
    found = calibrate_threshold(scores, mean_k)
    want = torch.quantile(scores.flatten().double(), 1 - mean_k / E)
    assert found == pytest.approx(float(want), abs=5e-3)


@pytest.mark.parametrize("max_k", [3, E])
def test_threshold_gives_the_mean_number_at_run_time(max_k: int) -> None:
    scores = skewed()
    threshold = calibrate_threshold(scores, K, max_k)
    _, weights = choose(scores, max_k, False, threshold=threshold)
    counts = weights.sum(1)
    assert counts.sum().item() == K * T
    assert counts.max() <= max_k
    assert len(counts.unique()) > 2
    # Without regard to the cap, tokens that want more than it allows would be taken short.
    if max_k == 3:
        assert threshold < calibrate_threshold(scores, K)


def test_threshold_that_cannot_be() -> None:
    for scores, mean_k, max_k in ((skewed(), 4, 3), (skewed(), 0, None), (skewed()[:0], 2, None)):
        with pytest.raises(ValueError, match="tokens, mean_k"):
            calibrate_threshold(scores, mean_k, max_k)


def test_bias_evens_out_the_load_of_the_choices_made_at_run_time() -> None:
    scores = skewed()
    found = balance_bias(scores, K)
    index, _ = choose(scores, K, False)
    load = torch.bincount(index.flatten(), minlength=E) * (E / (T * K))
    assert found.imbalance_before == pytest.approx(float(load.max()), rel=1e-5)
    assert found.imbalance_before > 2
    index, _ = choose(scores, K, False, balance_E=found.bias_E)
    load = torch.bincount(index.flatten(), minlength=E) * (E / (T * K))
    assert found.imbalance_after == pytest.approx(float(load.max()), rel=1e-5)
    assert found.imbalance_after < 1.3
    assert found.bias_E.sum().abs() < 1e-4
    assert found.mass_loss == 0.0


def test_bias_stops_at_the_tolerance() -> None:
    scores = skewed()
    norms = (scores / 2).exp()
    found = balance_bias(scores, K, norms_TE=norms, tolerance=0.01)
    plain, biased = (
        norms.gather(1, choose(scores, K, False, balance_E=b)[0]).sum()
        for b in (None, found.bias_E)
    )
    assert found.mass_loss == pytest.approx(float(1 - biased / plain), abs=1e-5)
    assert 0.005 < found.mass_loss <= 0.01
    assert 1.3 < found.imbalance_after < found.imbalance_before
    assert balance_bias(scores, K, norms_TE=norms, tolerance=1.0).imbalance_after < 1.3


def test_an_even_load_is_left_alone() -> None:
    scores = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    found = balance_bias(scores, K)
    assert found.steps == 0
    assert bool((found.bias_E == 0).all())
