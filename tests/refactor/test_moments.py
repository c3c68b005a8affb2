"""Streamed least squares against direct solutions on the whole data."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fissile.refactor.moments import Moments, gram

WIDE, OUT, T = 9, 4, 400


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(T, WIDE, generator=rng, dtype=torch.float64) + torch.arange(WIDE)
    a = torch.randn(OUT, WIDE, generator=rng, dtype=torch.float64)
    y = x @ a.T + 3 + torch.randn(T, OUT, generator=rng, dtype=torch.float64)
    return x, y


def streamed(x: Tensor, y: Tensor, *cuts: int) -> Moments:
    moments = Moments(WIDE, OUT)
    bounds = [0, *cuts, len(x)]
    for begin, end in itertools.pairwise(bounds):
        moments.add(x[begin:end], y[begin:end])
    return moments


def test_without_ridge_it_is_least_squares(pairs: tuple[Tensor, Tensor]) -> None:
    x, y = pairs
    moments = streamed(x, y, 10, 200)
    ones = torch.cat([x, torch.ones(T, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(ones, y).solution.T
    weight, bias = moments.solve(1e-12)
    torch.testing.assert_close(weight, expected[:, :WIDE], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(bias, expected[:, WIDE], rtol=1e-8, atol=1e-8)
    weight, bias = moments.solve(1e-12, constant=False)
    torch.testing.assert_close(weight, torch.linalg.lstsq(x, y).solution.T, rtol=1e-8, atol=1e-8)
    assert torch.equal(bias, torch.zeros(OUT, dtype=torch.float64))


def test_ridge_is_least_squares_with_extra_rows(pairs: tuple[Tensor, Tensor]) -> None:
    x, y = pairs
    mean = x.mean(0)
    penalty = 0.3 * (x - mean).square().mean()
    rows = torch.cat([x - mean, (penalty * T).sqrt() * torch.eye(WIDE, dtype=torch.float64)])
    targets = torch.cat([y - y.mean(0), torch.zeros(WIDE, OUT, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    weight, bias = streamed(x, y, 33).solve(0.3)
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, y.mean(0) - expected @ mean, rtol=1e-9, atol=1e-9)


def test_error_is_the_mean_squared_residual(pairs: tuple[Tensor, Tensor]) -> None:
    x, y = pairs
    moments = streamed(x, y, 7)
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, WIDE, generator=rng, dtype=torch.float64)
    bias = torch.randn(OUT, generator=rng, dtype=torch.float64)
    direct = {
        (None, None): y,
        (None, 1): y - bias,
        (1, None): y - x @ weight.T,
        (1, 1): y - x @ weight.T - bias,
    }
    for (with_weight, with_bias), left in direct.items():
        found = moments.error(weight if with_weight else None, bias if with_bias else None)
        assert found == pytest.approx(left.square().sum(1).mean().item(), rel=1e-9)


def test_merge_and_state(pairs: tuple[Tensor, Tensor]) -> None:
    x, y = pairs
    whole, left, right = streamed(x, y), streamed(x[:150], y[:150]), streamed(x[150:], y[150:])
    merged = Moments(WIDE, OUT)
    merged.merge(Moments.from_state(left.state()))
    merged.merge(right)
    merged.merge(Moments(WIDE, OUT))
    assert merged.count == T
    for found, expected in zip(merged.solve(1e-3), whole.solve(1e-3), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert merged.error() == pytest.approx(whole.error(), rel=1e-12)
    assert left.count == 150


def test_float32_beside_a_large_mean() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5000, WIDE, generator=rng) + 1000
    a = torch.randn(OUT, WIDE, generator=rng)
    y = (x - 1000) @ a.T + 0.01 * torch.randn(5000, OUT, generator=rng)
    weight, _ = streamed(x, y, 100).solve(1e-9)
    torch.testing.assert_close(weight, a.double(), rtol=2e-3, atol=2e-3)


def test_extremes() -> None:
    constant = Moments(3, 2)
    constant.add(torch.full((10, 3), 4.0), torch.tensor([[1.0, 2.0]]).expand(10, -1))
    weight, bias = constant.solve(0.1)
    assert torch.equal(weight, torch.zeros(2, 3, dtype=torch.float64))
    assert bias.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="no tokens"):
        Moments(3, 2).solve(0.1)
    with pytest.raises(ValueError, match="ridge 0 must be positive"):
        constant.solve(0)
    with pytest.raises(ValueError, match="do not match"):
        constant.add(torch.zeros(4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        constant.add(torch.full((4, 3), torch.inf), torch.zeros(4, 2))


@pytest.mark.parametrize("width", [1, 512, 1100])
def test_gram_is_the_product_with_its_transpose(width: int) -> None:
    x = torch.randn(30, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-12, atol=1e-12)
