"""Allocation against exact integer programming, and what it promises about budgets."""

from __future__ import annotations

import numpy as np
import pytest
from tests.quant.exact import least_loss

from fissile.errors import UsageError
from fissile.quant.allocate import Choice, allocate, budget_bytes, hull

WIDTHS = (2, 3, 4, 8)


def table(weights: int, seed: int, *, convex: bool) -> dict[str, list[Choice]]:
    random = np.random.default_rng(seed)
    found = {}
    for i in range(weights):
        size = int(random.integers(50, 400))
        scale = random.lognormal(0, 1.5)
        fall = [4.0**-k * scale * (1 if convex else random.lognormal(0, 0.8)) for k in WIDTHS]
        found[f"w{i}"] = [Choice(k, size * k, loss) for k, loss in zip(WIDTHS, fall, strict=True)]
    return found


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_exact_up_to_one_step(seed: int, convex: bool) -> None:
    choices = table(14, seed, convex=convex)
    least = sum(min(c.bytes for c in own) for own in choices.values())
    for share in (1.0, 1.2, 1.6, 2.3, 4.0):
        budget = int(least * share)
        found = allocate(choices, budget)
        assert found.bytes <= budget
        by = {name: {c.bits: c for c in own} for name, own in choices.items()}
        taken = [by[name][bits] for name, bits in found.bits.items()]
        assert found.bytes == sum(c.bytes for c in taken)
        assert found.loss == pytest.approx(sum(c.loss for c in taken))
        best = least_loss(choices, budget)
        assert found.loss >= best - 1e-12
        # What is left of the budget is less than one step: with as much more, it is at least the
        # integer optimum.
        step = max(c.bytes for own in choices.values() for c in own)
        assert allocate(choices, budget + step).loss <= best + 1e-12


def test_at_its_own_bytes_a_plan_is_optimal() -> None:
    choices = table(10, 7, convex=True)
    least = sum(min(c.bytes for c in own) for own in choices.values())
    for budget in range(least, 4 * least, least // 3):
        found = allocate(choices, budget)
        assert found.loss == pytest.approx(least_loss(choices, found.bytes), rel=1e-9)


def test_larger_budgets_only_add() -> None:
    choices = table(20, 3, convex=False)
    least = sum(min(c.bytes for c in own) for own in choices.values())
    before = None
    for budget in range(least, 4 * least, least // 20):
        found = allocate(choices, budget)
        if before is not None:
            assert all(found.bits[name] >= bits for name, bits in before.bits.items())
            assert found.loss <= before.loss
        before = found


def test_hull_drops_widths_that_cost_more_than_they_save() -> None:
    points = [Choice(2, 20, 10.0), Choice(3, 30, 9.5), Choice(4, 40, 1.0), Choice(8, 80, 2.0)]
    assert [c.bits for c in hull(points)] == [2, 4]
    with pytest.raises(ValueError, match="without choices"):
        hull([])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.6bpw", 325), ("4GiB", 4 << 30), ("1.5 kb", 1500), ("3MiB", 3 << 20), ("12B", 12)],
)
def test_budgets_are_bits_a_weight_or_bytes(text: str, expected: int) -> None:
    assert budget_bytes(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "2.6", "bpw", "-1GiB", "4 parsec", "0bpw"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="accepted are bits per weight"):
        budget_bytes(text, 1000)


def test_a_budget_below_the_narrowest_is_refused() -> None:
    with pytest.raises(UsageError, match="budget of 10 bytes: the narrowest widths take"):
        allocate(table(3, 0, convex=True), 10)
