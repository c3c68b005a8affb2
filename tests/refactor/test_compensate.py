"""Compensation lowers the error it promises to lower, and refuses to raise it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fissile.refactor.compensate import Correction, corrections, is_held_out, mean_restore
from fissile.refactor.moments import Moments

S, D = 10, 6


def fit(
    h_TS: Tensor, r_TD: Tensor, train: int, *, constant: bool = True
) -> tuple[Correction, float, float]:
    """Best candidate on the last tokens, and the error there without and with it."""
    fitted = Moments(S, D)
    fitted.add(h_TS[:train], r_TD[:train])
    options = corrections(fitted, constant=constant)
    left = [option.left(h_TS[train:], r_TD[train:]) / (len(r_TD) - train) for option in options]
    best = min(range(len(options)), key=left.__getitem__)
    return options[best], left[0], left[best]


def test_a_predictable_residual_is_taken_over() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(4000, S, generator=rng, dtype=torch.float64) + 1
    a = torch.randn(D, S, generator=rng, dtype=torch.float64)
    noise = 0.1 * torch.randn(4000, D, generator=rng, dtype=torch.float64)
    r = h @ a.T + 2 + noise
    refit, before, after = fit(h, r, 3000)
    assert refit.kind == "full"
    assert refit.weight_DI is not None
    direct = (r[3000:] - h[3000:] @ refit.weight_DI.T - refit.bias_D).square().sum(1).mean()
    assert after == pytest.approx(direct.item(), rel=1e-9)
    assert before == pytest.approx(r[3000:].square().sum(1).mean().item(), rel=1e-9)
    assert after < 0.01 * before
    torch.testing.assert_close(refit.weight_DI, a, rtol=0.05, atol=0.05)


def test_an_unpredictable_residual_is_left_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(1030, S, generator=rng, dtype=torch.float64)
    r = torch.randn(1030, D, generator=rng, dtype=torch.float64)
    refit, before, after = fit(h, r, 30)  # so few tokens that fitting means fitting noise
    assert refit.kind == "none"
    assert after == before
    assert refit.weight_DI is None
    assert not refit.bias_D.any()


def test_a_constant_residual_needs_only_a_constant() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(1030, S, generator=rng, dtype=torch.float64)
    r = torch.randn(1030, D, generator=rng, dtype=torch.float64) + 5
    refit, before, after = fit(h, r, 30)
    assert refit.kind == "constant"
    assert refit.weight_DI is None
    torch.testing.assert_close(refit.bias_D, r[:30].mean(0))
    assert after < 0.1 * before


def test_architectures_without_bias() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.rand(4000, S, generator=rng, dtype=torch.float64)
    r = torch.full((4000, D), 5.0, dtype=torch.float64)
    refit, before, after = fit(h, r, 3000, constant=False)
    assert refit.kind == "full"
    assert not refit.bias_D.any()
    assert after < 0.2 * before  # the mean of h stands in for a constant


def test_inputs_of_another_scale_shrink_alike() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(2000, S, generator=rng, dtype=torch.float64)
    r = h @ torch.randn(D, S, generator=rng, dtype=torch.float64).T
    scale = torch.cat([torch.ones(S // 2), torch.full((S // 2,), 1e-4)]).double()
    moments, plain = Moments(S, D), Moments(S, D)
    moments.add(h * scale, r)
    plain.add(h, r)
    halves = [S // 2, S // 2]
    wanted, _ = plain.solve(0.1, blocks=halves)
    found, _ = moments.solve(0.1, blocks=halves)
    torch.testing.assert_close(found * scale, wanted)
    assert (moments.solve(0.1)[0] * scale - wanted).abs().max() > 0.1 * wanted.abs().max()


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
