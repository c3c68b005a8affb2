"""Routed, static or quantized: which of the measured models to use, and what limits it.

Speed is by formula (`run.speed`), quality by paired perplexity. A model is kept in a regime if no
other is at least as fast and better, or as good and faster or simpler. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fissile.run.advice import LABELS, Advice, compare
from fissile.run.metrics import Metrics, Score, find_variant
from fissile.run.metrics_routing import Division
from fissile.run.speed import (
    BATCHES,
    ffn_share_of_arithmetic,
    ffn_share_of_bytes,
    quantized_speedup,
    routed_speedup,
    static_speedup,
)

_RECOVERIES = ("trained", "refit", "none")
_ROUTED = ("pregate", "pregate_dynamic", "per_layer", "per_layer_dynamic", "ridge", "dynamic")
_TIE = 5.0
"""Percent of perplexity by which a tie may be worse at two standard errors."""
_REGIMES = (
    ("Limited by arithmetic (prefill, large batches)", None),
    ("Limited by memory traffic, one stream", 1),
    ("Limited by memory traffic, batch 8", 8),
    ("Limited by memory traffic, batch 64", 64),
)


@dataclass(frozen=True)
class Option:
    """A measured model with what it can gain.

    Args:
        name: as the report calls it.
        score: on held-out text.
        simplicity: 0 dense, 1 quantized, 2 static, 3 routed, 4 both; the simpler wins a tie.
        bytes: of its weights, None if not known.
        speed: bound on the speed-up over the dense model in 16 bits, by batch size; None is the
            bound by arithmetic.
    """

    name: str
    score: Score
    simplicity: int
    bytes: int | None
    speed: dict[int | None, float]


def options(metrics: Metrics, share: float | None = None) -> list[Option]:
    """Every measured model at an active share, dense and quantized ones included.

    Args:
        metrics: of one run.
        share: by default that of the converted model.
    """
    weights, share = metrics.weights, metrics.active_share if share is None else share
    if metrics.dense is None or metrics.dense.ppl is None or weights is None:
        return []
    batches: list[int | None] = [None, *BATCHES]
    size = 2 * (weights.ffn + weights.attention + weights.head + weights.embedding)
    found = [Option("dense", metrics.dense, 0, size, dict.fromkeys(batches, 1.0))]
    division = division_of(metrics, share)
    found += _floats(metrics, share, division)
    for row in metrics.widths:
        routed = row.of == "converted"
        if row.method != "nested" or not row.ppl or not row.bytes or not row.bits_per_weight:
            continue
        if routed and (division is None or share != metrics.active_share):
            continue
        what = "converted" if routed else "dense"
        speed = {
            b: quantized_speedup(
                weights, row.bytes, row.bits_per_weight, division if routed else None, b
            )
            for b in batches
        }
        name = f"{what}, {row.bits} bits"
        found.append(Option(name, row, 4 if routed else 1, row.bytes, speed))
    return found


def division_of(metrics: Metrics, share: float | None) -> Division | None:
    """How the FFN is divided at an active share, None where it was not measured."""
    if share is None:
        return None
    return next((d for d in metrics.divisions if math.isclose(d.wanted, share)), None)


def _floats(metrics: Metrics, share: float | None, division: Division | None) -> Iterator[Option]:
    """The static model and the router that is shipped, at the last recovery that both have.

    Where there is none, the router alone: a trained and an untrained model do not compare.
    """
    if share is None or division is None or (weights := metrics.weights) is None:
        return
    batches: list[int | None] = [None, *BATCHES]
    idle = 2 * weights.ffn * (1 - division.share)
    total = 2 * (weights.ffn + weights.attention + weights.head + weights.embedding)
    found = []
    for recovery in _RECOVERIES:
        named = (find_variant(metrics, name, share, recovery) for name in _ROUTED)
        if routed := next((v for v in named if v is not None), None):
            found.append((find_variant(metrics, "static", share, recovery), routed))
    if not found:
        return
    static, routed = next((pair for pair in found if pair[0] is not None), found[0])
    speeds = {b: routed_speedup(weights, division, b) for b in batches}
    yield Option(LABELS[routed.name], routed, 3, total, speeds)
    if static is not None:
        speeds = {b: static_speedup(weights, division.share, b) for b in batches}
        yield Option(LABELS["static"], static, 2, round(total - idle), speeds)


def frontier(found: list[Option], batch: int | None) -> list[Option]:
    """Models that no other one makes pointless, the fastest first.

    Args:
        found: from `options`.
        batch: of the speed; None for the bound by arithmetic.
    """
    kept = [o for o in found if not any(_beats(p, o, batch) for p in found if p is not o)]
    return sorted(kept, key=lambda o: (-o.speed[batch], o.score.ppl or math.inf))


def _beats(a: Option, b: Option, batch: int | None) -> bool:
    """Whether a makes b pointless: as fast and better, or no worse and faster or simpler."""
    against = compare(a.score, b.score)
    if against is None or a.speed[batch] < 0.999 * b.speed[batch]:
        return False
    if against.verdict == "better":
        return True
    # A difference that is not separated is a tie only if it is known to be small.
    worst = math.inf if against.error is None else against.percent + 2 * against.error
    even = against.verdict == "same" and (against.percent <= 0 or worst <= _TIE)
    faster = a.speed[batch] > 1.001 * b.speed[batch]
    return even and (faster or a.simplicity < b.simplicity)


def choose(metrics: Metrics) -> Iterator[Advice]:
    """One statement per regime, the formula's numbers in it, and what errors do not separate.

    Args:
        metrics: of one run.
    """
    found = options(metrics)
    if len(found) < 2 or metrics.weights is None or metrics.dense is None:
        return
    weights = metrics.weights
    for regime, batch in _REGIMES:
        share = ffn_share_of_arithmetic if batch is None else ffn_share_of_bytes
        best = [o for o in frontier(found, batch) if o.name != "dense"]
        if not best:
            yield Advice("note", "choice", f"{regime}: nothing measured beats the dense model.")
            continue
        named = "; ".join(_describe(o, batch, metrics.dense) for o in best)
        only = "use the " + named if len(best) == 1 else "by speed, " + named
        yield Advice("note", "choice", f"{regime}, φ = {share(weights):.2f}: {only}.")
    if not any(o.simplicity == 1 for o in found):
        yield Advice(
            "note",
            "choice",
            "The quantized dense model was not measured, so it is missing from this choice.",
        )
    yield from _unseparated(found)


def _describe(option: Option, batch: int | None, dense: Score) -> str:
    against = compare(option.score, dense)
    cost = "" if against is None else f", perplexity {against} than the dense model's"
    size = "" if option.bytes is None else f" in {option.bytes / 1e6:,.1f} MB"
    named = option.name if option.simplicity in (2, 3) else f"{option.name} model"
    return f"{named}{size} (at most {option.speed[batch]:.2f}×{cost})"  # noqa: RUF001


def _unseparated(found: list[Option]) -> Iterator[Advice]:
    pairs = []
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            against = compare(a.score, b.score)
            if against is not None and against.verdict == "same":
                what = f"{against}" if against.error is not None else "no error is known"
                pairs.append(f"{a.name} and {b.name} ({what})")
    if pairs:
        more = f" and {len(pairs) - 6} more pairs" if len(pairs) > 6 else ""
        yield Advice(
            "note",
            "errors",
            "Perplexities that two standard errors, paired over documents, do not separate: "
            + "; ".join(pairs[:6])
            + more
            + ". Between these, speed, size and simplicity decide.",
        )
