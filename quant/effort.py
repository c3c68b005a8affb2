"""How much work a solve does at every effort: numbers, for the solver and for its estimate."""

from __future__ import annotations

from dataclasses import dataclass

from fissile.config import Effort

ERROR_VALUES = 1 << 23
"""Float32 errors, at all widths and in all copies, of the rows that are solved at once."""


@dataclass(frozen=True)
class Plan:
    """How much work a solve does.

    Attributes:
        shrinks: range candidates, factors of the min-max half-range.
        multipliers: greedy starts; how far each grid reaches, in units of the searched range.
        ridges: of the Hessian, stage after stage, in units of the one asked for; the last is 1.
            Under a large ridge columns hardly make up for each other and codes stay near the
            weights; as it falls, codes that are near each other at all widths follow, where a
            start under the small one has each width run its own way.
        alternations: rounds of coordinate descent and float step, of every stage.
        sweeps: descent passes a round.
        retries: rounds of a stage that first propose new codes for the floats found so far: a
            greedy start and `samples` sampled ones (Klein) around floats that are moved a little,
            each polished by one descent pass. Alternating alone ends where codes and floats fit
            each other.
        samples: sampled proposals a retry.
    """

    shrinks: tuple[float, ...]
    multipliers: tuple[float, ...]
    ridges: tuple[float, ...]
    alternations: int
    sweeps: int
    retries: int
    samples: int

    @property
    def copies(self) -> int:
        """Most copies of the rows that are alive at once."""
        return max(len(self.multipliers), 1 + self.samples if self.retries else 1)

    @property
    def proposals(self) -> int:
        """Sets of new codes that are polished, in all stages together."""
        return len(self.ridges) * min(self.retries, self.alternations) * (1 + self.samples)

    @property
    def rounds(self) -> int:
        """Rounds of descent and float step, in all stages together."""
        return len(self.ridges) * self.alternations


PLANS: dict[Effort, Plan] = {
    "fast": Plan((0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 1.0), (1.0,), (1,), 1, 1, 0, 0),
    "balanced": Plan(tuple(x / 20 for x in range(5, 23, 2)), (1.0,), (30, 10, 3, 1), 1, 1, 1, 1),
    "best": Plan(tuple(x / 20 for x in range(5, 23)), (1.0, 1.12), (100, 30, 10, 3, 1), 2, 1, 2, 5),
}
