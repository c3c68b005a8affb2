"""Reading orders against all orders there are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

import pytest

from fissile.errors import UsageError
from fissile.serve.order import Rates, hottest_first, johnson, makespan, read_order


def orders(chains: Sequence[Sequence[object]]) -> set[tuple[tuple[int, int], ...]]:
    """Every order that keeps the items of each chain in order."""
    labels = [number for number, chain in enumerate(chains) for _ in chain]
    found = set()
    for mixed in set(permutations(labels)):
        at = [0] * len(chains)
        order = []
        for number in mixed:
            order.append((number, at[number]))
            at[number] += 1
        found.add(tuple(order))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_johnson_is_the_best_of_all_orders(seed: int) -> None:
    rng = random.Random(seed)
    chains = [
        [(float(rng.randint(0, 9)), float(rng.randint(0, 9))) for _ in range(rng.randint(1, 3))]
        for _ in range(3)
    ]
    best = min(makespan(chains, order) for order in orders(chains))
    worst = max(makespan(chains, order) for order in orders(chains))
    order = johnson(chains)
    assert tuple(order) in orders(chains)
    assert makespan(chains, order) == best
    assert worst >= best


def test_makespan_by_hand() -> None:
    chains = [[(3.0, 1.0), (1.0, 4.0)], [(2.0, 2.0)]]
    # Read until 3, 4, 6; computed until 4, 8, 10.
    assert makespan(chains, [(0, 0), (0, 1), (1, 0)]) == 10.0
    # Read until 2, 5, 6; computed until 4, 6, 10.
    assert makespan(chains, [(1, 0), (0, 0), (0, 1)]) == 10.0
    # Read until 3, 5, 6; computed until 4, 7, 11.
    assert makespan(chains, [(0, 0), (1, 0), (0, 1)]) == 11.0


def test_hottest_plane_first_and_never_before_those_below() -> None:
    # Expert 7 is used by 9 tokens at its base, of which 2 at the next plane; expert 3 by 5 at both.
    items = [(3, 0, 10, 5), (3, 1, 10, 5), (7, 0, 10, 9), (7, 1, 10, 2)]
    assert hottest_first(items) == [(7, 0), (3, 0), (3, 1), (7, 1)]


@pytest.mark.parametrize("order", ["hottest", "johnson", "index"])
def test_every_order_holds_every_plane_once_and_ascending(order: str) -> None:
    rng = random.Random(1)
    items = [(e, p, rng.randint(1, 9), rng.randint(1, 9)) for e in (2, 4, 8) for p in range(3)]
    found = read_order(order, items, Rates(1.0, 3.0, 1.0))  # type: ignore[arg-type]
    assert sorted(found) == [item[:2] for item in items]
    for expert in (2, 4, 8):
        assert [plane for e, plane in found if e == expert] == [0, 1, 2]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(UsageError, match="hottest, johnson, index"):
        read_order("coldest", [])  # type: ignore[arg-type]
