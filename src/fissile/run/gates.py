"""Gates: how much of the dense model's scores every served width must recover.

Recovery is the dense perplexity over the model's (perplexity) or its accuracy over the dense
model's (choices): 1 is the dense score, more is better for both. A gate is missed where the whole
95 % interval of the recovery, paired over documents, lies below the limit: a score that merely may
be too low on few items is reported, not failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from fissile.config import Limits, Strict
from fissile.errors import QualityGate
from fissile.eval.compare import bootstrap_ratio
from fissile.run.ledger import Event

_RESAMPLES = 4000


class AnswerScore(Strict):
    """Accuracy of one model on multiple-choice items; higher is better."""

    accuracy: float
    stderr: float | None = None
    by_subject: dict[str, float] = Field(default_factory=dict)
    credit: list[float] = Field(default_factory=list, description="per item, 0 to 1")
    documents: list[str] = Field(default_factory=list, description="per item, what it was cut from")


class GateRow(Strict):
    """One gate and how it was met."""

    task: Literal["perplexity", "choices"]
    model: str = Field(description='"float" for the converted model, else its bits')
    limit: float = Field(description="least recovery of the dense score")
    recovery: float | None = Field(None, description="None: not measured")
    low: float | None = Field(None, description="lower end of the paired 95 % interval")
    high: float | None = Field(None, description="upper end")
    ok: bool

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.task} of {served_name(self.model)}"

    @property
    def detail(self) -> str:
        """Recovery, interval and limit, and by how much a limit was missed."""
        if self.recovery is None:
            return f"was not measured, limit {self.limit:g}"
        found = f"recovery {self.recovery:.3f} of the dense score"
        if self.low is not None and self.high is not None:
            found += f" (95 % interval {self.low:.3f} to {self.high:.3f})"
        short = self.limit - self.recovery
        if not self.ok:
            return f"{found}, limit {self.limit:g}: missed by {short:.3f}"
        doubt = ": below it, but within the interval" if short > 0 else ""
        return f"{found}, limit {self.limit:g}{doubt}"


def served_name(model: str) -> str:
    """A width in words."""
    return "the converted model in floats" if model == "float" else f"{model} bits"


def check_gates(limits: Limits, record: Mapping[str, Any]) -> list[GateRow]:
    """Compare the scores of the evaluate stage with the recipe's limits.

    Args:
        limits: of the recipe.
        record: with `dense` and `widths`, scores as in metrics.json.
    """
    served = {
        "float" if w["method"] == "float" else str(w["bits"]): w
        for w in record["widths"]
        if w["method"] in ("float", "nested") and w.get("of", "converted") == "converted"
    }
    rows = []
    for task, wanted in limits.recovery.items():
        asked = wanted if isinstance(wanted, dict) else dict.fromkeys(served, wanted)
        for model, limit in asked.items():
            score = served.get(str(model))
            found = _recovery(task, record["dense"], score) if score is not None else None
            rows.append(_row(task, str(model), limit, found))
    return rows


def gate_events(rows: Sequence[GateRow]) -> Iterator[Event]:
    """Missed gates as rows of the ledger."""
    for row in rows:
        if not row.ok:
            yield Event("gate_missed", "evaluate", None, row.name, row.detail, row.recovery)


def enforce_gates(rows: Sequence[GateRow]) -> None:
    """Fail if a gate was missed.

    Raises:
        QualityGate: names every missed gate, and by how much.
    """
    missed = [f"{row.name}: {row.detail}" for row in rows if not row.ok]
    if missed:
        raise QualityGate(f"limits.recovery missed: {'; '.join(missed)}")


Found = tuple[float, float | None, float | None]


def _row(task: Any, model: str, limit: float, found: Found | None) -> GateRow:
    if found is None:
        return GateRow(task=task, model=model, limit=limit, ok=False)
    recovery, low, high = found
    ok = (recovery if high is None else high) >= limit
    return GateRow(
        task=task, model=model, limit=limit, recovery=recovery, low=low, high=high, ok=ok
    )


def _recovery(task: str, dense: Mapping[str, Any], score: Mapping[str, Any]) -> Found | None:
    """Recovery and its interval; None where one of the two was not measured."""
    if task == "perplexity":
        return _of_perplexity(dense, score)
    ours, theirs = score.get("choices"), dense.get("choices")
    if not ours or not theirs or theirs["accuracy"] <= 0:
        return None
    credit: dict[str, list[float]] = {}
    columns = (ours["documents"], ours["credit"], theirs["credit"])
    for document, mine, other in zip(*columns, strict=True):
        total = credit.setdefault(document, [0.0, 0.0])
        total[0] += mine
        total[1] += other
    recovery = ours["accuracy"] / theirs["accuracy"]
    return recovery, *_interval([c[0] for c in credit.values()], [c[1] for c in credit.values()])


def _of_perplexity(dense: Mapping[str, Any], score: Mapping[str, Any]) -> Found | None:
    if not score.get("ppl") or not dense.get("ppl") or not math.isfinite(score["ppl"]):
        return None
    tokens = score["document_tokens"]
    lost = [m - d for m, d in zip(score["document_nll"], dense["document_nll"], strict=True)]
    low, high = _interval(lost, tokens)
    ends = (None, None) if low is None or high is None else (math.exp(-high), math.exp(-low))
    return dense["ppl"] / score["ppl"], *ends


def _interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float | None, float | None]:
    """Bootstrap interval of a ratio; none from a single document or without a denominator."""
    if len(sums) < 2:
        return None, None
    found = bootstrap_ratio(sums, counts, resamples=_RESAMPLES, seed=0)
    return (found.low, found.high) if math.isfinite(found.high) else (found.low, None)
