"""Once for all: the wave of means, the draw of widths, updates of low rank, the search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tests.quant import layers

from fissile.errors import UsageError
from fissile.quant.baselines import rtn
from fissile.quant.once import draw, mean_bits, search, width_shares
from fissile.quant.soft import SoftFloats

WIDTHS = (2, 3, 4)


def test_the_mean_falls_and_rises() -> None:
    wave = [mean_bits(t, 8, WIDTHS) for t in range(17)]
    assert wave == [4, 3.5, 3, 2.5, 2, 2.5, 3, 3.5] * 2 + [4]


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 4), (2, 3, 4, 8)])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_shares_have_the_mean_and_the_largest_entropy(widths: tuple[int, ...], part: float) -> None:
    mean = widths[0] + part * (widths[-1] - widths[0])
    found = np.array(width_shares(mean, widths))
    assert found.sum() == pytest.approx(1)
    assert found @ np.array(widths) == pytest.approx(mean, abs=1e-6)

    def negative_entropy(p: np.ndarray) -> float:
        return float(sum(x * math.log(max(x, 1e-12)) for x in p))

    # A general optimiser under the same constraints finds nothing better.
    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1},
        {"type": "eq", "fun": lambda p: p @ np.array(widths) - mean},
    ]
    start = np.full(len(widths), 1 / len(widths))
    best = minimize(negative_entropy, start, bounds=[(0, 1)] * len(widths), constraints=constraints)
    assert negative_entropy(found) <= best.fun + 1e-4
    if 0 < part < 1:
        assert (found > 1e-6).all()


def test_no_distribution_has_a_mean_outside() -> None:
    with pytest.raises(ValueError, match="mean 4"):
        width_shares(4.5, WIDTHS)


def test_draws_follow_the_shares() -> None:
    names = [str(i) for i in range(4000)]
    drawn = draw(names, WIDTHS, 2.6, torch.Generator().manual_seed(0))
    assert drawn.keys() == set(names)
    shares = width_shares(2.6, WIDTHS)
    for bits, share in zip(WIDTHS, shares, strict=True):
        count = sum(k == bits for k in drawn.values())
        assert count / 4000 == pytest.approx(share, abs=4 * math.sqrt(share / 4000))
    assert set(draw(names, WIDTHS, 2.0, torch.Generator()).values()) == {2}


def test_an_update_of_low_rank_merges_into_the_zeros() -> None:
    nested = rtn(layers.weight(2, 16, 128), 3, 32)
    soft = SoftFloats(nested, rank=2, generator=torch.Generator().manual_seed(0))
    # Untrained it changes nothing.
    assert torch.allclose(soft.dense(3), nested.dequantize(3), atol=1e-6)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
    left, right = (x.detach().double() for x in soft.factors[3])
    assert left.shape == (2, 16, 2)
    assert right.shape == (2, 2, 4)
    # In units of half a step: a quarter at 4 bits, one at 2.
    change = nested.scale[3].double() / 2 * torch.einsum("eor,erg->eog", left, right)
    expected = nested.dequantize(3).double() + change.repeat_interleave(32, dim=-1)
    assert torch.allclose(soft.dense(3).double(), expected, atol=1e-6)
    made = soft.finish()
    assert torch.equal(made.scale[3], nested.scale[3])
    assert torch.allclose(made.dequantize(3).double(), expected, atol=1e-3)
    assert (change.abs() > 0.001).any()
    soft.revert(3)
    assert torch.allclose(soft.dense(3), nested.dequantize(3), atol=1e-6)


# Names, with what a lost bit costs; the first four matter.
COST = {f"w{i}": (3.0, 1.5, 0.8, 0.4, 0.0, 0.0)[i] for i in range(6)}
SIZES = {name: {k: (100 + 20 * i) * k for k in WIDTHS} for i, name in enumerate(COST)}


def loss(bits: dict[str, int]) -> float:
    """A loss that falls fourfold with every bit."""
    return sum(COST[name] * 4.0 ** (2 - k) for name, k in bits.items())


@pytest.mark.parametrize("bits", [2.3, 2.7, 3.2])
def test_the_search_finds_what_all_mixes_hold(bits: float) -> None:
    budget = int(bits * sum(own[2] for own in SIZES.values()) / 2)
    found = search(loss, SIZES, budget, samples=40, finalists=30, seed=0)  # type: ignore[arg-type]
    assert found.bytes == sum(SIZES[name][k] for name, k in found.bits.items())
    assert found.bytes <= budget
    assert found.loss == loss(found.bits)
    every = (
        dict(zip(COST, mix, strict=True)) for mix in itertools.product(WIDTHS, repeat=len(COST))
    )
    fitting = [m for m in every if sum(SIZES[n][k] for n, k in m.items()) <= budget]
    best, start = min(map(loss, fitting)), loss(dict.fromkeys(COST, 2))
    # Of what there is to gain, nearly all.
    assert start - found.loss >= 0.93 * (start - best)
    assert found.gain["w0"] > found.gain["w1"] > found.gain["w2"]
    # Seeds decide, nothing else.
    again = search(loss, SIZES, budget, samples=40, finalists=30, seed=0)  # type: ignore[arg-type]
    assert again == found


def test_a_budget_below_the_narrowest_is_refused() -> None:
    with pytest.raises(UsageError, match="narrowest widths take"):
        search(lambda _: 0.0, SIZES, 10, samples=2, finalists=2, seed=0)
