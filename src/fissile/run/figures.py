"""A figure in both colour schemes, as it goes into a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fissile.run.page import Html, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fissile.run.theme import Theme


def draw(plot: Callable[[Theme], Figure | None], caption: str) -> Html | None:
    """Draw a figure in the light and the dark scheme; None where there is nothing to show.

    Args:
        plot: from a theme to a figure.
        caption: what to read from it; its first sentence describes the figure to those who cannot
            see it.
    """
    from fissile.run.theme import DARK, LIGHT, style, svg_uri

    renderings = []
    for theme in (LIGHT, DARK):
        with style(theme):
            drawn = plot(theme)
            renderings.append(None if drawn is None else svg_uri(drawn))
    light, dark = renderings
    if light is None or dark is None:
        return None
    return figure(light, dark, caption.split(".")[0], caption)
