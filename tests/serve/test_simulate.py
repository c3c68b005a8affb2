"""Simulations whose outcome is known: by hand, by a cache without time, or by conservation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fissile.errors import UsageError
from fissile.serve.batching import Limits
from fissile.serve.cache import ExpertCache
from fissile.serve.hardware import Hardware
from fissile.serve.passes import Device, PassLoad
from fissile.serve.policies import PLEC, Belady, Policy
from fissile.serve.predictors import layer_counts, make_predictor, route_mask
from fissile.serve.replay import replay
from fissile.serve.schedulers import PASS_SCHEDULERS, Piece, split_in_two
from fissile.serve.simulate import CACHES, Setting, System, simulate
from fissile.serve.synthetic import synthetic_trace, unit_model
from fissile.serve.trace import ModelShape, Trace, read_trace

FREE = Hardware(name="free", flops=1e30, memory_bandwidth=1e30, link_bandwidth=1e30)
SLOW = Hardware(
    name="slow",
    flops=1e9,
    memory_bandwidth=1e9,
    launch=1e-6,
    link_bandwidth=1e8,
    link_latency=1e-6,
    cpu_flops=1e8,
    cpu_bandwidth=1e9,
)
MODEL = ModelShape("toy", 6, 8, 2, ((600, 200, 200),), 2000.0, 3000, 4000.0, 8.0)


def mixed_trace(seed: int = 0, one_decision: bool = False, requests: int = 40) -> Trace:
    trace = synthetic_trace(
        "local",
        MODEL,
        requests=requests,
        prompt=(3, 60),
        output=(1, 30),
        one_decision=one_decision,
        rate=2e4,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.05, 0.95, trace.routes.shape[:2])
    return replace(trace, weights=np.stack([weights, 1 - weights], -1).astype(np.float16))


def setting(share: float = 0.5, hardware: Hardware = SLOW, tokens: int = 24) -> Setting:
    return Setting(hardware, int(share * MODEL.total_bytes), Limits(tokens, 16, 8))


def run_recorded(trace: Trace, system: System, chosen: Setting) -> list[list[Piece]]:
    found: list[list[Piece]] = []
    simulate(trace, system, chosen, record=lambda pieces: found.append(list(pieces)))
    return found


@pytest.mark.parametrize("scheduler", PASS_SCHEDULERS)
@pytest.mark.parametrize("one_decision", [True, False])
def test_every_row_runs_through_every_layer_once_and_in_order(
    scheduler: str, one_decision: bool
) -> None:
    trace = mixed_trace(1, one_decision)
    predictor = "pregate" if one_decision else "path:0.8"
    ran: Counter[tuple[int, int, int]] = Counter()
    begun: dict[int, int] = {}
    for pieces in run_recorded(trace, System("", scheduler, predictor), setting()):
        assert len({p.request for p in pieces}) == len(pieces) <= 16
        for p in pieces:
            for row in range(p.begin, p.end):
                for layer in range(p.first_layer, p.last_layer):
                    ran[p.request, row, layer] += 1
            if p.first_layer == 0:
                assert p.begin == begun.get(p.request, 0)
                begun[p.request] = p.end
            # A token is decoded in one pass, and never with part of a prompt.
            prompt = trace.prompt[p.request]
            assert p.end <= prompt or (p.end == p.begin + 1 and p.last_layer - p.first_layer == 6)
    rows = trace.prompt + trace.output - 1
    expected = {
        (r, row, layer) for r in range(40) for row in range(int(rows[r])) for layer in range(6)
    }
    assert set(ran) == expected
    assert set(ran.values()) == {1}


def test_layered_prefill_runs_one_group_of_layers_a_pass() -> None:
    """1200 tokens make three groups; whatever decodes runs all layers in every pass."""
    trace = synthetic_trace("uniform", MODEL, requests=2, prompt=(1200, 1200), output=(9, 9))
    passes = run_recorded(trace.at_rate(np.inf), System("", "layered"), setting())
    prompts = [[p for p in pieces if p.end == 1200] for pieces in passes]
    groups = [(p.first_layer, p.last_layer) for pieces in prompts for p in pieces[:1]]
    # Both prompts are one cohort of 2400 tokens: five groups of six layers.
    assert groups == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert [len(pieces) for pieces in passes] == [2] * 13
    short = synthetic_trace("uniform", MODEL, requests=1, prompt=(400, 400), output=(5, 5))
    wide = setting(tokens=512)
    layered = run_recorded(short, System("", "layered"), wide)
    assert layered == run_recorded(short, System("", "fcfs"), wide)
    assert len(layered) == 5


def test_on_demand_matches_a_cache_without_time() -> None:
    model = unit_model(1, 6)
    trace = synthetic_trace("uniform", model, requests=4000, seed=2)
    steps = [[(0, e, 0)] for e in trace.routes[:, 0, 0].tolist()]
    for slots in (2, 4):
        chosen = Setting(FREE, slots, Limits(1, 1))
        for cache, policy, window in (("lru", Policy(), 0), ("oracle", Belady(), None)):
            found = simulate(trace, System("", cache=cache), chosen)
            truth = replay(steps, slots, policy, window=window)
            assert found.hit_rate == truth.hit_rate
            assert found.bytes_moved == truth.references - truth.hits
            assert found.unique_experts == 1


def hand_trace(routes: list[list[int]], model: ModelShape, prompt: int = 1) -> Trace:
    """One request, one expert per layer: a row per token, an entry per layer."""
    table = np.array(routes, dtype=np.int16)[:, :, None]
    return Trace(
        model,
        table,
        np.array([prompt], dtype=np.int32),
        np.array([len(routes) - prompt + 1], dtype=np.int32),
        np.zeros(1),
        np.zeros(1, dtype=np.int16),
        ("all",),
    )


def test_times_by_hand() -> None:
    """Two layers, four tokens; 1 s of attention, 2 s an expert, 5 s a transfer."""
    model = ModelShape("hand", 2, 3, 1, ((10,),), 0.0, layer_bytes=5)
    hardware = Hardware(name="hand", flops=1e30, memory_bandwidth=5.0, link_bandwidth=2.0)
    trace = hand_trace([[0, 0], [0, 1], [0, 0], [2, 1]], model)
    found = simulate(trace, System(""), Setting(hardware, 30, Limits(1, 1)))
    # Both cold: 2 * (1 + 5 + 2). One cold. None. Both: the first takes the place of the second.
    assert found.ttft.mean == pytest.approx(16)
    assert found.seconds == pytest.approx(16 + 11 + 6 + 16)
    assert found.hit_rate == pytest.approx(3 / 8)
    assert found.stall_share == pytest.approx(25 / 49)
    known = System("", predictor="pregate", cache="belady")
    ahead = simulate(trace, known, Setting(hardware, 30, Limits(1, 1)))
    # The first layer's expert is there at 5, computed at 7; the second's is there at 10.
    assert ahead.ttft.mean == pytest.approx(12)
    # Then its transfer hides behind the first layer's 3 s and the attention: 7 s. Nothing cold: 6.
    # Last, the first layer waits from 1 to 5 and the second finds its expert: 10.
    assert ahead.seconds == pytest.approx(12 + 7 + 6 + 10)
    assert ahead.late_rate == pytest.approx(4 / 8)
    assert ahead.hit_rate == pytest.approx(4 / 8)


def test_expertflow_fills_the_cache_and_goes_on_where_a_layer_is_done() -> None:
    """Two layers of four experts, room for four, predicted {2, 3, 4} and {2, 3} (section 4.2)."""
    model = ModelShape("ece", 2, 5, 3, ((1,),), 0.0, layer_bytes=1)
    hardware = Hardware(name="ece", flops=1e30, memory_bandwidth=0.1, link_bandwidth=1e3)
    loaded: list[tuple[int, int]] = []

    class Watched(PLEC):
        def add(self, key: tuple[int, int, int]) -> None:
            loaded.append((device.cache_of(0).policy.now, 10 * (key[0] + 1) + key[1]))
            super().add(key)

    counts = np.zeros((2, 5), dtype=np.int64)
    counts[0, [2, 3, 4]] = counts[1, [2, 3]] = 1
    device = Device(model, hardware, [ExpertCache(4, Watched())], "gpu", None)
    device.run(PassLoad(0, counts, [3, 2], [0.0, 0.0], predicted=counts))
    # The fifth is loaded when the first layer is done, into the place of one of its experts.
    assert loaded == [(0, 12), (0, 13), (0, 14), (0, 22), (1, 23)]
    assert device.tally.hits + device.tally.late == 5


def test_what_was_fetched_for_nothing_is_counted_when_it_leaves() -> None:
    model = ModelShape("one", 1, 3, 1, ((7,),), 0.0, layer_bytes=1)
    hardware = Hardware(name="one", flops=1e30, memory_bandwidth=1.0, link_bandwidth=1e3)
    device = Device(model, hardware, [ExpertCache(7, Policy())], "gpu", None)
    said, true = np.array([[2, 0, 0]]), np.array([[0, 0, 2]])
    device.run(PassLoad(0, true, [2], [0.0], predicted=said))
    assert (device.tally.bytes_moved, device.tally.bytes_wasted) == (14, 7)
    device.run(PassLoad(1, true, [2], [0.0], predicted=true))
    assert (device.tally.bytes_moved, device.tally.bytes_wasted, device.tally.hits) == (14, 7, 1)


def test_expertflow_separates_requests_with_different_experts() -> None:
    """Every other request needs the other half of the experts: each pass needs one half."""
    model = ModelShape("two", 1, 4, 2, ((1,),), 0.0)
    rows = np.repeat(np.array([[0, 1], [2, 3]] * 4, dtype=np.int16), 10, axis=0)[:, None]
    even = np.full(8, 1, dtype=np.int32)
    trace = Trace(model, rows, even, 10 * even, np.zeros(8), np.zeros(8, np.int16), ("all",))
    chosen = Setting(FREE, 4, Limits(4, 4))
    found = simulate(trace, System("", "expertflow", "path:1"), chosen)
    # Two passes of prompts need all four, the others two.
    assert found.passes == 20
    assert found.unique_experts == pytest.approx((2 * 4 + 18 * 2) / 20)
    assert simulate(trace, System("", "fcfs", "path:1"), chosen).unique_experts == 4


@pytest.mark.parametrize("executor", ["gpu", "hybrid", "mixed"])
@pytest.mark.parametrize("cache", CACHES)
def test_any_combination_accounts_for_every_byte(cache: str, executor: str) -> None:
    trace = mixed_trace(2, requests=16)
    for predictor in ("none", "next-gate:0.7:2", "path:0.9", "pregate:2"):
        system = System("", "fcfs", predictor, cache, executor, per_layer=cache == "lru")
        found = simulate(trace, system, setting(0.4))
        assert found.tokens == trace.output.sum()
        assert 0 < found.hit_rate < 1
        assert 0 <= found.wasted_share < 0.9
        assert (found.wasted_share > 0) <= (predictor != "none")
        assert found.ttft.p50 > 0
        assert found.tbt.p50 <= found.tbt.p95 <= found.tbt.p99 <= found.tbt.max
        assert (found.cpu_share > 0) == (executor == "hybrid")
        assert (found.degraded_share > 0) == (executor == "mixed")


def test_what_fits_is_moved_once() -> None:
    trace = mixed_trace(3)
    used = {(layer, e) for row in trace.routes for layer in range(6) for e in row[layer].tolist()}
    for predictor in ("none", "pregate"):
        found = simulate(trace, System("", predictor=predictor), setting(1.0))
        assert found.bytes_moved == len(used) * 1000


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_oracle_hits_most_and_a_known_pass_more_than_lru(seed: int) -> None:
    trace = mixed_trace(seed)
    for share in (0.3, 0.6):
        rates = {c: simulate(trace, System("", cache=c), setting(share)).hit_rate for c in CACHES}
        assert max(rates.values()) == rates["oracle"] > rates["lru"]
        moved = {
            c: simulate(trace, System("", predictor="pregate", cache=c), setting(share)).bytes_moved
            for c in ("lru", "belady")
        }
        least = simulate(trace, System("", cache="oracle"), setting(share)).bytes_moved
        assert least < moved["belady"] < moved["lru"]


def test_waiting_for_requests_that_have_not_come_is_no_work() -> None:
    """One request at a time: the seconds counted are those of requests, however far apart."""
    trace = mixed_trace(3, requests=12).at_rate(0.01)
    for cache in ("lru", "oracle"):
        assert simulate(trace, System("", cache=cache), setting(0.3)).seconds < 12


def test_a_faster_link_or_more_memory_never_slows_down() -> None:
    trace = mixed_trace(4).at_rate(np.inf)
    seconds = [simulate(trace, System(""), setting(share)).seconds for share in (0.2, 0.5, 0.8)]
    assert seconds == sorted(seconds, reverse=True)
    fast = SLOW.model_copy(update={"link_bandwidth": 1e9})
    assert simulate(trace, System(""), setting(0.5, fast)).seconds < seconds[1]
    hybrid = simulate(trace, System("", executor="hybrid"), setting(0.2))
    assert hybrid.seconds < seconds[0]


def test_expert_aware_passes_need_a_quarter_fewer_experts_on_a_recorded_trace() -> None:
    """200 requests in five domains, prefill and decode mixed, all at once, 32 tokens a pass.

    The trace is of the demo model with ten experts of which two are chosen: fissile run
    demo/moe-nested --set extract.num_experts=10 --set extract.top_k=2 --set extract.multiple=32,
    then fissile trace with --prompt 8,48 --output 32,128 on held-out text.
    """
    trace = read_trace(Path(__file__).parent / "demo_trace.safetensors").at_rate(np.inf)
    assert trace.requests == 200
    assert np.unique(trace.domain).size == 5
    chosen = Setting(SLOW, trace.model.total_bytes // 2, Limits(32, 32, 32))
    found = {
        name: simulate(trace, System("", name, "pregate"), chosen)
        for name in ("fcfs", "decode-first", "expert-aware", "expertflow")
    }
    fcfs, aware = found["fcfs"], found["expert-aware"]
    assert aware.unique_experts < 0.75 * fcfs.unique_experts
    assert aware.wait_passes.p99 < 1.5 * fcfs.wait_passes.p99
    assert aware.wait.p99 < 1.5 * fcfs.wait.p99
    assert aware.unique_experts < found["decode-first"].unique_experts
    assert aware.unique_experts < found["expertflow"].unique_experts < fcfs.unique_experts
    # Nobody is forgotten: after 32 passes a request goes first, and 200 go in 200 passes.
    assert aware.wait_passes.max <= 32 + 200


def test_two_halves_never_need_more_than_in_order_and_find_a_clear_split() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        masks = [int(m) for m in rng.integers(1, 2**12, 16)]

        def needed(parts: Sequence[Sequence[int]], masks: Sequence[int] = masks) -> int:
            unions = [0, 0]
            for which, part in enumerate(parts):
                for i in part:
                    unions[which] |= masks[i]
            return sum(u.bit_count() for u in unions)

        halves = split_in_two(masks, 8)
        assert sorted(halves[0] + halves[1]) == list(range(16))
        assert len(halves[0]) == 8
        assert needed(halves) <= needed((range(8), range(8, 16)))
    mixed = [0b0011, 0b1100] * 5
    halves = split_in_two(mixed, 5)
    assert {frozenset(mixed[i] for i in half) for half in halves} == {
        frozenset({3}),
        frozenset({12}),
    }


def test_predictors_name_as_much_as_they_promise() -> None:
    trace = mixed_trace(6)
    for spec, accuracy in (("path:0.8", 0.8), ("next-gate:0.6", 0.6), ("pregate", 1.0)):
        routes = make_predictor(spec).routes(trace, seed=1)
        assert (routes == trace.routes).mean() == pytest.approx(accuracy, abs=0.02)
        assert routes.min() >= 0
        assert routes.max() < 8
    for wrong in ("paths", "path:2", "next-gate:0.5:0", "pregate:-1", "none:1", "path:x"):
        with pytest.raises(UsageError):
            make_predictor(wrong)


def test_counts_and_sets_against_counting() -> None:
    rng = np.random.default_rng(1)
    for decisions, layers in ((1, 4), (4, 4)):
        routes = rng.integers(-1, 6, (50, decisions, 3)).astype(np.int16)
        rows = rng.choice(50, 20, replace=False)
        found = layer_counts(routes, rows, layers, 6)
        for layer in range(layers):
            column = routes[rows, layer if decisions > 1 else 0]
            assert found[layer].tolist() == [int((column == e).sum()) for e in range(6)]
        bits = {
            d * 6 + int(e)
            for row in routes[rows]
            for d in range(decisions)
            for e in row[d]
            if e >= 0
        }
        assert route_mask(routes[rows], 6) == sum(1 << b for b in bits)
