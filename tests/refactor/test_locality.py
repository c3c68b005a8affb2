"""Transitions and persistence of routing choices: brute-force counts and chains with known laws."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from fissile.refactor.redundancy import (
    DISTANCES,
    routing_redundancy,
    temporal_locality,
    transition_matrix,
)

PAIRS = torch.combinations(torch.arange(5), 2)


def sets(choices: Tensor) -> list[tuple[int, ...]]:
    return [tuple(sorted(e for e in row if e >= 0)) for row in choices.tolist()]


def chain(stay: float, states: int, tokens: int, sequence: int, seed: int = 0) -> Tensor:
    """Markov chain that keeps its state with probability `stay`, else draws any; int64 (T, 1)."""
    rng = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, states, (tokens,), generator=rng).tolist()
    keep = (torch.rand(tokens, generator=rng) < stay).tolist()
    state = draw[0]
    rows = []
    for t in range(tokens):
        state = state if keep[t] and t % sequence else draw[t]
        rows.append(state)
    return torch.tensor(rows)[:, None]


def test_transitions_equal_a_count_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    a = PAIRS[torch.randint(0, 10, (900,), generator=rng)]
    b = torch.where(torch.rand(900, 1, generator=rng) < 0.6, 4 - a, a.flip(1))
    b[torch.rand(900, generator=rng) < 0.1, 1] = -1
    found = transition_matrix(a, b, most=7)
    count_a, count_b = Counter(sets(a)), Counter(sets(b))
    joint = Counter(zip(sets(a), sets(b), strict=True))
    assert len(found.rows) == len(found.columns) == 7
    assert [count_a[tuple(r)] for r in found.rows] == [n for _, n in count_a.most_common(7)]
    assert [count_b[tuple(c)] for c in found.columns] == [n for _, n in count_b.most_common(7)]
    for row, share, probability in zip(found.rows, found.share, found.probability, strict=True):
        assert share == pytest.approx(count_a[tuple(row)] / 900)
        expected = [joint[tuple(row), tuple(c)] / count_a[tuple(row)] for c in found.columns]
        assert probability == pytest.approx(expected)
    assert min(map(sum, found.probability)) < 0.999  # sets that are not shown take their part


def test_a_full_matrix_has_rows_that_sum_to_one() -> None:
    a = chain(0.0, 4, 300, 300)
    found = transition_matrix(a, (a * 3 + 1) % 4)
    assert [sum(row) for row in found.probability] == pytest.approx([1.0] * 4)
    assert all(max(row) == 1.0 for row in found.probability)
    with pytest.raises(ValueError, match="300 and 299 tokens"):
        transition_matrix(a, a[1:])


def test_locality_equals_a_count_by_hand() -> None:
    rng = torch.Generator().manual_seed(1)
    index = PAIRS[torch.randint(0, 4, (60,), generator=rng)]
    index[::3, 1] = -1
    index[1::7, 1] = -1
    sequence = torch.arange(60) // 25
    chosen, labels = sets(index), sequence.tolist()
    switched, kept, gaps = [], [], []
    for t in range(60):
        before = [s for s in range(t) if labels[s] == labels[t]]
        if before:
            switched.append(chosen[t] != chosen[t - 1])
            kept.append(len({*chosen[t]} & {*chosen[t - 1]}) / len(chosen[t - 1]))
        last = [s for s in before if chosen[s] == chosen[t]]
        gaps.append(t - last[-1] if last else 0)
    found = temporal_locality(index, sequence)
    assert found.switch_rate == pytest.approx(sum(switched) / len(switched))
    assert found.kept == pytest.approx(sum(kept) / len(kept))
    again = [gap for gap in gaps if gap]
    assert found.repeat_distance == pytest.approx(sum(again) / len(again))
    assert found.new == pytest.approx(gaps.count(0) / 60)
    assert found.chance == pytest.approx(sum((n / 60) ** 2 for n in Counter(chosen).values()))
    for distance, same in zip(DISTANCES, found.same, strict=True):
        near = [t for t in range(distance, 60) if labels[t] == labels[t - distance]]
        if near:
            share = sum(chosen[t] == chosen[t - distance] for t in near) / len(near)
            assert same == pytest.approx(share)
        else:
            assert same is None


def test_a_markov_chain_has_the_locality_and_information_that_theory_gives() -> None:
    states, stay, tokens = 6, 0.7, 24_000
    index, sequence = chain(stay, states, tokens, 6000), torch.arange(tokens) // 6000
    found = temporal_locality(index, sequence)
    same = [stay**d + (1 - stay**d) / states for d in DISTANCES]
    assert found.same == pytest.approx(same, abs=0.02)
    assert found.switch_rate == pytest.approx(1 - same[0], abs=0.02)
    assert found.repeat_distance is not None
    assert found.repeat_distance == pytest.approx(states, rel=0.05)  # Kac: 1 / P(state)
    # The token before as the "earlier layer": I = H - H(next | now) of the chain.
    p, q = same[0], (1 - same[0]) / (states - 1)
    known = math.log2(states) + p * math.log2(p) + (states - 1) * q * math.log2(q)
    inside = (sequence[1:] == sequence[:-1]).nonzero().flatten()
    pair = [index[:-1][inside], index[1:][inside]]
    redundancy = routing_redundancy(pair, sequence[1:][inside], num_experts=states)
    [row] = redundancy["pairs"]
    assert row["information"] == pytest.approx(known, rel=0.03)
    assert row["adjusted"] == pytest.approx(known / math.log2(states), rel=0.03)


def test_independent_and_determined_layers() -> None:
    sequence = torch.arange(4000) // 100
    first, other = chain(0.5, 8, 4000, 100, seed=1), chain(0.5, 8, 4000, 100, seed=2)
    layers = [first, (first * 5 + 3) % 8, other]
    found = routing_redundancy(layers, sequence, num_experts=9, layers=[1, 2, 5])
    determined, independent = found["pairs"]
    assert (determined["earlier"], independent["later"]) == (1, 5)
    assert determined["adjusted"] == pytest.approx(1.0, abs=1e-9)
    assert determined["predictable"] == 1.0
    assert independent["adjusted"] < 0.01
    assert independent["first"] == {k: independent[k] for k in independent["first"]}  # K is one
    assert [(t["earlier"], t["later"]) for t in found["transitions"]] == [(1, 2), (2, 5)]
    assert [row["layer"] for row in found["layers"]] == [1, 2, 5]
    load = torch.bincount(first.flatten(), minlength=9)
    assert found["layers"][0]["imbalance"] == pytest.approx(float(load.max()) * 9 / 4000)
    assert (found["tokens"], found["sequences"], found["top_k"]) == (4000, 40, 1.0)


def test_too_many_sets_for_the_tokens_are_not_taken_for_information() -> None:
    """With nearly as many sets as tokens everything seems to tell everything."""
    rng = torch.Generator().manual_seed(3)
    a, b = (torch.rand(3000, 64, generator=rng).argsort(1)[:, :4] for _ in range(2))
    found = routing_redundancy([a, b], torch.arange(3000) // 100, num_experts=64)
    [row] = found["pairs"]
    assert row["information"] > 0.9 * row["entropy_a"]
    assert row["adjusted"] < 0.05
    assert row["first"]["adjusted"] < 0.05


def test_one_decision_and_bad_input() -> None:
    sequence = torch.zeros(50, dtype=torch.int64)
    found = routing_redundancy([chain(0.2, 3, 50, 50)], sequence, num_experts=3)
    assert (len(found["layers"]), found["pairs"], found["transitions"]) == (1, [], [])
    alone = temporal_locality(torch.tensor([[1], [2]]), torch.tensor([0, 1]))
    assert (alone.switch_rate, alone.kept, alone.repeat_distance, alone.new) == (None,) * 3 + (1.0,)
    with pytest.raises(ValueError, match="no layer"):
        routing_redundancy([], sequence, num_experts=3)
    with pytest.raises(ValueError, match="50 choices and 49"):
        temporal_locality(chain(0.2, 3, 50, 50), sequence[1:])


def test_order_and_missing_choices_do_not_change_a_set() -> None:
    a = torch.tensor([[0, 3, -1], [3, -1, 0], [1, 2, 4], [4, 1, 2]])
    found = temporal_locality(a, torch.zeros(4, dtype=torch.int64))
    assert found.same[0] == pytest.approx(2 / 3)
    assert [*itertools.chain(*transition_matrix(a, a).rows)] == [0, 3, 1, 2, 4]
