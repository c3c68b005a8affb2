"""Which requests share a forward pass: by arrival, decodes first, or by the experts they need.

A pass reads each expert that any of its tokens needs once, so what it costs grows with the number
of different experts, not with the tokens. Requests whose experts are known beforehand can be put
together so that they share them (Read-ME, section 4.3). There a queue belongs to one expert; here a
request is a unit with a set of experts, chosen by the experts it adds to the batch for each of its
tokens, experts in memory at a discount, and none waits longer than a bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TypeAlias

from fissile.errors import UsageError
from fissile.registry import suggest


@dataclass(frozen=True)
class Unit:
    """Work of one request that is ready: a prompt, what is left of one, or one token to decode.

    Args:
        ident: of the request.
        experts: set of the experts it needs, one bit each: layer * E + expert, or the expert where
            one decision serves all layers.
        tokens: to compute.
        waited: passes, or seconds, since it became ready.
        prefill: tokens of a prompt, which may be cut.
        arrival: of the request; smaller is earlier.
    """

    ident: int
    experts: int
    tokens: int
    waited: float
    prefill: bool = False
    arrival: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What fits in one pass.

    Args:
        tokens: most tokens.
        requests: most requests.
        wait: units that have waited this long are taken first, in the units of `Unit.waited`.
    """

    tokens: int
    requests: int
    wait: float = inf


_RESIDENT_COST = 0.25
"""What an expert in memory counts, against one that must be read."""

Choice: TypeAlias = list[tuple[int, int]]
"""(request, number of its tokens) of a pass, in the order in which they were chosen."""
Scheduler: TypeAlias = Callable[[Sequence[Unit], Limits, int], Choice]
"""From what is ready, what fits and the set of experts in memory to a pass; never empty."""


def first_come(units: Sequence[Unit], limits: Limits, resident: int = 0) -> Choice:
    """By arrival, prompts cut to what fits; `resident` is not looked at."""
    return _fill(sorted(units, key=lambda u: (u.arrival, u.ident)), limits)


def decode_first(units: Sequence[Unit], limits: Limits, resident: int = 0) -> Choice:
    """Tokens to decode before prompts, each by arrival; `resident` is not looked at."""
    return _fill(sorted(units, key=lambda u: (u.prefill, u.arrival, u.ident)), limits)


def expert_aware(units: Sequence[Unit], limits: Limits, resident: int = 0) -> Choice:
    """By the experts that each unit adds to the pass for each of its tokens.

    First what has waited too long. Then prompts, as many as fit beside the tokens to decode: they
    need most experts, and what they need is free for the others. Then tokens to decode; where no
    prompt has set the experts, the best of several beginnings.

    Args:
        units: what is ready.
        limits: of a pass.
        resident: set of the experts in memory, which count for less.
    """
    if not units:
        return []
    batch = _Batch(limits, resident)
    left = sorted(units, key=lambda u: (-u.waited, u.arrival, u.ident))
    for unit in [u for u in left if u.waited >= limits.wait]:
        if not batch.full:
            batch.take(unit, batch.room)
            left.remove(unit)
    prompts = [unit for unit in left if unit.prefill]
    decodes = [unit for unit in left if not unit.prefill]
    kept = min(len(decodes), max(0, batch.slots - 1)) if prompts else 0
    while prompts and batch.room > kept and batch.slots > 0:
        whole = [unit for unit in prompts if unit.tokens <= batch.room - kept]
        if not whole and batch.choice:
            break  # a prompt in two pieces needs its experts twice
        unit = min(whole or prompts, key=batch.price)
        prompts.remove(unit)
        batch.take(unit, batch.room - kept)
    begun = bool(batch.choice)
    starts: list[Unit | None] = [None] if begun else [*_starts(decodes)]
    best = [batch.filled(decodes, start) for start in starts] or [batch]
    return min(best, key=lambda b: (b.cost / b.tokens, -b.waited)).choice


_STARTS = 8
"""Sets of experts that a pass of tokens to decode may begin with; more bring next to nothing."""


def _starts(decodes: Sequence[Unit]) -> list[Unit]:
    """The units of the sets whose experts most others want; of each set the longest waiting."""
    wanted = Counter(unit.experts for unit in decodes)
    votes = {one: sum((one & o).bit_count() * n for o, n in wanted.items()) for one in wanted}
    first: dict[int, Unit] = {}
    for unit in decodes:
        first.setdefault(unit.experts, unit)
    return [first[one] for one in sorted(votes, key=lambda one: -votes[one])[:_STARTS]]


@dataclass
class _Batch:
    """A pass that is being put together."""

    limits: Limits
    resident: int
    union: int = 0
    tokens: int = 0
    cost: float = 0.0
    waited: float = 0.0
    choice: Choice = field(default_factory=list)

    @property
    def room(self) -> int:
        return self.limits.tokens - self.tokens

    @property
    def slots(self) -> int:
        return self.limits.requests - len(self.choice)

    @property
    def full(self) -> bool:
        return self.room <= 0 or self.slots <= 0

    def price(self, unit: Unit) -> float:
        """What the unit's experts add to the cost, for each of its tokens."""
        new = unit.experts & ~self.union
        if not new:
            return 0.0
        held = (new & self.resident).bit_count()
        return (new.bit_count() - (1 - _RESIDENT_COST) * held) / unit.tokens

    def take(self, unit: Unit, most: int) -> None:
        """Add at most so many of the unit's tokens."""
        tokens = min(unit.tokens, most)
        self.cost += self.price(unit) * unit.tokens
        self.union |= unit.experts
        self.tokens += tokens
        self.waited += unit.waited
        self.choice.append((unit.ident, tokens))

    def filled(self, units: Sequence[Unit], start: Unit | None) -> _Batch:
        """A copy, filled greedily from `units`, with `start` as the first of them."""
        batch = replace(self, choice=[*self.choice])
        left = [unit for unit in units if unit is not start]
        if start is not None:
            batch.take(start, batch.room)
        while left and not batch.full:
            # The first of equals: it has waited longest. Most cost nothing once a few are chosen.
            free = (unit for unit in left if not unit.experts & ~batch.union)
            unit = next(free, None) or min(left, key=batch.price)
            left.remove(unit)
            batch.take(unit, batch.room)
        return batch


def _fill(ordered: Sequence[Unit], limits: Limits) -> Choice:
    found: Choice = []
    room = limits.tokens
    for unit in ordered:
        if room <= 0 or len(found) == limits.requests:
            break
        tokens = min(unit.tokens, room)
        found.append((unit.ident, tokens))
        room -= tokens
    return found


SCHEDULERS: dict[str, Scheduler] = {
    "fcfs": first_come,
    "decode-first": decode_first,
    "expert-aware": expert_aware,
}


def make_scheduler(name: str) -> Scheduler:
    """The scheduler of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in SCHEDULERS:
        hint = suggest(name, list(SCHEDULERS))
        raise UsageError(f"scheduler {name!r} is not one of {', '.join(SCHEDULERS)}{hint}")
    return SCHEDULERS[name]
