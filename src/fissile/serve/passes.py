"""One pass of a simulated model: which experts, brought when, computed where, and how long.

Shapes: T rows, D decisions, K chosen, L layers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fissile.serve.cache import ExpertCache
from fissile.serve.executors import LOW_WEIGHT, Costs, Split, Work, evaluate, gpu_only, split_work
from fissile.serve.hardware import Hardware
from fissile.serve.outcome import Tally
from fissile.serve.policies import Key
from fissile.serve.trace import ModelShape

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class PassLoad:
    """What a pass has to do.

    Args:
        number: of the pass.
        counts: int64 (L, E), tokens that chose each expert.
        tokens: per layer, tokens that run it.
        context: per layer, keys and values that its attention reads, in tokens.
        weights: (L, E), largest weight of an expert for a token, in units of an even share; None if
            nobody asks.
        scores: (L, E), mean scores of the router; None if nobody asks.
        predicted: int64 (L, E) as `counts`; None where nothing is known ahead.
    """

    number: int
    counts: Counts
    tokens: Sequence[int]
    context: Sequence[float]
    weights: NDArray[np.float64] | None = None
    scores: NDArray[np.float64] | None = None
    predicted: Counts | None = None


class Device:
    """Memory, link and clock of a simulated machine.

    Args:
        model: sizes; its planes are moved one by one if `mixed`, else whole experts.
        hardware: speeds.
        caches: one for all layers, or one per layer.
        executor: "gpu", "hybrid" or "mixed".
        ahead: layers that are known while one runs; None: all, from the beginning of the pass.
        tell: whether the policy hears what is known (an oracle knows better).

    Attributes:
        now: seconds.
        tally: what happened.
        on_use: called with (layer, expert) when a layer is done with an expert.
    """

    def __init__(
        self,
        model: ModelShape,
        hardware: Hardware,
        caches: Sequence[ExpertCache],
        executor: str,
        ahead: int | None,
        tell: bool = True,
    ) -> None:
        self.model, self.hardware, self.caches = model, hardware, caches
        self.executor, self.ahead, self.tell = executor, ahead, tell
        rows = [model.plane_bytes(layer) for layer in range(model.layers)]
        self.sizes = rows if executor == "mixed" else [(sum(row),) for row in rows]
        self.now = 0.0
        self.tally = Tally()
        self.on_use: Callable[[int, int], None] | None = None
        self._link_free = 0.0
        self._ready: dict[Key, float] = {}
        self._unused: dict[Key, int] = {}
        self._queue: deque[tuple[int, Key]] = deque()

    def cache_of(self, layer: int) -> ExpertCache:
        """The cache that serves a layer."""
        return self.caches[layer if len(self.caches) > 1 else 0]

    def keys(self, layer: int, expert: int, planes: int | None = None) -> list[Key]:
        """Keys of an expert's lowest planes, ascending."""
        return [(layer, expert, plane) for plane in range(planes or len(self.sizes[layer]))]

    def size(self, key: Key) -> int:
        """Bytes of a key."""
        return self.sizes[key[0]][key[2]]

    def run(self, load: PassLoad, coming: Sequence[Counts] = ()) -> None:
        """Run a pass.

        Args:
            load: what it has to do.
            coming: what is known of the passes after it.
        """
        layers, base = self.model.layers, load.number * self.model.layers
        self._queue.clear()
        if load.predicted is not None and self.ahead is None:
            # What was known of passes to come may have changed: it is told again.
            self._forget()
            for later, counts in enumerate([load.predicted, *coming]):
                for layer in range(layers):
                    self._tell(base + later * layers + layer, layer, counts[layer])
        for layer in range(layers):
            if load.predicted is not None and self.ahead:
                for nearby in range(layer + 1, min(layer + self.ahead, layers - 1) + 1):
                    if nearby == layer + self.ahead or layer == 0:
                        self._tell(base + nearby, nearby, load.predicted[nearby])
            self._layer(load, layer, base + layer)
        used = (load.counts > 0).sum(1)
        ran = [layer for layer in range(layers) if load.tokens[layer]]
        self.tally.unique.append(float(used[ran].mean()) if ran else 0.0)

    def _forget(self) -> None:
        if self.tell:
            for cache in self.caches:
                cache.policy.forget()

    def _tell(self, time: int, layer: int, counts: NDArray[np.int64]) -> None:
        """The experts with counts will be needed at a time: most tokens first."""
        experts = np.flatnonzero(counts)
        order = experts[np.argsort(-counts[experts], kind="stable")].tolist()
        keys = [key for expert in order for key in self.keys(layer, expert)]
        if self.tell:
            self.cache_of(layer).policy.expect(time, keys)
        self._queue.extend((time, key) for key in keys)

    def _layer(self, load: PassLoad, layer: int, time: int) -> None:
        policy = self.cache_of(layer).policy
        for cache in self.caches:
            cache.policy.advance(time)
        rows = load.tokens[layer]
        if not rows:
            return
        model = self.model
        read = model.layer_bytes + load.context[layer] * model.kv_bytes
        began = self.now
        self.now += self.hardware.dense(model.layer_flops * rows, read)
        self._prefetch(began, self.now, frozenset(), time)
        needed = np.flatnonzero(load.counts[layer]).tolist()
        if load.predicted is not None and self.tell:
            for expert in np.flatnonzero(load.predicted[layer]).tolist():
                if not load.counts[layer, expert]:
                    for key in self.keys(layer, expert):
                        policy.spare(key)
        if load.scores is not None:
            seen = np.flatnonzero(load.scores[layer])
            policy.observe(layer, dict(zip(seen.tolist(), load.scores[layer, seen], strict=True)))
        began = self.now
        used = self._experts(load, layer, needed)
        self._prefetch(began, self.now, used, time)
        for key in sorted(used, reverse=True):
            policy.use(key)
            self._unused.pop(key, None)
        if self.on_use is not None:
            for expert in needed:
                self.on_use(layer, expert)

    def _experts(self, load: PassLoad, layer: int, needed: Sequence[int]) -> set[Key]:
        """Account for the layer's references, bring what is missing, compute; what was used."""
        cache, work, planes = self.cache_of(layer), [], {}
        for expert in needed:
            tokens = int(load.counts[layer, expert])
            planes[expert] = self._planes(load, layer, expert, tokens)
            keys = self.keys(layer, expert, planes[expert])
            held = [key in cache for key in keys]
            there = max((self._ready[k] for k, h in zip(keys, held, strict=True) if h), default=0)
            for key, resident in zip(keys, held, strict=True):
                self._refer(key, resident)
            ready = max(0.0, there - self.now) if all(held) else None
            work.append(Work(expert, tokens, ready))
        keep = {key for expert in needed for key in self.keys(layer, expert, planes[expert])}
        costs = Costs(self.hardware, self.model.expert_flops, sum(self.sizes[layer]))
        start = max(0.0, self._link_free - self.now)
        split = (split_work if self.executor == "hybrid" else gpu_only)(work, costs, start)
        if self.executor == "mixed":
            split = self._bring_planes(layer, work, planes, keep, costs)
        else:
            for expert in split.moved:
                self._bring(self.keys(layer, expert), keep)
        busy = sum(costs.gpu(w.tokens) for w in work if w.expert not in split.cpu)
        self.tally.on_cpu += len(split.cpu)
        self.tally.stall += max(0.0, split.end - busy) if not split.cpu else 0.0
        self.now += split.end
        return keep

    def _refer(self, key: Key, resident: bool) -> None:
        tally, size = self.tally, self.size(key)
        tally.references += 1
        tally.bytes_needed += size
        if not resident:
            return
        if self._ready[key] <= self.now:
            tally.hits += 1
            tally.bytes_hit += size
        else:
            tally.late += 1

    def _planes(self, load: PassLoad, layer: int, expert: int, tokens: int) -> int:
        """Planes that an expert is computed with: fewer where it weighs little and they are not
        there."""
        every = len(self.sizes[layer])
        self.tally.choices += tokens
        if load.weights is None or load.weights[layer, expert] >= LOW_WEIGHT:
            return every
        cache = self.cache_of(layer)
        held = sum(key in cache for key in self.keys(layer, expert))
        if held < every:
            self.tally.degraded += tokens
        return max(1, held)

    def _bring_planes(
        self,
        layer: int,
        work: Sequence[Work],
        planes: dict[int, int],
        keep: set[Key],
        costs: Costs,
    ) -> Split:
        """As `gpu_only`, but only the planes that are missing are brought."""
        cache, timed = self.cache_of(layer), []
        for item in sorted(work, key=lambda w: (-w.tokens, w.expert)):
            ready = item.ready
            if ready is None:
                absent = [k for k in self.keys(layer, item.expert, planes[item.expert])]
                self._bring([k for k in absent if k not in cache], keep)
                ready = self._link_free - self.now
            timed.append(Work(item.expert, item.tokens, ready))
        return evaluate([w.expert for w in timed], (), timed, costs)

    def _bring(self, keys: Sequence[Key], keep: set[Key]) -> None:
        """Demand loads; what finds no room is computed from a buffer and not kept."""
        size = sum(map(self.size, keys))
        self._link_free = max(self._link_free, self.now) + self.hardware.transfer(size)
        self.tally.bytes_moved += size
        for key in keys:
            if not self._admit(key, keep, None):
                return  # a higher plane is of no use without this one
            self._ready[key] = self._link_free

    def _admit(self, key: Key, keep: frozenset[Key] | set[Key], deadline: int | None) -> bool:
        cache = self.cache_of(key[0])
        gone = cache.admit(key, self.size(key), keep=keep, deadline=deadline)
        if gone is None:
            return False
        for victim in gone:
            del self._ready[victim]
            self.tally.bytes_wasted += self._unused.pop(victim, 0)
        return True

    def _prefetch(
        self, begin: float, end: float, keep: frozenset[Key] | set[Key], time: int
    ) -> None:
        """Let the link bring what is known to come while the device computes."""
        while self._queue:
            deadline, key = self._queue[0]
            if deadline < time or key in self.cache_of(key[0]) or key in keep:
                self._queue.popleft()
                continue
            start = max(self._link_free, begin)
            if start >= end or not self._admit(key, keep, deadline):
                return
            self._queue.popleft()
            size = self.size(key)
            self._link_free = self._ready[key] = start + self.hardware.transfer(size)
            self.tally.bytes_moved += size
            self._unused[key] = size
