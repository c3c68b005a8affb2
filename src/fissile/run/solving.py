"""Which model is quantized how: what the processes of a run tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fissile.config import Baseline, Quantize, Recipe
from fissile.quant.solvers import Solver
from fissile.run.nesting import baseline_solver, nested_solver


@dataclass(frozen=True)
class Job:
    """One model to quantize.

    Attributes:
        unit: of the journal, where its layers go.
        dense: the dense model, not the recipe's own.
        baseline: another solver than the recipe's own.
        bits: its width.
    """

    unit: str
    dense: bool = False
    baseline: Baseline | None = None
    bits: int | None = None

    def solver(self, recipe: Recipe) -> Solver:
        """What solves it."""
        if self.baseline is None or self.bits is None:
            return nested_solver(recipe.quantize, recipe.seed)
        return baseline_solver(self.baseline, self.bits, recipe.quantize, recipe.seed)

    def generated(self, settings: Quantize) -> int:
        """Windows written for each of the text; those of others know the text alone."""
        return settings.generated if self.baseline in (None, "dedicated") else 0

    def task(self) -> dict[str, Any]:
        """A call to the other processes."""
        return {"task": "quantize", **vars(self)}

    @classmethod
    def of(cls, task: Mapping[str, Any]) -> Job:
        """Undo `task`."""
        return cls(**{name: value for name, value in task.items() if name != "task"})
