"""Colours and axes shared by the report's plots: one colour and marker per method, two themes.

The colours are Okabe and Ito's, which people with the common colour deficiencies can tell apart;
the dark theme lightens them. Blue is always what Fissile ships.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering.

    Args:
        name: "light" or "dark".
        ink: text and reference lines.
        muted: axis labels and ticks.
        grid: grid lines.
        paper: inside of hollow markers and of empty cells; the page's background.
        method: colour of each method and router.
        ramp: from nothing to much, for heat maps.
    """

    name: str
    ink: str
    muted: str
    grid: str
    paper: str
    method: dict[str, str]
    ramp: tuple[str, str]


def _methods(blue: str, sky: str, green: str, red: str, grey: str, pink: str) -> dict[str, str]:
    return {
        "pregate": blue,
        "nested": blue,
        "ridge": sky,
        "oracle": green,
        "dedicated": green,
        "static": red,
        "gptq": red,
        "gptaq": pink,
        "decoupleq": sky,
        "random": grey,
        "rtn": grey,
        "all_experts": pink,
    }


def _others(navy: str, teal: str, gold: str, violet: str, brown: str, wine: str) -> dict[str, str]:
    """Variants of a kind share its colour and differ by marker."""
    return {
        "pregate_dynamic": gold,
        "per_layer": navy,
        "per_layer_dynamic": navy,
        "token": navy,
        "oracle_layerwise": teal,
        "oracle_per_layer": teal,
        "dynamic": gold,
        "static_uniform": wine,
        "mean_gate": gold,
        "spectral": gold,
        "readme": violet,
        "cmoe": brown,
        "expertweaver": brown,
        "emoe": wine,
    }


LIGHT = Theme(
    "light",
    ink="#1d2129",
    muted="#5b6270",
    grid="#e3e6ea",
    paper="#ffffff",
    method=_methods("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#8a8f98", "#cc79a7")
    | _others("#00446b", "#00664b", "#b07800", "#7b3294", "#8c510a", "#96183c"),
    ramp=("#f4f7fa", "#0072b2"),
)
DARK = Theme(
    "dark",
    ink="#e8eaee",
    muted="#a3aab6",
    grid="#353b45",
    paper="#16191f",
    method=_methods("#4fa8e0", "#9fd4f5", "#35c79b", "#f58a45", "#8a8f98", "#e3a3c6")
    | _others("#2f7fb5", "#1f9c78", "#e0b040", "#b48ad0", "#c98f4e", "#d66a8a"),
    ramp=("#1d232c", "#4fa8e0"),
)
MARKERS = {
    "pregate": "o",
    "nested": "o",
    "ridge": "D",
    "oracle": "^",
    "dedicated": "^",
    "static": "s",
    "gptq": "s",
    "gptaq": "P",
    "decoupleq": "D",
    "random": "v",
    "rtn": "v",
    "all_experts": "P",
    "pregate_dynamic": "^",
    "per_layer": "s",
    "per_layer_dynamic": "^",
    "token": "v",
    "oracle_layerwise": "^",
    "oracle_per_layer": "v",
    "dynamic": "o",
    "static_uniform": "s",
    "mean_gate": "D",
    "spectral": "d",
    "readme": "*",
    "cmoe": "X",
    "expertweaver": "P",
    "emoe": "p",
}


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Matplotlib settings of the report, in effect inside the block only."""
    settings: dict[str, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 9,
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "figure.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.6,
        "lines.markersize": 6,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "fissile",
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "xtick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.color": theme.muted,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }
    with matplotlib.rc_context(settings):
        yield


def svg_uri(figure: Figure) -> str:
    """A figure as an SVG data URI; the same figure gives the same bytes."""
    raw = io.StringIO()
    figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
    # Text is drawn by the browser in the page's own font.
    text = raw.getvalue().replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'DejaVu Sans'")
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
