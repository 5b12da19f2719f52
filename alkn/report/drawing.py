"""House style of all pictures: colours that colour-blind readers tell apart, each with a marker and a dash.

No clock and no random ids go into a picture, so the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, less the yellow, which is hard to see on white."""
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X<>hp"
STYLE: Any = {
    "font.size": 10.0, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "alkn", "legend.frameon": False,
}  # fmt: skip
FLOOR = 1e-6
"""Smallest P on a logarithmic axis."""
INK = "#1b2a3c"
"""Stands for the ink in a picture that goes into a page, and becomes the page's own text colour there."""
ON_PAGE: Any = STYLE | {
    "svg.fonttype": "none", "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.18, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one line is drawn, the same in every picture."""

    colour: str
    dash: str
    marker: str


def look_of(number: int) -> Look:
    """The look of the n-th line, from 0."""
    return Look(
        COLOURS[number % len(COLOURS)],
        DASHES[number // len(COLOURS) % len(DASHES)],
        MARKERS[number % len(MARKERS)],
    )


@contextmanager
def style(*, on_page: bool = False) -> Iterator[None]:
    """Draw within this: in black on white, or in the ink of a page on nothing."""
    with matplotlib.rc_context(ON_PAGE if on_page else STYLE):
        yield


def new_figure(
    lines: int, columns: int, *, width: float, height: float, share: bool = True
) -> tuple[Figure, list[Any]]:
    """A figure of ``lines`` × ``columns`` panels, each ``width`` × ``height`` inches, and its axes in reading order.

    Args:
        lines: of panels.
        columns: of panels.
        width: of a panel, inches.
        height: of a panel, inches.
        share: one y axis for all.
    """
    figure = Figure(figsize=(max(6.0, width * columns + 1.6), height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=share)
    return figure, [axis for line in grid for axis in line]


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as ``png`` or ``svg``, without a date in it."""
    options: dict[str, Any] = {"dpi": 150} if kind == "png" else {"metadata": {"Date": None}}
    data = io.BytesIO()
    figure.savefig(data, format=kind, **options)
    return data.getvalue()


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure drawn :func:`style` ``on_page`` as an element of an HTML page that follows the page's colours.

    What only a file of its own needs is left out: declarations, metadata with addresses, fixed sizes. Ids get ``name``
    in front, because several pictures share one page.

    Args:
        figure: drawn.
        name: of the picture, letters and digits.
        title: what a reader is told who cannot see it; it must not need escaping.
    """
    text = rendered(figure, "svg").decode()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href").replace(INK, "currentColor")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", body)
    return f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{title}">{body}'
