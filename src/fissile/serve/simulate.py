"""A trace through a scheduler, a predictor, a cache and an executor, on a machine of given speeds.

A pass takes the tokens that the scheduler chose through the layers. In every layer the dense part
runs first, then the experts that its tokens chose; what is not in fast memory comes over one link,
prefetches giving way to what is needed now. Nothing is random but a predictor's errors.

Shapes: T rows, D decisions, K chosen, L layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fissile.errors import UsageError
from fissile.serve.batching import Limits
from fissile.serve.cache import ExpertCache
from fissile.serve.executors import check_executor
from fissile.serve.hardware import Hardware
from fissile.serve.outcome import Journey, Outcome, summarise
from fissile.serve.passes import Device, PassLoad
from fissile.serve.policies import make_policy
from fissile.serve.predictors import Predictor, layer_counts, make_predictor, route_mask
from fissile.serve.schedulers import Active, PassScheduler, Piece, View, make_pass_scheduler
from fissile.serve.trace import Trace

ORACLE = "oracle"
CACHES = ("lru", "lfu", "mrs", "plec", "belady", ORACLE)
"""Caches: "belady" knows what the predictor tells, "oracle" the whole schedule."""


@dataclass(frozen=True)
class System:
    """One combination of policies.

    Args:
        name: for people.
        scheduler: see `schedulers.PASS_SCHEDULERS`.
        predictor: see `predictors.make_predictor`.
        cache: one of `CACHES`.
        executor: "gpu", "hybrid" or "mixed".
        per_layer: every layer has its own, equal share of the cache.
    """

    name: str
    scheduler: str = "fcfs"
    predictor: str = "none"
    cache: str = "lru"
    executor: str = "gpu"
    per_layer: bool = False

    def check(self) -> None:
        """Refuse words that nothing is called by.

        Raises:
            UsageError: names the word and what is accepted.
        """
        make_pass_scheduler(self.scheduler)
        make_predictor(self.predictor)
        check_executor(self.executor)
        if self.cache != ORACLE:
            make_policy(self.cache)


@dataclass(frozen=True)
class Setting:
    """What all compared systems share.

    Args:
        hardware: speeds.
        capacity: bytes for experts in fast memory.
        limits: of a pass.
        pool: most requests under way.
        seed: of predictors' errors.
    """

    hardware: Hardware
    capacity: int
    limits: Limits
    pool: int = 256
    seed: int = 0


def simulate(
    trace: Trace,
    system: System,
    setting: Setting,
    *,
    record: Callable[[Sequence[Piece]], None] | None = None,
) -> Outcome:
    """Run a trace.

    With the oracle cache the schedule is found first, by a run with LRU.

    Args:
        trace: requests and routes.
        system: the policies.
        setting: machine and limits.
        record: called with the pieces of every pass.

    Raises:
        UsageError: a policy that does not exist, or a setting that cannot work.
    """
    system.check()
    if setting.capacity < 0 or setting.limits.tokens < 1 or setting.limits.requests < 1:
        raise UsageError(
            f"capacity {setting.capacity}, {setting.limits.tokens} tokens and"
            f" {setting.limits.requests} requests per pass: at least 0, 1 and 1"
        )
    plain = System(system.name, system.scheduler, system.predictor, "lru", system.executor)
    if system.cache == ORACLE:
        known = _Run(trace, plain, setting)
        known.run()
        run = _Run(trace, system, setting, known.schedule)
    else:
        run = _Run(trace, system, setting)
    outcome = run.run()
    if record is not None:
        for pieces in run.schedule:
            record(pieces)
    return outcome


class _Replayed:
    """A schedule that is followed as it was."""

    def __init__(self, schedule: Sequence[list[Piece]]) -> None:
        self._passes = iter(schedule)

    def plan(self, view: View) -> list[Piece]:
        return next(self._passes)


class _Run:
    """One run; `schedule` holds its passes afterwards."""

    def __init__(
        self,
        trace: Trace,
        system: System,
        setting: Setting,
        replayed: Sequence[list[Piece]] | None = None,
    ) -> None:
        self.trace, self.system, self.setting = trace, system, setting
        self.model = trace.model
        self.predictor: Predictor = make_predictor(system.predictor)
        self.predicted = (
            self.predictor.routes(trace, setting.seed) if self.predictor.knows else None
        )
        self.scheduler: PassScheduler = (
            make_pass_scheduler(system.scheduler) if replayed is None else _Replayed(replayed)
        )
        self.replayed = replayed
        parts = self.model.layers if system.per_layer else 1
        policy = "belady" if system.cache == ORACLE else system.cache
        caches = [ExpertCache(setting.capacity // parts, make_policy(policy)) for _ in range(parts)]
        self.device = Device(
            self.model,
            setting.hardware,
            caches,
            system.executor,
            self.predictor.layers,
            tell=replayed is None,
        )
        self.schedule: list[list[Piece]] = []
        self.journeys = [Journey(float(t)) for t in trace.arrival]
        self._masks: dict[tuple[int, int, int], int] = {}

    def run(self) -> Outcome:
        if self.replayed is not None:
            self._feed_oracle(self.replayed)
        trace, device = self.trace, self.device
        rows = trace.prompt.astype(np.int64) + trace.output - 1
        arrivals = list(range(trace.requests))
        active: dict[int, Active] = {}
        busy = 0.0
        while arrivals or active:
            if not active:
                device.now = max(device.now, float(trace.arrival[arrivals[0]]))
            while (
                arrivals
                and len(active) < self.setting.pool
                and (trace.arrival[arrivals[0]] <= device.now or self.replayed is not None)
            ):
                r = arrivals.pop(0)
                at = float(trace.arrival[r])
                active[r] = Active(
                    r, at, int(trace.prompt[r]), int(rows[r]), 0, at, len(self.schedule)
                )
            began = self._pass(active)
            busy += device.now - began
        for left in self.device._unused.values():
            self.device.tally.bytes_wasted += left
        return summarise(device.tally, self.journeys, busy)

    def _pass(self, active: dict[int, Active]) -> float:
        """Run one pass; when it began, which in a schedule that is followed may be a while off."""
        number = len(self.schedule)
        view = View(
            number,
            list(active.values()),
            self.setting.limits,
            self.model.layers,
            self._experts_of,
            self._resident,
        )
        pieces = self.scheduler.plan(view)
        assert pieces, "a scheduler with work must choose some"
        self.schedule.append(pieces)
        # A schedule that is followed by a faster machine waits for who has not come yet.
        began = max([self.device.now, *(active[p.request].arrival for p in pieces)])
        self.device.now = began
        for piece in pieces:
            if piece.first_layer == 0:
                item, journey = active[piece.request], self.journeys[piece.request]
                journey.wait = max(journey.wait, began - item.ready)
                journey.wait_passes = max(journey.wait_passes, number - item.ready_pass)
        self.device.run(self._load(number, pieces), self._coming(active, pieces))
        for piece in pieces:
            if piece.last_layer < self.model.layers:
                continue
            item = active[piece.request]
            item.done, item.ready, item.ready_pass = piece.end, self.device.now, number + 1
            if item.decoding:
                self.journeys[piece.request].times.append(self.device.now)
            if item.done == item.rows:
                del active[piece.request]
        return began

    def _load(self, number: int, pieces: Sequence[Piece]) -> PassLoad:
        """Counts of all layers; pieces that share their layers are counted together."""
        model, trace = self.model, self.trace
        shape = (model.layers, model.experts)
        counts = np.zeros(shape, dtype=np.int64)
        predicted = None if self.predicted is None else np.zeros(shape, dtype=np.int64)
        weights = np.zeros(shape) if self._wants_weights else None
        scores = np.zeros(shape) if self.system.cache == "mrs" else None
        tokens, context = np.zeros(model.layers, dtype=np.int64), np.zeros(model.layers)
        groups: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece in pieces:
            groups[piece.first_layer, piece.last_layer].append(piece)
        for (first, last), members in groups.items():
            rows = np.concatenate([self._rows(p.request, p.begin, p.end) for p in members])
            here = slice(first, last)
            count = partial(layer_counts, rows=rows, layers=model.layers, experts=model.experts)
            counts[here] += count(trace.routes)[here]
            tokens[here] += len(rows)
            context[here] += sum(p.end for p in members)
            if predicted is not None and self.predicted is not None:
                predicted[here] += count(self.predicted)[here]
            if weights is not None and trace.weights is not None:
                np.maximum(weights[here], self._peak(rows)[here], out=weights[here])
            if scores is not None:
                scores[here] += self._scores(rows)[here]
        if scores is not None:
            scores /= np.maximum(tokens, 1)[:, None]
        return PassLoad(
            number, counts, tokens.tolist(), context.tolist(), weights, scores, predicted
        )

    @property
    def _wants_weights(self) -> bool:
        return self.system.executor == "mixed" and self.trace.weights is not None

    def _rows(self, request: int, begin: int, end: int) -> NDArray[np.int64]:
        first = int(self.trace.first_row[request])
        return np.arange(first + begin, first + end)

    def _table(
        self, experts: NDArray[np.int16], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Places of some rows' experts in a flat (D, E) table, and which there are."""
        picked = experts[rows].astype(np.int64)
        place = picked + (np.arange(picked.shape[1]) * self.model.experts)[None, :, None]
        return place, picked >= 0

    def _peak(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Largest weight of each expert among some rows in units of an even share, (L, E)."""
        assert self.trace.weights is not None
        place, there = self._table(self.trace.routes, rows)
        share = self.trace.weights[rows].astype(np.float64)
        share *= there.sum(-1, keepdims=True)
        share /= np.maximum(np.where(there, share, 0).sum(-1, keepdims=True), 1e-9)
        table = np.zeros(self.trace.decisions * self.model.experts)
        np.maximum.at(table, place[there], share[there])
        return self._spread(table)

    def _scores(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sum of the routers' scores over some rows, (L, E); else the choices."""
        trace = self.trace
        if trace.candidates is not None and trace.scores is not None:
            place, there = self._table(trace.candidates, rows)
            share = trace.scores[rows].astype(np.float64)
        else:
            place, there = self._table(trace.routes, rows)
            share = np.full(place.shape, 1 / trace.model.top_k, dtype=np.float64)
        size = trace.decisions * self.model.experts
        table = np.bincount(place[there], share[there], minlength=size)
        return self._spread(table.astype(np.float64))

    def _spread(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """A flat (D, E) table as (L, E)."""
        shape = (self.model.layers, self.model.experts)
        return np.broadcast_to(table.reshape(self.trace.decisions, -1), shape)

    def _coming(
        self, active: dict[int, Active], pieces: Sequence[Piece]
    ) -> list[NDArray[np.int64]]:
        """What is known of the next passes: prompts that wait, in the order of their arrival."""
        if self.predicted is None or not self.predictor.passes:
            return []
        done = {p.request: p.end for p in pieces}
        left = [
            [item.request, done.get(item.request, item.done), item.prompt]
            for item in active.values()
            if done.get(item.request, item.done) < item.prompt
        ]
        # Those that decode take their share of every pass first.
        room = max(1, self.setting.limits.tokens - (len(active) - len(left)))
        found = []
        for _ in range(self.predictor.passes):
            rows, free = [], room
            while left and free > 0:
                request, begin, end = left[0]
                cut = min(end, begin + free)
                rows.append(self._rows(request, begin, cut))
                free -= cut - begin
                left[0][1] = cut
                if cut == end:
                    left.pop(0)
            if not rows:
                break
            sizes = {"layers": self.model.layers, "experts": self.model.experts}
            found.append(layer_counts(self.predicted, np.concatenate(rows), **sizes))
        return found

    def _experts_of(self, item: Active, begin: int, end: int) -> int:
        """Set of the experts of a request's rows, as far as they are known before a pass.

        Without a predictor that sees the whole pass, a token is taken to choose what the last one
        chose, and of a prompt nothing is known.
        """
        whole = self.predictor.layers is None and self.predicted is not None
        if not whole:
            if not begin:
                return 0
            begin, end = begin - 1, begin
        place = (item.request, begin, end)
        if place not in self._masks:
            source = self.predicted if whole and self.predicted is not None else self.trace.routes
            rows = self._rows(*place)
            self._masks[place] = route_mask(source[rows], self.model.experts)
        return self._masks[place]

    def _resident(self) -> int:
        """Set of the experts in memory, in the bits of `route_mask`; the whole expert, and with one
        decision for all layers those of most layers."""
        top, experts = len(self.device.sizes[0]) - 1, self.model.experts
        count: dict[int, int] = defaultdict(int)
        single = self.trace.decisions == 1
        for cache in self.device.caches:
            for layer, expert, plane in cache.policy:
                if plane == top:
                    count[expert if single else layer * experts + expert] += 1
        needed = self.model.layers / 2 if single else 0
        return sum(1 << bit for bit, found in count.items() if found > needed)

    def _feed_oracle(self, schedule: Sequence[list[Piece]]) -> None:
        """Tell the policy of every expert's next use, and after each of the one that follows."""
        layers = self.model.layers
        turns: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, pieces in enumerate(schedule):
            for layer, expert in np.argwhere(self._load(number, pieces).counts).tolist():
                turns[layer, expert].append(number * layers + layer)
        ahead = {place: iter(times) for place, times in turns.items()}

        def follow(layer: int, expert: int) -> None:
            if (time := next(ahead[layer, expert], None)) is not None:
                policy = self.device.cache_of(layer).policy
                policy.expect(time, self.device.keys(layer, expert))

        for place in ahead:
            follow(*place)
        self.device.on_use = follow
