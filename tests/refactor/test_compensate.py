"""Compensation lowers the error it promises to lower, and refuses to raise it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fissile.refactor.compensate import Refit, is_held_out, mean_restore, refit_shared
from fissile.refactor.moments import Moments

S, D = 10, 6


def fit(h_TS: Tensor, r_TD: Tensor, train: int, **settings: bool) -> tuple[Refit, Tensor]:
    """Refit on the first tokens; also the true held-out error of what it returns."""
    fitted, held = Moments(S, D), Moments(S, D)
    fitted.add(h_TS[:train], r_TD[:train])
    held.add(h_TS[train:], r_TD[train:])
    refit = refit_shared(fitted, held, ridge=1e-2, **settings)
    left = r_TD[train:] - h_TS[train:] @ refit.delta_DS.T - refit.bias_D
    return refit, left.square().sum(1).mean()


def test_a_predictable_residual_is_taken_over() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(4000, S, generator=rng, dtype=torch.float64) + 1
    a = torch.randn(D, S, generator=rng, dtype=torch.float64)
    noise = 0.1 * torch.randn(4000, D, generator=rng, dtype=torch.float64)
    r = h @ a.T + 2 + noise
    refit, direct = fit(h, r, 3000)
    assert refit.kind == "full"
    assert refit.error_after == pytest.approx(direct.item(), rel=1e-9)
    assert refit.error_before == pytest.approx(r[3000:].square().sum(1).mean().item(), rel=1e-9)
    assert refit.error_after < 0.01 * refit.error_before
    torch.testing.assert_close(refit.delta_DS, a, rtol=0.05, atol=0.05)


def test_an_unpredictable_residual_is_left_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(1030, S, generator=rng, dtype=torch.float64)
    r = torch.randn(1030, D, generator=rng, dtype=torch.float64)
    refit, _ = fit(h, r, 30)  # so few tokens that fitting means fitting noise
    assert refit.kind == "none"
    assert refit.error_after == refit.error_before
    assert not refit.delta_DS.any()
    assert not refit.bias_D.any()


def test_a_constant_residual_needs_only_a_constant() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(1030, S, generator=rng, dtype=torch.float64)
    r = torch.randn(1030, D, generator=rng, dtype=torch.float64) + 5
    refit, direct = fit(h, r, 30)
    assert refit.kind == "constant"
    assert not refit.delta_DS.any()
    torch.testing.assert_close(refit.bias_D, r[:30].mean(0))
    assert refit.error_after == pytest.approx(direct.item(), rel=1e-9)
    assert refit.error_after < 0.1 * refit.error_before


def test_architectures_without_bias() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.rand(4000, S, generator=rng, dtype=torch.float64)
    r = torch.full((4000, D), 5.0, dtype=torch.float64)
    refit, direct = fit(h, r, 3000, constant=False)
    assert refit.kind == "full"
    assert not refit.bias_D.any()
    assert refit.error_after == pytest.approx(direct.item(), rel=1e-9)
    assert refit.error_after < 0.2 * refit.error_before  # the mean of h stands in for a constant


def test_mean_restore_leaves_the_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(500, 20, generator=rng, dtype=torch.float64) + torch.arange(20)
    down = torch.randn(D, 20, generator=rng, dtype=torch.float64)
    dropped = torch.tensor([2, 5, 11, 19])
    lost = h[:, dropped] @ down[:, dropped].T
    bias = mean_restore(h.mean(0), down, dropped)
    torch.testing.assert_close(bias, lost.mean(0))
    error = (lost - bias).square().sum(1).mean()
    assert error.item() == pytest.approx(lost.var(0, correction=0).sum().item())


def test_every_eighth_window_is_held_out() -> None:
    assert [w for w in range(20) if is_held_out(w)] == [7, 15]
