"""Eviction policies against exact optima, exhaustive search and the definitions of their papers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from fissile.serve.cache import ExpertCache
from fissile.serve.policies import LFU, MRS, PLEC, Belady, Key, Policy, make_policy
from fissile.serve.replay import replay
from fissile.serve.synthetic import synthetic_trace, unit_model

Refs = list[list[Key]]
READ_ME = {2: 0.4416, 3: 0.6182, 4: 0.7721, 5: 0.8803}
"""Read-ME's table 4: hit rate of its cache by capacity."""


def unit_steps(places: Sequence[int]) -> Refs:
    return [[(0, place, 0)] for place in places]


@cache
def uniform() -> Refs:
    """Independent, even requests of one of six experts each."""
    trace = synthetic_trace("uniform", unit_model(1, 6), requests=100_000, seed=1)
    return unit_steps(trace.routes[:, 0, 0].tolist())


def optimum_hit_rate(experts: int, slots: int) -> float:
    """Hit rate of the optimal cache under independent, even requests, exactly.

    The optimum's cost is an online quantity: layers L_0 | L_1 | ... | L_k of pages, where a request
    from L_0 costs one miss (Koutsoupias and Papadimitriou, 2000). The sizes of the layers are a
    Markov chain; its stationary weight of L_0 is the miss rate.
    """

    def after(sizes: tuple[int, ...], layer: int) -> tuple[int, ...]:
        if layer == 0:
            merged = (sizes[0] - 1, *sizes[1:-2], sizes[-2] + sizes[-1])
            return (*merged, 1) if slots > 1 else (experts - 1, 1)
        left = (sizes[layer - 1] + sizes[layer] - 1,)
        return (*sizes[: layer - 1], *left, *sizes[layer + 1 :], 1)

    states = [(experts - slots, *[1] * slots)]
    index = {states[0]: 0}
    moves = []
    for state in states:
        for layer, size in enumerate(state):
            if size:
                new = after(state, layer)
                if new not in index:
                    index[new] = len(states)
                    states.append(new)
                moves.append((index[state], index[new], size / experts))
    matrix = np.zeros((len(states), len(states)))
    for row, column, chance in moves:
        matrix[row, column] += chance
    system = np.vstack([matrix.T - np.eye(len(states)), np.ones(len(states))])
    weights = np.linalg.lstsq(system, np.append(np.zeros(len(states)), 1), rcond=None)[0]
    return 1 - sum(w * s[0] / experts for w, s in zip(weights, states, strict=True))


@pytest.mark.parametrize(("slots", "published"), [(2, 49.8), (3, 69.2), (4, 82.8), (5, 92.7)])
def test_the_oracle_on_even_traffic_is_the_exact_optimum(slots: int, published: float) -> None:
    exact = optimum_hit_rate(6, slots)
    assert 100 * exact == pytest.approx(published, abs=0.1)
    found = replay(uniform(), slots, Belady(), window=None).hit_rate
    assert found == pytest.approx(exact, abs=0.004)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5])
def test_lru_on_even_traffic_hits_its_share(slots: int) -> None:
    assert replay(uniform(), slots, Policy()).hit_rate == pytest.approx(slots / 6, abs=0.005)


def test_a_window_of_two_references_reaches_read_me() -> None:
    """The paper's numbers lie between the windows of one and of three references."""
    found = {
        window: [replay(uniform()[:40_000], k, Belady(), window=window).hit_rate for k in READ_ME]
        for window in (0, 1, 2, 3)
    }
    paper = list(READ_ME.values())
    assert found[0] == pytest.approx([k / 6 for k in READ_ME], abs=0.01)
    assert sum(found[1]) < sum(paper) < sum(found[2])
    assert found[2][:2] > paper[:2]
    assert found[2] == pytest.approx(paper, abs=0.032)
    assert all(ours > theirs for ours, theirs in zip(found[3], paper, strict=True))


def brute_force(refs: Sequence[int], slots: int) -> int:
    """Most hits that any choice of victims gives."""
    states = {frozenset[int](): 0}
    for ref in refs:
        new: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            choices = (
                [held]
                if ref in held
                else [held | {ref}]
                if len(held) < slots
                else [held - {v} | {ref} for v in held]
            )
            for choice in choices:
                new[choice] = max(new.get(choice, -1), hits + (ref in held))
        states = new
    return max(states.values())


@pytest.mark.parametrize("seed", range(20))
def test_belady_told_everything_is_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    experts, slots = rng.randint(3, 7), rng.randint(1, 4)
    refs = [rng.randrange(experts) for _ in range(40)]
    assert replay(unit_steps(refs), slots, Belady(), window=None).hits == brute_force(refs, slots)


def test_a_known_window_never_costs_a_hit() -> None:
    """All strings of seven references to four experts, up to their names."""
    for refs in itertools.product(range(4), repeat=6):
        steps = unit_steps((0, *refs))
        lru = {k: replay(steps, k, Policy()).hits for k in (2, 3)}
        for slots, window in itertools.product((2, 3), (1, 3)):
            assert replay(steps, slots, Belady(), window=window).hits >= lru[slots], refs


@pytest.mark.parametrize("kind", ["uniform", "zipf", "local"])
def test_a_known_window_never_costs_a_hit_on_traces(kind: str) -> None:
    """Steps need several experts of one layer at once; the cache serves all layers."""
    trace = synthetic_trace(
        kind,
        unit_model(3, 8, 2),
        requests=20,
        prompt=(2, 9),
        output=(3, 40),
        one_decision=False,
        seed=3,
    )
    steps = [
        [(layer, int(e), 0) for e in row[layer]] for row in trace.routes[:400] for layer in range(3)
    ]
    for slots in (9, 16):
        lru = replay(steps, slots, Policy()).hits
        hits = [replay(steps, slots, Belady(), window=w).hits for w in (0, 1, 3, 12, 60, None)]
        assert hits[0] == lru
        assert min(hits) == lru
        assert hits[-1] == max(hits) > lru


def test_lfu_keeps_what_is_popular() -> None:
    steps = unit_steps([0, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    # 0 is never given up; 1 and 2 displace each other. LRU gives up each before its turn.
    assert replay(steps, 2, LFU()).hits == 5
    assert replay(steps, 2, Policy()).hits == 2


def test_mrs_is_the_decaying_mean_of_the_scores() -> None:
    rng = random.Random(0)
    policy, truth = MRS(0.3), [[0.0] * 5 for _ in range(2)]
    for expert in range(5):
        policy.add((0, expert, 0))
        policy.add((1, expert, 0))
    for _ in range(200):
        for layer in (0, 1):
            scores = {e: rng.random() for e in rng.sample(range(5), 3)}
            policy.observe(layer, scores)
            truth[layer] = [0.3 * scores.get(e, 0.0) + 0.7 * truth[layer][e] for e in range(5)]
        for layer in (0, 1):
            assert [policy.score(layer, e) for e in range(5)] == pytest.approx(truth[layer])
        victim = policy.victim()
        assert victim is not None
        assert truth[victim[0]][victim[1]] == pytest.approx(min(map(min, truth)))


def test_plec_gives_up_what_proved_wrong_then_what_is_done_then_the_furthest() -> None:
    policy = PLEC()
    for layer, expert in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        policy.add((layer, expert, 0))
        policy.expect(layer, [(layer, expert, 0)])
    policy.use((0, 0, 0))
    policy.advance(1)
    policy.spare((1, 0, 0))
    order = []
    for _ in range(5):
        victim = policy.victim()
        assert victim is not None
        order.append(victim[:2])
        policy.remove(victim)
    # (0, 1) was expected and never used; its turn is over like that of (0, 0).
    assert order[0] == (1, 0)
    assert set(order[1:3]) == {(0, 0), (0, 1)}
    assert set(order[3:]) == {(2, 0), (2, 1)}


@pytest.mark.parametrize("name", ["lru", "lfu", "mrs", "belady", "plec"])
def test_planes_leave_from_the_top(name: str) -> None:
    """Whatever happens, the planes of an expert that remain are the lowest ones."""
    rng = random.Random(7)
    policy = make_policy(name)
    cache = ExpertCache(2000, policy)
    for time in range(600):
        policy.advance(time)
        if rng.random() < 0.5:
            ahead = [(rng.randrange(2), rng.randrange(6), p) for p in range(rng.randint(1, 3))]
            policy.expect(time + 3, ahead)
        layer, expert, planes = rng.randrange(2), rng.randrange(6), rng.randint(1, 3)
        policy.observe(layer, {expert: rng.random()})
        keys = [(layer, expert, plane) for plane in range(planes)]
        for key in keys:
            if key not in cache:
                assert cache.admit(key, 100 + 37 * key[2], keep=set(keys)) is not None
        for key in reversed(keys):
            policy.use(key)
        held: dict[tuple[int, int], set[int]] = {}
        for key in policy:
            held.setdefault(key[:2], set()).add(key[2])
        assert all(planes == set(range(len(planes))) for planes in held.values())
        sizes = sum(100 + 37 * p for planes in held.values() for p in planes)
        assert sizes == cache.used <= cache.peak <= 2000


@pytest.mark.parametrize("name", ["lru", "belady"])
def test_a_key_is_due_at_its_next_turn_once_it_was_used(name: str) -> None:
    policy, key = make_policy(name), (0, 1, 0)
    for time in (2, 5, 9):
        policy.expect(time, [key])
    policy.advance(2)
    assert policy.due(key) == 2
    policy.use(key)
    assert policy.due(key) == 5
    policy.advance(6)  # the turn at 5 passed without a use
    assert policy.due(key) == 9
    policy.forget()
    assert policy.due(key) == float("inf")


def test_a_prefetch_displaces_nothing_that_is_due_before_it() -> None:
    policy = Belady()
    cache = ExpertCache(2, policy)
    for expert, due in ((0, 5), (1, 9)):
        assert cache.admit((0, expert, 0), 1) == []
        policy.expect(due, [(0, expert, 0)])
    assert cache.admit((0, 2, 0), 1, deadline=9) is None
    assert cache.admit((0, 2, 0), 1, keep={(0, 1, 0)}, deadline=8) is None
    assert cache.used == 2
    assert cache.admit((0, 2, 0), 1, deadline=8) == [(0, 1, 0)]
    assert cache.admit((0, 3, 0), 3) is None
    assert set(policy) == {(0, 0, 0), (0, 2, 0)}
