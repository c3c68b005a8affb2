"""Experts on disk, a byte budget of them in memory, and reading ahead of the computation.

The store is told what will be needed, layer by layer and pass by pass, as far as it is known: a
pre-gating router knows the whole current pass before layer 0, and the passes of what is queued.
Threads read in that order, hottest expert first within a layer, and never drop what is needed
sooner than what they read. What was not told is read when it is asked for.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from fissile.errors import FissileError, ResourceError
from fissile.serve.cache import ExpertCache
from fissile.serve.memory import Buffer, memory_of
from fissile.serve.order import Order, read_order
from fissile.serve.policies import Key, Policy
from fissile.serve.reader import ExpertFiles
from fissile.serve.widths import Widths

Needs: TypeAlias = Sequence[Mapping[int, int]]
"""Of one pass, layer by layer: the experts it needs and the tokens that go to each."""
Parts: TypeAlias = dict[tuple[str, str], Tensor]
"""Tensors of one expert by weight ("gate_up_proj", "down_proj") and part ("plane_2" ...)."""
_T = TypeVar("_T")


@dataclass
class StoreStats:
    """What the store did so far.

    Args:
        uses: planes that were needed; hits: of these, those that no read was spent on since their
            last use.
        bytes_used: bytes of the planes that were needed; bytes_hit: of the hits.
        reads: planes read; bytes_read: their bytes.
        waits: experts that the computation waited for; stall_seconds: how long in all.
        evictions: planes dropped to make room.
        budget_bytes: most that may be resident; peak_bytes: most that were, measured.
    """

    uses: int = 0
    hits: int = 0
    bytes_used: int = 0
    bytes_hit: int = 0
    reads: int = 0
    bytes_read: int = 0
    waits: int = 0
    stall_seconds: float = 0.0
    evictions: int = 0
    budget_bytes: int = 0
    peak_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the planes needed that no read was spent on."""
        return self.hits / self.uses if self.uses else 0.0


@dataclass
class _Busy:
    """Keys that must not leave: being read, or their expert is being computed."""

    loading: set[Key] = field(default_factory=set)
    pinned: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, tuple)
        return key in self.loading or self.pinned[key[:2]] > 0


class ExpertStore:
    """Serves experts of an artifact from a bounded amount of memory.

    Args:
        files: the artifact's experts; closed with the store.
        budget: bytes of experts that may be in memory, buffers being filled included.
        policy: chooses what leaves.
        widths: how many planes each expert is served with.
        device: where experts are computed.
        prefetch: read ahead; otherwise only what is asked for, when it is asked for.
        readers: threads that read.
        order: of the reads within a layer.
        ahead: passes that are read for, the current one included; what is expected beyond them
            decides only what stays.
        near: layers for which something that is expected later gives way; reads further ahead use
            free memory, and that of what is not expected at all.

    Raises:
        ResourceError: the budget is smaller than the largest expert.
    """

    def __init__(
        self,
        files: ExpertFiles,
        budget: int,
        policy: Policy,
        widths: Widths,
        *,
        device: torch.device | None = None,
        prefetch: bool = True,
        readers: int = 2,
        order: Order = "hottest",
        ahead: int = 2,
        near: int = 1,
    ) -> None:
        if budget < (least := files.expert_bytes(widths.widest)):
            raise ResourceError(
                f"{files.folder}: {budget} bytes of memory for experts, one expert takes {least}"
            )
        self.files, self.widths = files, widths
        self._policy, self._cache = policy, ExpertCache(budget, policy)
        self._prefetch, self._order, self._ahead = prefetch, order, ahead
        self._near = near
        self._stats = StoreStats(budget_bytes=budget)
        largest = max(files.size(key) for key in files.keys())  # noqa: SIM118
        self._memory = memory_of(device or torch.device("cpu"), largest)
        self._buffers: dict[Key, Buffer] = {}
        self._unpaid: set[Key] = set()
        self._busy = _Busy()
        self._urgent: list[Key] = []
        self._plan: list[tuple[int, Key]] = []
        self._starts: dict[int, int] = {}
        self._cursor, self._base, self._known = 0, -files.layers, False
        self._spare = self._spare_keys()
        self._failure: BaseException | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._arrived = threading.Condition(self._lock)
        self._threads = [
            threading.Thread(target=self._read_on, name=f"fissile-reader-{i}", daemon=True)
            for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    def stats(self) -> StoreStats:
        """A copy of the counters."""
        with self._lock:
            return replace(self._stats, peak_bytes=self._memory.meter.peak)

    def resident(self) -> dict[tuple[int, int], int]:
        """Experts in memory, (layer, expert), and their number of planes."""
        with self._lock:
            return dict(Counter(key[:2] for key in self._buffers))

    def begin(self, passes: Sequence[Needs]) -> None:
        """A pass begins.

        Args:
            passes: this one's needs and those of the passes that are known to follow; empty when
                experts are chosen inside the layers.
        """
        with self._lock:
            self._base += self.files.layers
            self._policy.advance(self._base)
            self._policy.forget()
            for key in self.widths.update():
                if key in self._buffers and key not in self._busy:
                    self._drop(key)
            self._plan, self._starts, self._cursor = [], {}, 0
            self._known = bool(passes)
            for number, needs in enumerate(passes):
                for layer, counts in enumerate(needs):
                    when = self._base + number * self.files.layers + layer
                    keys = self._ordered(layer, counts)
                    self._policy.expect(when, keys)
                    if number < self._ahead:
                        self._queue(when, keys)
            self._work.notify_all()

    def reach(self, layer: int, counts: Mapping[int, int]) -> list[int]:
        """A layer is about to be computed.

        Args:
            layer: its index.
            counts: the experts that its tokens chose, and how many each.

        Returns:
            The experts in the order in which they arrive.
        """
        with self._lock:
            now = self._base + layer
            self._policy.advance(now)
            total = sum(counts.values())
            self._policy.observe(layer, {e: n / total for e, n in counts.items()})
            self.widths.observe(layer, counts)
            if not self._known:
                self._plan, self._starts, self._cursor = [], {}, 0
                keys = self._ordered(layer, counts)
                self._policy.expect(now, keys)
                self._queue(now, keys)
                self._work.notify_all()
            self._work.notify_all()
            items = read_order(self._order, self._items(layer, counts))
            return list(dict.fromkeys(expert for expert, _ in items))

    def fetch(self, layer: int, expert: int, decode: Callable[[Parts, int | None], _T]) -> _T:
        """Compute something from one expert, which stays in memory meanwhile.

        Args:
            layer: index of the layer.
            expert: the expert.
            decode: given its parts and its width in bits (None: floats); must keep no view of them.

        Raises:
            CorruptCheckpoint: the artifact was changed; names expert and plane.
        """
        keys = [(layer, expert, p) for p in range(self.widths.planes(layer, expert))]
        with self._lock:
            self._busy.pinned[layer, expert] += 1
            try:
                self._wait(keys)
                self._count(keys)
                buffers = [self._buffers[key] for key in keys]
            except BaseException:
                self._busy.pinned[layer, expert] -= 1
                raise
        parts: Parts = {}
        try:
            for key, buffer in zip(keys, buffers, strict=True):
                parts |= buffer.views(self.files.segments(key))
            return decode(parts, self.widths.bits(layer, expert))
        finally:
            # Views first: the buffers are counted until nothing refers to them.
            parts.clear()
            buffers.clear()
            with self._lock:
                self._busy.pinned[layer, expert] -= 1
                self._work.notify_all()

    def close(self) -> None:
        """Stop reading, give memory and files back."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._memory.close()
        self._buffers.clear()
        self.files.close()

    def _items(self, layer: int, counts: Mapping[int, int]) -> list[tuple[int, int, int, int]]:
        """(expert, plane, bytes, tokens) of what a layer needs."""
        return [
            (expert, plane, self.files.size((layer, expert, plane)), tokens)
            for expert, tokens in sorted(counts.items())
            for plane in range(self.widths.planes(layer, expert))
        ]

    def _ordered(self, layer: int, counts: Mapping[int, int]) -> list[Key]:
        items = read_order(self._order, self._items(layer, counts))
        return [(layer, expert, plane) for expert, plane in items]

    def _queue(self, when: int, keys: Sequence[Key]) -> None:
        self._starts[when] = len(self._plan)
        self._plan += [(when, key) for key in keys]

    def _wait(self, keys: Sequence[Key]) -> None:
        if self._failure is not None:
            raise self._failure
        missing = [key for key in keys if key not in self._buffers]
        if not missing:
            return
        begin = time.perf_counter()
        self._urgent = [key for key in missing if key not in self._busy.loading]
        self._work.notify_all()
        while any(key not in self._buffers for key in missing):
            self._arrived.wait()
            if self._failure is not None:
                raise self._failure
        self._urgent = []
        self._stats.waits += 1
        self._stats.stall_seconds += time.perf_counter() - begin

    def _count(self, keys: Sequence[Key]) -> None:
        # The highest plane first: it was used longest ago, so it is the first to leave.
        for key in reversed(keys):
            self._policy.use(key)
            size = self.files.size(key)
            self._stats.uses += 1
            self._stats.bytes_used += size
            if key in self._unpaid:
                self._unpaid.remove(key)
            else:
                self._stats.hits += 1
                self._stats.bytes_hit += size

    def _read_on(self) -> None:
        """What a reading thread does until the store is closed."""
        while True:
            with self._lock:
                while (key := self._claim()) is None:
                    if self._closed:
                        return
                    self._work.wait()
            try:
                size = self.files.size(key)
                buffer = self._memory.fill(size, partial(self.files.read, key))
            except BaseException as err:
                self._fail(err)
                if isinstance(err, FissileError | MemoryError | RuntimeError):
                    return  # the computation raises it
                raise
            with self._lock:
                self._busy.loading.discard(key)
                self._buffers[key] = buffer
                self._unpaid.add(key)
                self._stats.reads += 1
                self._stats.bytes_read += size
                self._arrived.notify_all()
            del buffer  # or this thread would keep it alive after it was dropped

    def _fail(self, err: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or err
            self._closed = True
            self._arrived.notify_all()
            self._work.notify_all()

    def _claim(self) -> Key | None:
        """Make room for what is to be read next; None where there is nothing, or no room."""
        if self._closed or (job := self._next()) is None:
            return None
        key, deadline = job
        gone = self._cache.admit(key, self.files.size(key), keep=self._busy, deadline=deadline)
        if gone is None:
            return None
        for victim in gone:
            self._forget(victim)
        self._busy.loading.add(key)
        return key

    def _next(self) -> tuple[Key, float | None] | None:
        """What to read next, and when it is needed (None: now)."""
        for key in self._urgent:
            if key not in self._cache:
                return key, None
        if not self._prefetch:
            return None
        while self._cursor < len(self._plan):
            when, key = self._plan[self._cursor]
            # Due later than this entry says: it has been used since.
            if key not in self._cache and self._policy.due(key) <= when:
                near = when <= self._policy.now + self._near
                # Early is expensive: only what nothing is known to need makes room for it.
                return key, when if near else sys.maxsize
            self._cursor += 1
        while self._spare:
            key = self._spare[-1]
            if self.files.size(key) > self._cache.capacity - self._cache.used:
                return None
            self._spare.pop()
            if key not in self._cache:
                return key, None
        return None

    def _spare_keys(self) -> list[Key]:
        """What idle threads put where memory is free, last first: base planes of all experts."""
        layers, experts = range(self.files.layers), range(self.files.num_experts)
        return [(i, e, 0) for i in reversed(layers) for e in reversed(experts)]

    def _drop(self, key: Key) -> None:
        self._cache.drop(key)
        self._forget(key)

    def _forget(self, key: Key) -> None:
        del self._buffers[key]
        self._unpaid.discard(key)
        self._stats.evictions += 1
        due = self._policy.due(key)
        if due in self._starts:
            self._cursor = min(self._cursor, self._starts[int(due)])
