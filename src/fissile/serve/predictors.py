"""What is known of the experts before they are needed: nothing, a guess, or the router's word.

Shapes: T rows, D decisions, K chosen, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fissile.errors import UsageError
from fissile.registry import suggest
from fissile.serve.trace import Trace

GUESS = 0.85
"""Accuracy of the next layer's gate where a trace does not say."""
_DRAWS = 8


@dataclass(frozen=True)
class Predictor:
    """How well and how far ahead the routes are known.

    Args:
        name: as it is chosen.
        accuracy: share of the chosen experts that are named; in place of the others, others. None:
            as measured when the trace was recorded, `GUESS` where it was not.
        layers: layers after the current one that are known while it runs; None: all, before the
            pass begins, which also tells the scheduler.
        passes: passes after the current one that are known for prompts that wait; tokens that are
            not generated yet are never known.
    """

    name: str
    accuracy: float | None = 1.0
    layers: int | None = 0
    passes: int = 0

    @property
    def knows(self) -> bool:
        """Whether anything is known ahead."""
        return self.layers is None or self.layers > 0

    def routes(self, trace: Trace, seed: int = 0) -> NDArray[np.int16]:
        """What it says of every row, int16 (T, D, K); the same for the same seed.

        A wrong name is another expert, drawn as often as experts are chosen.

        Args:
            trace: the truth.
            seed: of the errors.
        """
        truth: NDArray[np.int16] = trace.routes
        accuracy = self.accuracy
        if accuracy is None:
            accuracy = trace.source.get("next_gate_recall") or GUESS
        if accuracy >= 1:
            return truth
        rng = np.random.default_rng(seed)
        wrong = (rng.random(truth.shape) >= accuracy) & (truth >= 0)
        return np.where(wrong, _others(truth, trace.model.experts, rng), truth)


def _others(truth: NDArray[np.int16], experts: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """For every choice another expert, drawn as often as its decision chooses it."""
    found = truth.copy()
    for _ in range(_DRAWS):
        row, decision, slot = np.nonzero((found == truth) | (found < 0))
        if not len(row):
            return found
        rows = rng.integers(0, len(truth), len(row))
        slots = rng.integers(0, truth.shape[2], len(row))
        found[row, decision, slot] = truth[rows, decision, slots]
    # A decision that hardly ever varies: any other expert.
    shift = rng.integers(1, max(2, experts), truth.shape)
    same = (found == truth) | (found < 0)
    return np.where(same, (truth + shift) % experts, found).astype(np.int16)


PREDICTORS = {
    "none": Predictor("none"),
    "next-gate": Predictor("next-gate", accuracy=None, layers=1),
    "path": Predictor("path", accuracy=0.9, layers=None),
    "pregate": Predictor("pregate", layers=None, passes=1),
}
"""Predictors by name: none; the next layer's gate on this layer's input (HybriMoE looks 3 layers
ahead); ExpertFlow's routing path before the pass; a pre-gating router, exact, which also knows the
prompts of the passes to come."""


def make_predictor(spec: str) -> Predictor:
    """A predictor from its name and, after colons, its parameters.

    Args:
        spec: "none", "next-gate[:accuracy[:layers]]", "path[:accuracy]" or "pregate[:passes]"; an
            empty accuracy is the default.

    Raises:
        UsageError: no such predictor, or parameters out of range.
    """
    name, *values = spec.split(":")
    if name not in PREDICTORS:
        known = list(PREDICTORS)
        raise UsageError(
            f"unknown predictor {name!r}{suggest(name, known)} (known: {', '.join(known)})"
        )
    base = PREDICTORS[name]
    most = {"next-gate": 2, "path": 1, "pregate": 1}.get(name, 0)
    try:
        if len(values) > most:
            raise ValueError
        accuracy, layers, passes = base.accuracy, base.layers, base.passes
        if name == "pregate":
            passes = int(values[0]) if values else passes
        elif values:
            accuracy = float(values[0]) if values[0] else accuracy
            layers = int(values[1]) if len(values) > 1 else layers
        if (
            not 0 <= (accuracy or 0) <= 1
            or passes < 0
            or (layers is not None and layers < base.knows)
        ):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"predictor {spec!r}: expected next-gate[:accuracy 0 to 1[:layers ahead]],"
            " path[:accuracy] or pregate[:passes ahead]"
        ) from None
    return Predictor(name, accuracy, layers, passes)


def layer_counts(
    routes: NDArray[np.int16], rows: NDArray[np.int64], layers: int, experts: int
) -> NDArray[np.int64]:
    """How many of some rows chose each expert, int64 (L, E); read-only where D is 1.

    Args:
        routes: (T, D, K).
        rows: into it.
        layers: L.
        experts: E.
    """
    picked = routes[rows]
    decisions = picked.shape[1]
    index = picked + (np.arange(decisions) * experts)[None, :, None]
    found = np.bincount(index[picked >= 0], minlength=decisions * experts)
    return np.broadcast_to(found.reshape(decisions, experts), (layers, experts))


def route_mask(routes: NDArray[np.int16], experts: int) -> int:
    """The experts of some rows as a set: bit decision * E + expert.

    Args:
        routes: (rows, D, K).
        experts: E.
    """
    decisions = routes.shape[1]
    bits = np.zeros(decisions * experts, dtype=bool)
    index = routes + (np.arange(decisions) * experts)[None, :, None]
    bits[index[routes >= 0]] = True
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
