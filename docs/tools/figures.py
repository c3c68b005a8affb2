"""The figures of the documentation, drawn from eval/results/*.json with the report's own plots.

    python docs/tools/figures.py        rewrites docs/figures/*.svg

A test draws them again and compares.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fissile.run.axes import NAMES, make_axes
from fissile.run.metrics import Metrics, parse_metrics
from fissile.run.plots import agreement, controls, sizes, widths
from fissile.run.theme import LIGHT, MARKERS, style

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "eval" / "results"


def drawings() -> dict[str, str]:
    """Name to SVG text of every figure."""
    demo = demo_metrics()
    experts = json.loads((RESULTS / "experts.json").read_text(encoding="utf-8"))
    made: dict[str, Callable[[], Figure | None]] = {
        "controls": lambda: controls(demo, LIGHT),
        "widths": lambda: widths(demo, LIGHT),
        "sizes": lambda: sizes(demo, LIGHT),
        "agreement": lambda: agreement(demo, LIGHT),
        "gaps": lambda: gaps(experts["rows"]),
        "stages": lambda: stages(demo),
    }
    found = {}
    for name, make in made.items():
        with style(LIGHT):
            figure = make()
            assert figure is not None, name
            found[name] = _svg(figure)
    return found


def demo_metrics() -> Metrics:
    """The stored run of the demo, in the form that a report reads."""
    data = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    kept: dict[str, Any] = {key: data[key] for key in ("routing", "stages")}
    # The stored accuracies are not in the form of a report.
    for key in ("variants", "widths"):
        kept[key] = [{**row, "choices": None} for row in data[key]]
    kept["dense"] = {**data["dense"], "choices": None}
    return parse_metrics({"name": "demo", **kept}, "eval/results/demo.json")


def gaps(rows: list[dict[str, Any]]) -> Figure:
    """Distance to the dense model of every system at half of the FFN."""
    half = [r for r in rows if r["share"] == 0.5 and r["gap"] < 0.1]
    best = {r["system"]: min(s["gap"] for s in half if s["system"] == r["system"]) for r in half}
    names = sorted(best, key=lambda name: best[name])
    figure, (axis,) = make_axes(1, 1, height=0.9 + 0.3 * len(names))
    for place, name in enumerate(names):
        for row in (r for r in half if r["system"] == name):
            color = LIGHT.method[name]
            face = color if row["recovery"] == "refit" else LIGHT.paper
            axis.plot(row["gap"], place, MARKERS[name], color=color, markerfacecolor=face)
    axis.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("mean over domains of ln ppl - ln ppl(dense), half of the FFN")
    return figure


def stages(metrics: Metrics) -> Figure:
    """Seconds of every stage."""
    rows = metrics.stages
    figure, (axis,) = make_axes(1, 1, height=0.7 + 0.26 * len(rows))
    axis.barh(
        range(len(rows)), [row.seconds for row in rows], color=LIGHT.method["pregate"], height=0.6
    )
    for place, row in enumerate(rows):
        axis.annotate(
            f"{row.seconds:.1f}",
            (row.seconds, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=LIGHT.muted,
        )
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.1)
    axis.set_xlabel("seconds")
    return figure


def _svg(figure: Figure) -> str:
    raw = io.StringIO()
    # White, since the page may be dark.
    figure.savefig(raw, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = raw.getvalue().replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'DejaVu Sans'")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def main() -> None:
    """Write the files."""
    folder = DOCS / "figures"
    folder.mkdir(exist_ok=True)
    for name, text in drawings().items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
