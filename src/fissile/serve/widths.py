"""How many bits each expert is served with: the same for all, a plan's, or what a budget allows.

Under a budget every expert keeps its base planes, and the experts that most tokens go to get more:
greedy by error removed per byte, which is optimal on a convex profile. The error of a uniform
quantizer falls by the same factor with every bit, so the gain of a step from i to j bits is
usage * (r^-i - r^-j) / bytes. A plane that is served keeps its place until another is clearly worth
more, so that experts of like use do not take turns.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from fissile.errors import UsageError
from fissile.serve.policies import Key
from fissile.serve.reader import ExpertFiles

_ERROR_PER_BIT = 3.5
"""Factor by which the squared error of a quantized expert falls with each bit."""


class Widths:
    """All experts at one width.

    Args:
        files: the experts.
        bits: the width; None for float experts.
    """

    def __init__(self, files: ExpertFiles, bits: int | None) -> None:
        self._planes, self._bits = files.planes_of(bits), bits

    @property
    def widest(self) -> int | None:
        """The largest width that an expert may be served with; None for floats."""
        return self._bits

    def planes(self, layer: int, expert: int) -> int:
        """Planes that an expert is served with, from the lowest."""
        return self._planes

    def bits(self, layer: int, expert: int) -> int | None:
        """Width that an expert is served with; None for floats."""
        return self._bits

    def observe(self, layer: int, counts: Mapping[int, int]) -> None:
        """Tokens that went to each expert in a pass."""

    def update(self) -> list[Key]:
        """A pass begins: planes that are no longer served from now on."""
        return []


class PlannedWidths(Widths):
    """Every expert at the width that the artifact's plan gives it.

    Args:
        files: the experts, with all of the plan's widths.
        plan_LE: width of every expert of every layer.
    """

    def __init__(self, files: ExpertFiles, plan_LE: Sequence[Sequence[int]]) -> None:
        super().__init__(files, max(max(bits_E) for bits_E in plan_LE))
        self._files, self._plan = files, plan_LE

    def planes(self, layer: int, expert: int) -> int:
        """Planes that an expert is served with."""
        return self._files.planes_of(self.bits(layer, expert))

    def bits(self, layer: int, expert: int) -> int:
        """Width that an expert is served with."""
        return self._plan[layer][expert]

    def total_bytes(self) -> int:
        """Bytes of all planes that are served."""
        return sum(
            self._files.size((layer, expert, plane))
            for layer, bits_E in enumerate(self._plan)
            for expert in range(len(bits_E))
            for plane in range(self.planes(layer, expert))
        )


class BudgetWidths(Widths):
    """Widths by use, under a budget of bytes, with hysteresis.

    Args:
        files: the experts, with all of `widths`.
        widths: that may be served, ascending.
        budget: bytes of all served planes together.
        decay: weight of the newest pass in the mean use of an expert.
        hysteresis: how much more than a served plane's another one's gain must be to replace it.

    Raises:
        UsageError: the budget does not hold the base planes of all experts.
    """

    def __init__(
        self,
        files: ExpertFiles,
        widths: Sequence[int],
        budget: int,
        *,
        decay: float = 0.05,
        hysteresis: float = 1.2,
    ) -> None:
        super().__init__(files, widths[-1])
        self._files, self._widths, self._budget = files, tuple(widths), budget
        self._decay, self._hysteresis = decay, hysteresis
        self._level = dict.fromkeys(self._experts(), 0)
        self._use = dict.fromkeys(self._experts(), 0.0)
        self._base = files.total_bytes(files.planes_of(widths[0]))
        if budget < self._base:
            raise UsageError(
                f"{files.folder}: a budget of {budget} bytes, the base planes of all experts "
                f"({widths[0]} bits) take {self._base}"
            )

    def _experts(self) -> list[tuple[int, int]]:
        layers, experts = self._files.layers, self._files.num_experts
        return [(layer, expert) for layer in range(layers) for expert in range(experts)]

    def planes(self, layer: int, expert: int) -> int:
        """Planes that an expert is served with now."""
        return self._files.planes_of(self.bits(layer, expert))

    def bits(self, layer: int, expert: int) -> int:
        """Width that an expert is served with now."""
        return self._widths[self._level[layer, expert]]

    def observe(self, layer: int, counts: Mapping[int, int]) -> None:
        """Fold a pass into the mean use of a layer's experts, shares of its tokens."""
        total = sum(counts.values()) or 1
        for expert in range(self._files.num_experts):
            share = counts.get(expert, 0) / total
            self._use[layer, expert] += self._decay * (share - self._use[layer, expert])

    def update(self) -> list[Key]:
        """Choose the widths anew; returns the planes that are not served any more."""
        before, self._level = self._level, self._choose()
        gone: list[Key] = []
        for (layer, expert), level in before.items():
            planes = self._files.planes_of(self._widths[level])
            keys = [(layer, expert, p) for p in range(self.planes(layer, expert), planes)]
            gone += reversed(keys)
        return gone

    def _choose(self) -> dict[tuple[int, int], int]:
        level = dict.fromkeys(self._level, 0)
        free = self._budget - self._base
        heap = [step for place in level if (step := self._step(place, 0)) is not None]
        heapq.heapify(heap)
        while heap:
            _, place, size = heapq.heappop(heap)
            # What does not fit is skipped, smaller steps of others may; an expert's own do not.
            if size > free:
                continue
            free -= size
            level[place] += 1
            if (step := self._step(place, level[place])) is not None:
                heapq.heappush(heap, step)
        return level

    def _step(
        self, place: tuple[int, int], level: int
    ) -> tuple[float, tuple[int, int], int] | None:
        """(minus the gain per byte, expert, bytes) of one more width; None at the widest."""
        if level + 1 == len(self._widths) or not self._use[place]:
            return None
        low, high = self._widths[level : level + 2]
        planes = range(self._files.planes_of(low), self._files.planes_of(high))
        size = sum(self._files.size((*place, plane)) for plane in planes)
        error = _ERROR_PER_BIT**-low - _ERROR_PER_BIT**-high
        held = self._hysteresis if self._level[place] > level else 1.0
        return -self._use[place] * error * held / size, place, size
