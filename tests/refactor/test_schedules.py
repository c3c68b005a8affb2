"""Schedules against the formulas of their papers, written out independently."""

from __future__ import annotations

import itertools
import random
from math import cos, pi
from statistics import median

import pytest

from fissile.refactor.schedules import Schedule, decay, learning_rate, refined_table

KINDS: tuple[Schedule, ...] = ("rex", "linear", "cosine", "uba")


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_formulas(p: float) -> None:
    assert decay(p, "rex") == pytest.approx((1 - p) / (0.5 + 0.5 * (1 - p)))
    assert decay(p, "linear") == pytest.approx(1 - p)
    assert decay(p, "cosine") == pytest.approx(0.5 * (1 + cos(pi * p)))
    for phi in (0.3, 1.0, 2.0, 4.0):
        uba = 2 * (1 + cos(pi * p)) / (2 * phi + (2 - phi) * (1 + cos(pi * p)))
        assert decay(p, "uba", phi) == pytest.approx(uba)


@pytest.mark.parametrize("kind", KINDS)
def test_from_peak_to_zero_without_rising(kind: Schedule) -> None:
    curve = [decay(i / 50, kind, 0.7) for i in range(51)]
    assert curve[0] == 1.0
    assert curve[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(curve))


def test_shapes_differ_where_they_should() -> None:
    at_half = [decay(0.5, "uba", phi) for phi in (0.2, 1.0, 2.0, 5.0)]
    assert at_half == sorted(at_half, reverse=True)
    assert decay(0.5, "uba", 2.0) == pytest.approx(decay(0.5, "cosine"))
    assert decay(0.5, "rex") == pytest.approx(2 / 3)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_constant_gradient_norms_refine_to_linear_decay_exactly(power: float) -> None:
    table = refined_table([3.7] * 40, power=power)
    for i in range(201):
        p = i / 200
        assert decay(p, "refined", table=table) == pytest.approx(decay(p, "linear"), abs=1e-12)


def test_refined_rates_are_those_of_the_paper() -> None:
    """eta_t = w_t sum_{s>t} w_s, w = smoothed norm ** -power, in plain loops."""
    dice = random.Random(3)
    norms = [dice.uniform(0.5, 4.0) for _ in range(30)]
    for power, smoothing in ((1.0, 0.2), (2.0, 0.2), (1.0, 0.0)):
        half = int(smoothing * 30 / 2)
        smooth = []
        for t in range(30):
            near = []
            for s in range(t - half, t + half + 1):
                # Before the run its first norm, after it the run mirrored.
                near.append(norms[0] if s < 0 else norms[s] if s < 30 else norms[59 - s])
            smooth.append(median(near))
        w = [g**-power for g in smooth]
        rates = [w[t] * sum(w[t + 1 :]) for t in range(30)]
        expected = [rate / max(rates) for rate in rates]
        got = refined_table(norms, power=power, smoothing=smoothing)
        assert got == pytest.approx(expected, abs=1e-12)


def test_a_refined_rate_rises_where_gradients_shrink() -> None:
    norms = [4.0] * 30 + [1.0] * 30
    table = refined_table(norms)
    assert max(table) == 1.0
    assert decay(0.25, "refined", table=table) < decay(0.6, "refined", table=table)


def test_learning_rate_warms_up_and_stays_above_the_floor() -> None:
    rates = [
        learning_rate(s / 20, peak=1.0, kind="linear", floor=0.1, warmup=0.2, stride=0.05)
        for s in range(20)
    ]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[19] == pytest.approx(0.1 + 0.9 / 16)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"progress 1\.5"):
        decay(1.5, "rex")
    with pytest.raises(ValueError, match="phi 0 must"):
        decay(0.5, "uba", 0)
    with pytest.raises(ValueError, match="schedule 'sqrt' is not one of rex, linear"):
        decay(0.5, "sqrt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup 1"):
        learning_rate(0.5, peak=1.0, warmup=1.0)
    with pytest.raises(ValueError, match="table of an earlier run"):
        decay(0.5, "refined")
    with pytest.raises(ValueError, match="all positive"):
        refined_table([1.0, 0.0])
