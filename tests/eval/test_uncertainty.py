"""Standard errors against resampling, which assumes none of the formulas."""

from __future__ import annotations

import math
import random

import pytest

from fissile.eval.uncertainty import mean_stderr, paired_log_ratio, ratio_stderr


def documents(count: int, seed: int) -> tuple[list[float], list[int]]:
    rng = random.Random(seed)
    counts = [rng.randrange(20, 400) for _ in range(count)]
    levels = [rng.gauss(3.0, 0.5) for _ in range(count)]
    return [level * n for level, n in zip(levels, counts, strict=True)], counts


def bootstrap(sums: list[float], counts: list[int], rounds: int = 4000) -> float:
    rng = random.Random(1)
    values = []
    for _ in range(rounds):
        chosen = rng.choices(range(len(sums)), k=len(sums))
        values.append(sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen))
    mean = sum(values) / rounds
    return math.sqrt(sum((v - mean) ** 2 for v in values) / rounds)


def test_ratio_stderr_agrees_with_the_bootstrap_over_documents() -> None:
    sums, counts = documents(60, seed=0)
    found = ratio_stderr(sums, counts)
    assert found is not None
    assert found == pytest.approx(bootstrap(sums, counts), rel=0.06)


def test_repeating_every_document_shrinks_the_error_by_root_two() -> None:
    sums, counts = documents(50, seed=3)
    once, twice = ratio_stderr(sums, counts), ratio_stderr(sums * 2, counts * 2)
    assert once is not None
    assert twice is not None
    # 50/49 and 100/99 are the small-sample factors.
    assert twice / once == pytest.approx(math.sqrt(0.5 * (100 / 99) / (50 / 49)), rel=1e-9)


def test_one_document_has_no_error_and_empty_ones_do_not_count() -> None:
    assert ratio_stderr([3.0], [2]) is None
    assert ratio_stderr([3.0, 0.0], [2, 0]) is None
    assert ratio_stderr([3.0, 4.0, 0.0], [2, 5, 0]) == ratio_stderr([3.0, 4.0], [2, 5])


def test_pairing_sees_a_difference_that_the_spread_between_documents_hides() -> None:
    sums, counts = documents(40, seed=5)
    rng = random.Random(2)
    worse = [s + n * (0.02 + rng.gauss(0, 0.005)) for s, n in zip(sums, counts, strict=True)]
    ratio, error = paired_log_ratio(worse, sums, counts)
    alone = ratio_stderr(sums, counts)
    assert error is not None
    assert alone is not None
    assert ratio == pytest.approx(0.02, abs=0.004)
    assert ratio > 5 * error
    assert ratio < alone
    assert paired_log_ratio(sums, worse, counts)[0] == pytest.approx(-ratio)


def test_unpaired_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        paired_log_ratio([1.0, 2.0], [1.0], [3, 4])


def test_mean_stderr_of_a_coin() -> None:
    values = [1.0] * 30 + [0.0] * 70
    assert mean_stderr(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert mean_stderr([1.0]) is None
