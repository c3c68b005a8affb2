"""The table of `fissile bench peers` as text and as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from fissile.run.axes import make_axes, note
from fissile.run.theme import LIGHT, style

_COLUMNS = (
    "system",
    "bits",
    "group",
    "bits/weight",
    "gap",
    "sd",
    "of best peer",
    "at its cost",
    "seconds",
)
_OURS, _PEERS = "#0072b2", "#d55e00"


def label(row: dict[str, Any]) -> str:
    """A system's name in table and plot."""
    effort = f" ({row['effort']})" if "effort" in row else ""
    ours = "fissile " if row["by"] == "fissile" else ""
    return f"{ours}{row['system']}{effort}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; a system without a result gives its reason.

    "of best peer" is against the best of the same width and group size, "at its cost" against the
    best of the same width that takes no fewer bits per weight.

    Args:
        rows: of `fissile.run.peers_table.table`.
    """
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    for row in rows:
        if "gap" not in row:
            lines.append(f"{label(row)} | {row['bits']} | {row['group_size']} | {row['missing']}")
            continue
        cells = [
            label(row),
            str(row["bits"]),
            str(row["group_size"]),
            f"{row['bits_per_weight']:.3f}",
            f"{row['gap']:.4f}",
            _number(row["gap_sd"], ".4f"),
            _number(row.get("of_best_peer"), ".2f"),
            _number(row.get("of_best_peer_at_cost"), ".2f"),
            _number(row.get("seconds"), ".0f"),
        ]
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """Gap against bits per weight as SVG, one panel a width; ours blue, peers red.

    Args:
        rows: of `fissile.run.peers_table.table`; those without a result are left out.
    """
    shown = [row for row in rows if math.isfinite(row.get("gap", math.inf))]
    widths = sorted({row["bits"] for row in shown}) or [0]
    raw = io.BytesIO()
    with style(LIGHT):
        most = max((sum(row["bits"] == k for row in shown) for k in widths), default=1)
        figure, axes = make_axes(1, len(widths), height=1.2 + 0.34 * most)
        for axis, bits in zip(axes, widths, strict=True):
            here = [row for row in shown if row["bits"] == bits]
            here.sort(key=lambda row: float(row["gap"]))
            for place, row in enumerate(here):
                color = _OURS if row["by"] == "fissile" else _PEERS
                seeds = row["gap_by_seed"]
                axis.plot([min(seeds), max(seeds)], [place, place], color=color, alpha=0.4)
                axis.plot(row["gap"], place, "o", color=color)
                text = f"{row['gap']:.3f}, {row['bits_per_weight']:.2f} bits"
                note(axis, row["gap"], place, text, LIGHT, (0, 6), ha="center")
            axis.set_yticks(range(len(here)), [label(row) for row in here])
            axis.set_ylim(len(here) - 0.5, -0.7)
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.25)
            axis.set_title(f"{bits} bits")
            axis.set_xlabel("ln ppl over dense")
        figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
    return raw.getvalue()
