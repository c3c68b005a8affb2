"""What the measurements say about which model to use, by rules that name the better choice.

A difference counts when it exceeds two standard errors (paired over documents). Below that, the
simpler model is recommended. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fissile.run.gap import variant_gap
from fissile.run.metrics import (
    Metrics,
    Recovery,
    Score,
    WidthScore,
    find_variant,
    find_width,
    shares,
)

Verdict = Literal["better", "worse", "same"]
Level = Literal["good", "note", "warning"]
_ERRORS = 2.0
_RECOVERIES: tuple[Recovery, ...] = ("none", "refit", "trained")
LABELS = {
    "dense": "dense",
    "static": "static model",
    "random": "random experts",
    "ridge": "ridge router",
    "pregate": "pre-gating router",
    "oracle": "oracle router",
    "all_experts": "all experts",
    "pregate_dynamic": "pre-gating, varying number",
    "per_layer": "pre-gating, a head per layer",
    "per_layer_dynamic": "pre-gating, a head per layer, varying number",
    "mean_gate": "mean gate rows",
    "spectral": "spectral router",
    "token": "pre-gating by token id",
    "readme": "Read-ME",
    "cmoe": "CMoE",
    "expertweaver": "ExpertWeaver",
    "emoe": "EMoE",
    "oracle_layerwise": "oracle, layer-wise experts",
    "oracle_per_layer": "oracle, experts for heads per layer",
    "dynamic": "ridge router, varying number",
    "static_uniform": "static model, layers alike",
    "none": "before recovery",
    "refit": "after the re-fit",
    "trained": "after training",
}


@dataclass(frozen=True)
class Advice:
    """One statement.

    Args:
        level: "good" (the method pays), "note", or "warning" (something better exists, or failed).
        topic: "routing", "router", "recovery", "memory", "nesting", "width", "load", "checks".
        text: one or two sentences.
    """

    level: Level
    topic: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """Two perplexities, a against b.

    Args:
        percent: 100 (ppl_a / ppl_b - 1); negative means that a is better.
        error: its standard error, None if unknown.
        verdict: of a, at two standard errors; without an error any difference is "same".
    """

    percent: float
    error: float | None
    verdict: Verdict

    def __str__(self) -> str:
        """In words: "3.1 ± 0.4 % higher"."""
        side = "lower" if self.percent < 0 else "higher"
        digits = 2 if self.error is not None and self.error < 0.05 else 1
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{abs(self.percent):.{digits}f}{error} % {side}"


def compare(a: Score, b: Score) -> Comparison | None:
    """Compare two perplexities; None if either is missing.

    Args:
        a: the model that is judged.
        b: what it is judged against.
    """
    found = a.log_ratio(b)
    if found is None:
        return None
    ratio, error = found
    percent = 100 * math.expm1(ratio)
    if error is None:
        return Comparison(percent, None, "same")
    verdict: Verdict = "same"
    if abs(ratio) > _ERRORS * error:
        verdict = "better" if ratio < 0 else "worse"
    return Comparison(percent, 100 * math.exp(ratio) * error, verdict)


def advise(metrics: Metrics) -> list[Advice]:
    """All statements that the measurements support: checks, routing, memory, widths, load.

    Args:
        metrics: of one run.
    """
    if metrics.dense is None or metrics.dense.ppl is None:
        return [
            Advice("note", "checks", "No held-out measurement was made, so nothing is advised.")
        ]
    return [
        *_checks(metrics),
        *_routing(metrics),
        *_router(metrics),
        *_memory(metrics),
        *_widths(metrics),
        *_nesting(metrics),
        *_load(metrics),
    ]


def _checks(metrics: Metrics) -> Iterator[Advice]:
    failed = [check for check in metrics.verify if not check.ok]
    if failed:
        names = ", ".join(check.name for check in failed)
        yield Advice("warning", "checks", f"Verification failed ({names}): do not use the model.")


def _routing(metrics: Metrics) -> Iterator[Advice]:
    for share in shares(metrics):
        for name in ("pregate", "ridge"):
            yield from _against_static(metrics, name, share)
            if any(v.name == name and math.isclose(v.share, share) for v in metrics.variants):
                break  # the ridge router matters here only where no pre-gating router was made


def _against_static(metrics: Metrics, name: str, share: float) -> Iterator[Advice]:
    unpaired = ""
    for recovery in reversed(_RECOVERIES):
        routed = find_variant(metrics, name, share, recovery)
        static = find_variant(metrics, "static", share, recovery)
        if routed is None:
            continue
        against = compare(routed, static) if static else None
        if static is None or against is None:
            unpaired = (
                f" The {LABELS[name]} was measured {LABELS[recovery]}, the static model was not,"
                " which says nothing about routing (evaluate.control_recover_steps trains the"
                " controls too)."
            )
            continue
        where = f"At active share {share:g} ({LABELS[recovery]})"
        what = f"perplexity with the {LABELS[name]} is {against} than the static model's"
        if against.verdict == "better":
            gap = variant_gap(metrics, routed, "static")
            closed = f" It closes {gap} of the gap to the oracle router." if gap else ""
            yield Advice("good", "routing", f"{where} routing pays: {what}.{closed}{unpaired}")
        elif against.verdict == "worse":
            yield Advice(
                "warning",
                "routing",
                f"{where} routing does not pay: {what}. Use the static model: it is better and"
                f" needs no router.{unpaired}",
            )
        else:
            yield Advice(
                "warning",
                "routing",
                f"{where} routing cannot be told from static pruning: {what}. Prefer the static"
                f" model: it needs no router.{unpaired}",
            )
        return
    if unpaired:
        yield Advice("note", "routing", f"At active share {share:g} nothing compares:{unpaired}")


def _router(metrics: Metrics) -> Iterator[Advice]:
    for share in shares(metrics):
        for recovery in reversed(_RECOVERIES):
            ours = find_variant(metrics, "pregate", share, recovery)
            random = find_variant(metrics, "random", share, recovery)
            ridge = find_variant(metrics, "ridge", share, recovery)
            if ours is None or (random is None and ridge is None):
                continue
            where = f"At active share {share:g} ({LABELS[recovery]})"
            chance = compare(ours, random) if random else None
            if chance is not None and chance.verdict != "better":
                yield Advice(
                    "warning",
                    "router",
                    f"{where} the pre-gating router does no better than random experts"
                    f" (perplexity {chance}): it learned nothing that helps.",
                )
            other = compare(ours, ridge) if ridge else None
            if other is not None and other.verdict == "worse":
                yield Advice(
                    "note",
                    "router",
                    f"{where} the pre-gating router's perplexity is {other} than the layer-wise"
                    " ridge router's; that one decides inside each layer, not before the first.",
                )
            break


def _nested(metrics: Metrics) -> list[WidthScore]:
    """Nested widths, the widest first."""
    found = [w for w in metrics.widths if w.method == "nested" and w.of == "converted"]
    return sorted(found, key=lambda w: -(w.bits or 0))


def _base(metrics: Metrics) -> tuple[Score | None, str]:
    """What the quantized models were made from, and its name."""
    floats = find_width(metrics, "float", None)
    return (floats, "float model") if floats else (metrics.dense, "dense model")


def _memory(metrics: Metrics) -> Iterator[Advice]:
    if not (nested := _nested(metrics)):
        return
    top, (base, name) = nested[0], _base(metrics)
    cost = compare(top, base) if base else None
    if cost is not None and top.bytes and metrics.dense_bytes:
        size = 100 * top.bytes / metrics.dense_bytes
        yield Advice(
            "good" if cost.percent < 5 else "note",
            "memory",
            f"At {top.bits} bits the weights take {size:.0f} % of the dense checkpoint's bytes;"
            f" perplexity is {cost} than the {name}'s.",
        )
    if any(v.share < 1 and v.name in ("pregate", "ridge") for v in metrics.variants):
        yield from _equal_memory(metrics, top)


def _widths(metrics: Metrics) -> Iterator[Advice]:
    base, name = _base(metrics)
    for width in _nested(metrics)[1:]:
        cost = compare(width, base) if base else None
        if cost is not None and cost.percent > 30 and cost.verdict == "worse":
            yield Advice(
                "warning",
                "width",
                f"At {width.bits} bits perplexity is {cost} than the {name}'s; serve more bits"
                " where memory allows.",
            )


def _equal_memory(metrics: Metrics, top: WidthScore) -> Iterator[Advice]:
    """Routing computes less but stores everything; 4-bit weights are its rival for memory."""
    alone = [w for w in metrics.widths if w.of == "dense" and w.bits == top.bits and w.ppl]
    if not alone:
        yield Advice(
            "note",
            "memory",
            "Routing saves arithmetic, not memory: all experts are stored. Whether the dense model"
            f" at {top.bits} bits would serve better in the same memory was not measured.",
        )
        return
    best = min(alone, key=lambda w: w.ppl or math.inf)
    against = compare(best, top)
    if against is not None and against.verdict == "better":
        yield Advice(
            "warning",
            "memory",
            f"In the same memory, perplexity of the dense model at {best.bits} bits is {against}"
            f" than the converted one's. Use {best.bits}-bit weights alone unless arithmetic is"
            " the limit.",
        )


def _nesting(metrics: Metrics) -> Iterator[Advice]:
    prices = []
    for ours in _nested(metrics):
        for method in ("gptq", "rtn"):
            rival = find_width(metrics, method, ours.bits)
            against = compare(ours, rival) if rival else None
            if against is not None and against.verdict == "worse":
                yield Advice(
                    "warning",
                    "nesting",
                    f"At {ours.bits} bits perplexity of the nested code is {against} than plain"
                    f" {method.upper()}'s.",
                )
        alone = find_width(metrics, "dedicated", ours.bits)
        cost = compare(ours, alone) if alone else None
        if cost is not None:
            within = ", within the error" if cost.verdict == "same" else ""
            prices.append(f"{cost} at {ours.bits} bits{within}")
    if prices:
        yield Advice(
            "note",
            "nesting",
            "One file for every width, against a code made for each width alone: perplexity"
            f" {'; '.join(prices)}.",
        )


def _load(metrics: Metrics) -> Iterator[Advice]:
    rows = metrics.routing.expert_load if metrics.routing else []
    peaks = [max(row) * len(row) / sum(row) for row in rows if row and sum(row) > 0]
    if peaks and max(peaks) > 2:
        yield Advice(
            "note",
            "load",
            f"The busiest expert takes {max(peaks):.1f} times its even share; route.balance evens"
            " the load where experts run on separate devices.",
        )
