"""The report's tables: metrics in, table or None (not measured) out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fissile.run.advice import LABELS, compare
from fissile.run.ledger import Ledger
from fissile.run.metrics import Metrics, Score
from fissile.run.page import (
    Column,
    Html,
    Text,
    folded,
    mark,
    paragraph,
    preformatted,
    table,
)

NONE = "\u2013"
_LEDGER_ROWS = 50
_WORST = 8


def summary_rows(metrics: Metrics) -> list[dict[str, Any]]:
    """Dense, the converted model, and every nested width, as plain data."""
    if metrics.dense is None:
        return []
    rows = [{"model": "dense", "bytes": metrics.dense_bytes, **_score_row(metrics.dense, None)}]
    for width in sorted(metrics.widths, key=lambda w: -(w.bits or 99)):
        if width.method in ("float", "nested"):
            name = "converted, floats" if width.method == "float" else f"nested, {width.bits} bits"
            name = f"dense, {name}" if width.of == "dense" else name
            row = _score_row(width, metrics.dense)
            extra = {"bytes": width.bytes, "bits_per_weight": width.bits_per_weight}
            rows.append({"model": name, **extra, **row})
    return rows


def _score_row(score: Score, dense: Score | None) -> dict[str, Any]:
    against = compare(score, dense) if dense is not None else None
    return {
        "ppl": score.ppl,
        "stderr": score.stderr,
        "percent_against_dense": against.percent if against else None,
        "percent_error": against.error if against else None,
    }


def summary_table(metrics: Metrics) -> Html | None:
    """Dense, converted and nested models with paired differences."""
    rows = summary_rows(metrics)
    if not rows:
        return None
    columns = [
        Column("model", ""),
        Column("perplexity"),
        Column("± stderr"),
        Column("against dense"),
        Column("bits / weight"),
        Column("MB read"),
    ]
    cells = [
        [
            row["model"],
            _number(row["ppl"], 2),
            _number(row["stderr"], 2),
            _percent(row["percent_against_dense"], row["percent_error"]),
            _number(row.get("bits_per_weight"), 2),
            _megabytes(row.get("bytes")),
        ]
        for row in rows
    ]
    share = metrics.active_share
    what = "The dense model" if share is None else f"Dense and converted (active share {share:g})"
    return table(
        f"{what} on held-out text. Errors of “against dense” are paired over documents;"
        " the plain standard error holds the spread between documents too.",
        columns,
        cells,
        key=0,
    )


def control_table(metrics: Metrics) -> Html | None:
    """Every control at every share and recovery."""
    if not metrics.variants:
        return None
    domains = sorted({name for v in metrics.variants for name in v.by_domain})
    order = {"none": 0, "refit": 1, "trained": 2}
    rows: list[list[Text]] = []
    for v in sorted(metrics.variants, key=lambda v: (-v.share, order[v.recovery], v.ppl or 1e99)):
        against = compare(v, metrics.dense) if metrics.dense else None
        rows.append(
            [
                f"{v.share:g}",
                LABELS[v.recovery],
                LABELS[v.name],
                _number(v.ppl, 2),
                _percent(against.percent, against.error) if against else NONE,
                *(_number(v.by_domain.get(name), 1) for name in domains),
            ]
        )
    columns = [Column("share"), Column("recovery", ""), Column("model", "")]
    columns += [Column("perplexity"), Column("against dense"), *map(Column, domains)]
    caption = "Perplexity of every control, best first within a share and recovery."
    return table(caption, columns, rows)


def width_table(metrics: Metrics) -> Html | None:
    """Every quantized model."""
    if not metrics.widths:
        return None
    domains = sorted({name for w in metrics.widths for name in w.by_domain})
    rows = [
        [
            LABELS.get(w.method, {"gptq": "GPTQ", "rtn": "RTN"}.get(w.method, w.method)),
            w.of,
            str(w.bits or NONE),
            _number(w.bits_per_weight, 2),
            _megabytes(w.bytes),
            _number(w.ppl, 2),
            _against(w, metrics.dense),
            *(_number(w.by_domain.get(name), 1) for name in domains),
        ]
        for w in sorted(metrics.widths, key=lambda w: (-(w.bits or 99), w.ppl or 1e99))
    ]
    columns = [Column("method", ""), Column("of", ""), Column("bits"), Column("bits / weight")]
    columns += [Column("MB"), Column("perplexity"), Column("against dense"), *map(Column, domains)]
    caption = "Every quantized model. Bits per weight count scales and zeros of quantized tensors."
    return table(caption, columns, rows)


def worst_table(metrics: Metrics) -> Html | None:
    """The tensors that lose most at the narrowest width."""
    bits = sorted({b for row in metrics.layers for b in row.loss}, key=int)
    if not bits:
        return None
    worst = sorted(metrics.layers, key=lambda row: -(row.loss.get(bits[0]) or 0))[:_WORST]
    rows = [
        [str(r.layer), r.tensor, *(_percent(_times(r.loss.get(b), 100), None) for b in bits)]
        for r in worst
    ]
    columns = [Column("layer"), Column("tensor", ""), *(Column(f"{b}-bit loss") for b in bits)]
    return table(f"The {len(rows)} tensors that lose most at {bits[0]} bits.", columns, rows)


def routing_table(metrics: Metrics) -> Html | None:
    """Behaviour of the router in a few numbers."""
    routing = metrics.routing
    if routing is None or not routing.recall_at_k:
        return None
    rows: list[list[Text]] = [
        ["experts, chosen per token", f"{routing.num_experts or NONE}, {routing.top_k or NONE}"],
        ["recall of the oracle's choices, mean over layers", _mean(routing.recall_at_k)],
        ["output norm of its choices, of the oracle's", _share(routing.oracle_mass)],
        ["way from a blind choice to the oracle's, in output norm", _mean(routing.gap_closed)],
        ["tokens whose choice differs from the token before", _share(routing.switch_rate)],
        ["entropy of the load, of an even load's", _share(routing.entropy)],
    ]
    return table("The pre-gating router on calibration text.", [Column("", ""), Column("")], rows)


def check_table(metrics: Metrics) -> Html | None:
    """Checks of the artifact."""
    if not metrics.verify:
        return None
    rows: list[list[Text]] = [[c.name, mark(c.ok), c.detail] for c in metrics.verify]
    columns = [Column("check", ""), Column("", ""), Column("detail", "wrap")]
    return table("The artifact was reloaded and compared.", columns, rows)


def ledger_parts(ledger: Ledger) -> list[Html | None]:
    """Counts by kind, and the events themselves, folded."""
    if not ledger.events:
        return []
    counts = table(
        "Exceptions to the algorithm, by kind.",
        [Column("kind", ""), Column("events")],
        [[kind, str(count)] for kind, count in ledger.counts().items()],
    )
    rows = [
        [e.kind, e.stage, "" if e.layer is None else str(e.layer), e.module, e.detail]
        for e in ledger.events[:_LEDGER_ROWS]
    ]
    columns = [Column("kind", ""), Column("stage", ""), Column("layer"), Column("module", "")]
    shown = f"{len(rows)} of {len(ledger.events)} events"
    events = table(f"{shown}; all are in ledger.csv.", [*columns, Column("detail", "wrap")], rows)
    return [counts, folded(f"Show {shown}", events)]


def stage_table(metrics: Metrics, plan: dict[str, Any] | None) -> Html | None:
    """Time and memory per stage, beside the plan's where it is known."""
    if not metrics.stages:
        return None
    planned = _planned(plan)
    rows: list[list[Text]] = []
    for s in metrics.stages:
        row: list[Text] = [s.name, f"{s.seconds:.1f}", _megabytes(s.peak_rss_bytes)]
        rows.append([*row, *planned.get(s.name, (NONE, NONE))] if planned else row)
    total = f"{sum(s.seconds for s in metrics.stages):.1f}"
    rows.append(["all", total, "", *(["", ""] if planned else [])])
    columns = [Column("stage", ""), Column("seconds"), Column("peak memory so far, MB")]
    columns += [Column("planned seconds"), Column("planned peak, MB")] if planned else []
    caption = "Wall time, and the largest resident set of the process up to the end of each stage."
    return table(caption, columns, rows, key=len(rows) - 1)


def _planned(plan: dict[str, Any] | None) -> dict[str, tuple[str, str]]:
    """Predicted seconds and peak memory per stage, as far as plan.json says."""
    stages = plan.get("stages") if plan else None
    found = {}
    for row in stages if isinstance(stages, list) else []:
        match row:
            case {
                "stage": str(name),
                "peak_memory_bytes": int() | float() as peak,
                "seconds": [int() | float() as fast, int() | float() as slow],
            }:
                found[name] = (f"{fast:.1f} to {slow:.1f}", _megabytes(peak))
    return found


def condition_parts(metrics: Metrics, recipe: str | None) -> list[Html | None]:
    """How the numbers were measured, and the recipe."""
    parts: list[Html | None] = [
        paragraph(
            "Perplexity: each document is BOS and its text in non-overlapping windows; mean over"
            " predicted tokens, no token predicted twice. Standard errors treat documents as the"
            " independent units."
        )
    ]
    if metrics.conditions:
        rows = [[key, _plain(value)] for key, value in metrics.conditions.items()]
        parts.append(
            table("Of the held-out measurements.", [Column("", ""), Column("", "wrap")], rows)
        )
    if recipe is not None:
        parts.append(folded("Resolved recipe", preformatted(recipe)))
    return parts


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return NONE
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def _percent(value: float | None, error: float | None) -> str:
    if value is None:
        return NONE
    sign = "+" if error is not None or value < 0 else ""
    text = f"{value:{sign}.1f}" if abs(value) < 1e4 else f"{value:.1e}"
    return f"{text} %" if error is None else f"{text} ± {error:.1f} %"


def _against(score: Score, dense: Score | None) -> str:
    found = compare(score, dense) if dense is not None else None
    return _percent(found.percent, found.error) if found else NONE


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _mean(values: Sequence[float]) -> str:
    return _share(sum(values) / len(values)) if values else NONE


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _megabytes(value: float | None) -> str:
    return NONE if value is None else f"{value / 1e6:,.1f}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
