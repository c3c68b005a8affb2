"""A cache without time: hit rates of a policy on a string of references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fissile.serve.cache import ExpertCache
from fissile.serve.policies import Key, Policy


@dataclass(frozen=True)
class Replay:
    """What a replay counted.

    Args:
        references: keys that were needed.
        hits: of those, resident when they were needed.
    """

    references: int
    hits: int

    @property
    def hit_rate(self) -> float:
        """Share of references that hit."""
        return self.hits / self.references if self.references else 0.0


def replay(
    steps: Sequence[Sequence[Key]], slots: int, policy: Policy, *, window: int | None = 0
) -> Replay:
    """Run steps through a cache of equally large keys; what is missing is loaded on demand.

    Args:
        steps: the keys that each step needs at the same time, different ones, at most `slots`.
        slots: keys that the cache holds.
        policy: new.
        window: steps after the current one that the policy is told; None for all: with "belady"
            and steps of one key that is the optimum.

    Raises:
        ValueError: a step needs more keys than the cache holds.
    """
    cache = ExpertCache(slots, policy)
    ahead = len(steps) if window is None else window
    told = hits = references = 0
    for time, keys in enumerate(steps):
        policy.advance(time)
        for later in range(max(told, time), min(time + ahead + 1, len(steps))):
            policy.expect(later, steps[later])
            told = later + 1
        needed = set(keys)
        for key in keys:
            hits += key in cache
            if key not in cache and cache.admit(key, 1, keep=needed) is None:
                raise ValueError(f"step {time} needs {len(needed)} keys, the cache holds {slots}")
        for key in sorted(keys, key=lambda k: -k[2]):
            policy.use(key)
        references += len(keys)
    return Replay(references, hits)
