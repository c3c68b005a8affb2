"""report.html and report.json from a run folder: no model is loaded, nothing is fetched.

Reads metrics.json (required), ledger.csv, plan.json, recipe.yaml, eval/*.json and serving/ (each
may be absent).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fissile import __version__
from fissile.errors import UsageError
from fissile.io.publish import atomic_write_bytes
from fissile.run.advice import LABELS, Advice, advise
from fissile.run.choice import choose
from fissile.run.figures import draw
from fissile.run.ledger import Ledger
from fissile.run.metrics import Metrics, read_metrics
from fissile.run.page import Html, advice_list, page, paragraph, section
from fissile.run.report_eval import evaluation_data, evaluation_parts, stored_results
from fissile.run.report_routing import (
    domain_tables,
    quality_table,
    redundancy_table,
    speed_parts,
)
from fissile.run.report_serving import stored_comparisons, stored_parts
from fissile.run.report_tables import (
    check_table,
    condition_parts,
    control_table,
    ledger_parts,
    routing_table,
    stage_table,
    summary_rows,
    summary_table,
    width_table,
    worst_table,
)

CAPTIONS = {
    "controls": "Held-out perplexity over the dense model's (dashed line), by active share. Hollow:"
    " before recovery; filled: after the re-fit; dark centre: after training. Numbers are"
    " perplexities at the last step. Left is better.",
    "domains": "The same per domain, each control at its furthest recovery.",
    "widths": "Held-out perplexity over the dense model's against bits per code, for all text and"
    " for each domain. Dashed: the float model that was quantized. Lower is better; lines of far"
    " worse models leave the picture, the table has them.",
    "sizes": "Bytes that a load reads against held-out perplexity. One nested file serves all of"
    " its points; every other point is a file of its own. Far worse models leave the picture.",
    "layer_loss": "Relative quantization loss tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) on calibration text."
    " Lines: mean over a layer's tensors; dots: each tensor.",
    "experts": "How often experts are chosen on calibration text, in units of an even share (1.0).",
    "agreement": "Share of the oracle router's choices that the pre-gating router makes too.",
    "routers": "Every router against the oracle on the same experts. Left: recall of its choices on"
    " calibration text, ticks per layer, marker the mean. Right: closed share of the gap in log"
    " perplexity between the static model (0) and the oracle (100), held-out text, bars of two"
    " standard errors.",
    "curves": "Loss per training step: raw (pale) and smoothed.",
}


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json into a run folder.

    Args:
        folder: a run folder, or the artifact inside one (its model/).

    Returns:
        Paths of the page and of the JSON.

    Raises:
        UsageError: the folder has no metrics.json.
        CorruptCheckpoint: metrics.json or ledger.csv do not parse.
    """
    folder = run_folder(folder)
    metrics = read_metrics(folder / "metrics.json")
    ledger = Ledger.from_csv(folder / "ledger.csv")
    stored, serving = stored_results(folder), stored_comparisons(folder)
    advice = [*advise(metrics), *choose(metrics)]
    data = {
        "name": metrics.name,
        "advice": [asdict(item) for item in advice],
        "summary": summary_rows(metrics),
        "ledger": ledger.counts(),
        "evaluations": evaluation_data(metrics, stored),
        "serving": {n: s if isinstance(s, str) else s.model_dump() for n, s in serving},
        "metrics": metrics.to_dict(),
    }
    html = render_report(
        metrics,
        advice,
        ledger,
        plan=_read_json(folder / "plan.json"),
        recipe=_read_text(folder / "recipe.yaml"),
        evaluations=evaluation_parts(metrics, stored),
        serving=stored_parts(serving),
    )
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(folder / "report.json", text.encode())
    atomic_write_bytes(folder / "report.html", html.encode())
    return folder / "report.html", folder / "report.json"


def run_folder(folder: Path) -> Path:
    """The run folder that `folder` is, or that holds it as its artifact.

    Raises:
        UsageError: neither has a metrics.json.
    """
    for candidate in (folder, folder.parent):
        if (candidate / "metrics.json").is_file():
            return candidate
    raise UsageError(
        f"{folder}: no metrics.json; a report needs a run folder whose stages are finished"
        " (continue the run with --resume)"
    )


def render_report(
    metrics: Metrics,
    advice: Sequence[Advice],
    ledger: Ledger,
    *,
    plan: dict[str, Any] | None = None,
    recipe: str | None = None,
    evaluations: Sequence[Html | None] = (),
    serving: Sequence[Html | None] = (),
) -> str:
    """The page as HTML.

    Args:
        metrics: what was measured.
        advice: from `advise`.
        ledger: exceptions of the run.
        plan: contents of plan.json.
        recipe: text of recipe.yaml.
        evaluations: gates, answers and stored results, from `evaluation_parts`.
        serving: simulations in the run folder, from `stored_parts`.
    """
    plots = _plots(metrics)
    seed = "" if metrics.seed is None else f"seed {metrics.seed}"
    byline = " · ".join(filter(None, (f"from {metrics.source}", metrics.created, seed)))
    sections = [
        section("What to use", [advice_list((a.level, a.topic, a.text) for a in advice)]),
        section("At a glance", [summary_table(metrics)]),
        section(
            "Routing against its controls",
            [plots.get("controls"), plots.get("domains"), control_table(metrics)],
        ),
        section("Widths", [plots.get("widths"), plots.get("sizes"), width_table(metrics)]),
        section("Quantization loss by layer", [plots.get("layer_loss"), worst_table(metrics)]),
        section(
            "Experts and router",
            [
                plots.get("routers"),
                quality_table(metrics),
                plots.get("experts"),
                plots.get("agreement"),
                routing_table(metrics),
                *domain_tables(metrics),
            ],
        ),
        section("Redundancy of routing", _redundancy(metrics)),
        section("Expected speed", speed_parts(metrics)),
        section("Serving, simulated", serving, "Not simulated: fissile trace, fissile simulate."),
        section("Training", [plots.get("curves")]),
        section("Evaluations", evaluations),
        section("Checks of the artifact", [check_table(metrics)]),
        section("Ledger", ledger_parts(ledger), "No exceptions were recorded."),
        section("Cost", [stage_table(metrics, plan)]),
        section("Conditions", condition_parts(metrics, recipe)),
    ]
    return page(metrics.name, byline, sections, f"Written by fissile {__version__}.")


def _plots(metrics: Metrics) -> dict[str, Html]:
    from fissile.run.plots import FIGURES

    found = {name: draw(partial(plot, metrics), CAPTIONS[name]) for name, plot in FIGURES.items()}
    return {name: html for name, html in found.items() if html is not None}


def _redundancy(metrics: Metrics) -> list[Html | None]:
    """Figures and table of every router whose choices were compared."""
    from fissile.run.plots_routing import REDUNDANCY, REDUNDANCY_CAPTIONS

    parts: list[Html | None] = []
    for name, rows in (metrics.routing.redundancy if metrics.routing else {}).items():
        alone = "" if rows.pairs else " (one decision serves every layer)"
        parts.append(paragraph(f"Choices of the {LABELS.get(name, name)}{alone}:"))
        for key, plot in REDUNDANCY.items():
            parts.append(draw(partial(plot, rows), REDUNDANCY_CAPTIONS[key]))
        parts.append(redundancy_table(rows))
    return parts


def _read_json(path: Path) -> dict[str, Any] | None:
    text = _read_text(path)
    if text is None:
        return None
    try:
        data = json.loads(text)
    except ValueError:
        return None  # the plan is a comparison here, not an input
    return data if isinstance(data, dict) else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
