"""Widths under a budget: the best there are, kept until others are clearly better."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from fissile.errors import UsageError
from fissile.serve.widths import BudgetWidths

WIDTHS = (2, 3, 4)
SIZES = (8, 4, 4)  # bytes of the planes of one expert
BASE = 4 * SIZES[0]


class Files:
    """Four experts in one layer."""

    folder, layers, num_experts = "artifact", 1, 4

    def planes_of(self, bits: int) -> int:
        return WIDTHS.index(bits) + 1

    def size(self, key: tuple[int, int, int]) -> int:
        return SIZES[key[2]]

    def total_bytes(self, planes: int) -> int:
        return self.num_experts * sum(SIZES[:planes])


def widths(budget: int, **options: Any) -> BudgetWidths:
    return BudgetWidths(Files(), WIDTHS, budget, decay=0.5, **options)  # type: ignore[arg-type]


def bits(found: BudgetWidths) -> list[int]:
    return [found.bits(0, expert) for expert in range(4)]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_widths_of_the_budget_remove_more_error(seed: int) -> None:
    rng = random.Random(seed)
    use = {expert: rng.randint(1, 100) for expert in range(4)}
    budget = BASE + 4 * rng.randint(0, 8)
    found = widths(budget)
    found.observe(0, use)
    found.update()

    def error(chosen: tuple[int, ...]) -> float:
        return sum(use[e] * 3.5 ** -WIDTHS[level] for e, level in enumerate(chosen))

    def cost(chosen: tuple[int, ...]) -> int:
        return sum(sum(SIZES[: level + 1]) for level in chosen)

    best = min(error(c) for c in product(range(3), repeat=4) if cost(c) <= budget)
    ours = tuple(WIDTHS.index(width) for width in bits(found))
    assert cost(ours) <= budget
    assert error(ours) == pytest.approx(best)


def test_experts_of_like_use_do_not_take_turns() -> None:
    steady, restless = widths(BASE + 4), widths(BASE + 4, hysteresis=1.0)
    for one in (steady, restless):
        one.observe(0, {0: 50, 1: 49, 2: 1, 3: 1})
        assert one.update() == []
        assert bits(one) == [3, 2, 2, 2]
        one.observe(0, {0: 49, 1: 53, 2: 1, 3: 1})
    assert restless.update() == [(0, 0, 1)]
    assert bits(restless) == [2, 3, 2, 2]
    assert steady.update() == []
    assert bits(steady) == [3, 2, 2, 2]
    for _ in range(3):
        steady.observe(0, {0: 30, 1: 60, 2: 1, 3: 1})
    assert steady.update() == [(0, 0, 1)]
    assert bits(steady) == [2, 3, 2, 2]


def test_planes_that_are_given_up_come_from_the_top() -> None:
    one = widths(BASE + 8)
    one.observe(0, {2: 10})
    one.update()
    assert bits(one) == [2, 2, 4, 2]
    for _ in range(12):
        one.observe(0, {3: 10})
    assert one.update() == [(0, 2, 2), (0, 2, 1)]
    assert bits(one) == [2, 2, 2, 4]


def test_unused_experts_stay_at_their_base_planes() -> None:
    one = widths(10 * BASE)
    one.observe(0, {1: 3})
    one.update()
    assert bits(one) == [2, 4, 2, 2]


def test_a_budget_below_the_base_planes_is_refused() -> None:
    with pytest.raises(UsageError, match=f"take {BASE}"):
        widths(BASE - 1)
