"""Which resident expert leaves when memory is full: one interface, for the store and the simulator.

What is evicted is a key (layer, expert, plane). Every policy ranks the resident keys and gives up
the lowest; ties go to the key that was used longest ago. A higher plane of an expert always leaves
before a lower one, so that what is resident of an expert can be computed with.

Time counts steps: one layer of one forward pass, or one reference of a trace. What a pre-gating
router or a predictor knows ahead is told as (time, keys), and every policy can say when a key is
due, so that a prefetch never takes the place of something that is needed sooner.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TypeAlias

from fissile.errors import UsageError
from fissile.registry import suggest

Key: TypeAlias = tuple[int, int, int]
"""(layer, expert, plane)."""

NEVER = math.inf
Rank: TypeAlias = tuple[float, float]
_SLACK = 64  # entries that a heap may hold beyond four per resident key


class Policy:
    """Least recently used, and the base of the others, which rank otherwise.

    A policy ranks keys; who holds their bytes calls it: `add` and `remove` as keys come and go,
    `use` at every reference, `advance` as time goes on, `expect` with what is known ahead and
    `observe` with a router's scores. It is not safe for threads: its owner holds a lock.

    Attributes:
        now: the time of the last `advance`.
    """

    name = "lru"
    _by_due = False

    def __init__(self) -> None:
        self.now = 0
        self._clock = 0
        self._last: dict[Key, int] = {}
        self._rank: dict[Key, Rank] = {}
        self._planes: dict[tuple[int, int], list[int]] = {}
        self._heap: list[tuple[Rank, Key]] = []
        self._due: dict[Key, deque[int]] = {}
        self._at: dict[int, list[Key]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._rank

    def __len__(self) -> int:
        return len(self._rank)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rank)

    def add(self, key: Key) -> None:
        """The key became resident, which makes it recent but is not a reference.

        Raises:
            ValueError: it is resident already.
        """
        if key in self._rank:
            raise ValueError(f"{key} is resident already")
        self._clock += 1
        self._last[key] = self._clock
        self._planes.setdefault(key[:2], []).append(key[2])
        self._set_rank(key)

    def use(self, key: Key) -> None:
        """The key was referenced now, whether it was resident or not."""
        self._clock += 1
        self._last[key] = self._clock
        self._pass_turn(key)
        self._count(key)
        if key in self._rank:
            self._set_rank(key)

    def remove(self, key: Key) -> None:
        """The key is no longer resident.

        Raises:
            KeyError: it was not.
        """
        del self._rank[key]
        planes = self._planes[key[:2]]
        planes.remove(key[2])
        if not planes:
            del self._planes[key[:2]]

    def victim(
        self,
        keep: Container[Key] = (),
        gone: Container[Key] = (),
        after: float | None = None,
    ) -> Key | None:
        """The key to give up, which stays resident until `remove`; None if there is none.

        Args:
            keep: keys that must stay.
            gone: keys that count as removed already.
            after: keys that are due at this time or before must stay too.
        """
        aside, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            key = entry[1]
            if self._rank.get(key) != entry[0]:
                continue  # outdated: the key left, or was ranked anew
            aside.append(entry)
            if after is not None and self.due(key) <= after:
                if self._by_due:
                    break  # all others are due before
                continue
            top = max((p for p in self._planes[key[:2]] if (*key[:2], p) not in gone), default=None)
            if top is not None and (*key[:2], top) not in keep:
                found = (*key[:2], top)
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return found

    def advance(self, time: int) -> None:
        """It is `time`: what was expected before is past, what is expected now is still due.

        Raises:
            ValueError: time runs backwards.
        """
        if time < self.now:
            raise ValueError(f"time {time} lies before {self.now}")
        before, self.now = self.now, time
        for past in range(before, time):
            # What was expected and not used is due at its next turn.
            for key in self._at.pop(past, ()):
                if key in self._rank:
                    self._set_rank(key)

    def expect(self, time: int, keys: Iterable[Key]) -> None:
        """The keys will be needed at `time`; the times of one key are told in order.

        Raises:
            ValueError: the time is past, or lies before one that was told for the same key.
        """
        if time < self.now:
            raise ValueError(f"time {time} lies before {self.now}")
        told = self._at.setdefault(time, [])
        for key in keys:
            times = self._due.setdefault(key, deque())
            if times and times[-1] >= time:
                if times[-1] > time:
                    raise ValueError(f"{key} is expected at {times[-1]}, {time} comes too late")
                continue
            times.append(time)
            told.append(key)
            if len(times) == 1 and key in self._rank:
                self._set_rank(key)

    def forget(self) -> None:
        """Nothing is known ahead any more: the schedule has changed."""
        known = list(self._due)
        self._due.clear()
        self._at.clear()
        for key in known:
            if key in self._rank:
                self._set_rank(key)

    def spare(self, key: Key) -> None:
        """The key was expected now and is not needed: it is due at its next turn."""
        self._pass_turn(key)
        if key in self._rank:
            self._set_rank(key)

    def due(self, key: Key) -> float:
        """When the key is needed next, as far as known; `NEVER` if it is not."""
        times = self._due.get(key)
        while times and times[0] < self.now:
            times.popleft()
        if times:
            return times[0]
        self._due.pop(key, None)
        return NEVER

    def observe(self, layer: int, scores: Mapping[int, float]) -> None:
        """A router's scores by expert, mean over the tokens of a step; most policies ignore them.

        Args:
            layer: where the scores come from.
            scores: of the experts that count; the others' are 0.
        """

    def _pass_turn(self, key: Key) -> None:
        times = self._due.get(key)
        while times and times[0] <= self.now:
            times.popleft()

    def _count(self, key: Key) -> None:
        """Note a reference."""

    def _order(self, key: Key) -> Rank:
        """Rank of a resident key; the lowest leaves first."""
        return (0.0, self._last[key])

    def _set_rank(self, key: Key) -> None:
        rank = self._order(key)
        if rank == self._rank.get(key):
            return
        self._rank[key] = rank
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 4 * len(self._rank) + _SLACK:
            self._heap = [(rank, key) for key, rank in self._rank.items()]
            heapq.heapify(self._heap)


class LFU(Policy):
    """Least frequently used since the start; counts outlive residency."""

    name = "lfu"

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[Key, int] = {}

    def _count(self, key: Key) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1

    def _order(self, key: Key) -> Rank:
        return (self._uses.get(key, 0), self._last[key])


class MRS(Policy):
    """Minus recent score (HybriMoE, section IV-D): a decaying mean of the router's scores.

    S <- a TopP(s) + (1 - a) S for every expert of a layer at each of its steps; the resident expert
    of lowest S leaves. Experts of different layers are compared as after equally many steps.

    Args:
        weight: a.

    Raises:
        ValueError: a is not between 0 and 1.
    """

    name = "mrs"

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        if not 0 < weight < 1:
            raise ValueError(f"weight {weight} is not between 0 and 1")
        self._weight = weight
        self._steps: dict[int, int] = {}
        # log S - steps * log(1 - a), which a step without the expert leaves as it is.
        self._score: dict[tuple[int, int], float] = {}

    def observe(self, layer: int, scores: Mapping[int, float]) -> None:
        """Fold the scores of one step in."""
        steps = self._steps[layer] = self._steps.get(layer, 0) + 1
        shift = -steps * math.log1p(-self._weight)
        for expert, score in scores.items():
            if score <= 0:
                continue
            place = (layer, expert)
            new, old = math.log(self._weight * score) + shift, self._score.get(place, -NEVER)
            high, low = max(old, new), min(old, new)
            self._score[place] = high + math.log1p(math.exp(low - high))
            for plane in self._planes.get(place, ()):
                self._set_rank((layer, expert, plane))

    def score(self, layer: int, expert: int) -> float:
        """S of an expert now."""
        known = self._score.get((layer, expert), -NEVER)
        return math.exp(known + self._steps.get(layer, 0) * math.log1p(-self._weight))

    def _order(self, key: Key) -> Rank:
        return (self._score.get(key[:2], -NEVER), self._last[key])


class Belady(Policy):
    """What is needed last leaves first (Read-ME, section 4.5), as far as it is known ahead.

    Told the whole future, this is the optimum; told a window of it, what lies beyond the window is
    never needed, and among such keys the least recently used leaves.
    """

    name = "belady"
    _by_due = True

    def _order(self, key: Key) -> Rank:
        return (-self.due(key), self._last[key])


class PLEC(Belady):
    """ExpertFlow's cache: layers of one unit in their order, what proved wrong leaves first.

    Experts that were predicted and are not needed leave first, then those of layers that are done,
    then those of the furthest layer.
    """

    name = "plec"

    def __init__(self) -> None:
        super().__init__()
        self._wrong: set[Key] = set()

    def add(self, key: Key) -> None:
        """The key became resident, which makes it recent but is not a reference."""
        self._wrong.discard(key)
        super().add(key)

    def use(self, key: Key) -> None:
        """The key was referenced now, whether it was resident or not."""
        self._wrong.discard(key)
        super().use(key)

    def spare(self, key: Key) -> None:
        """The key was expected now and is not needed."""
        self._wrong.add(key)
        super().spare(key)

    def _order(self, key: Key) -> Rank:
        due = self.due(key)
        wrong = due == NEVER and key in self._wrong
        return (-due, -1.0 if wrong else self._last[key])


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Policy, LFU, MRS, Belady, PLEC)}
"""Policies by the name they are chosen by."""


def make_policy(name: str) -> Policy:
    """A new policy.

    Args:
        name: "lru", "lfu", "mrs", "belady" (of what it is told ahead) or "plec".

    Raises:
        UsageError: no such policy.
    """
    if name not in POLICIES:
        known = list(POLICIES)
        raise UsageError(
            f"unknown cache {name!r}{suggest(name, known)} (known: {', '.join(known)})"
        )
    return POLICIES[name]()
