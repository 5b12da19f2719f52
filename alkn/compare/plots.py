"""The pictures of a comparison, as PNG and SVG: colours that colour-blind readers tell apart, each with a marker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from alkn.compare.results import CellResult, Results, Row, Spread
from alkn.files import write_bytes
from alkn.report import words
from alkn.report.drawing import FLOOR, Look, look_of, new_figure, rendered, style

LEGEND_LINES, LEGEND_WIDTH = 20, 2.0
"""Methods in one column of a legend, as many as a figure is high, and inches of another column."""


def write_plots(folder: Path, results: Results) -> list[Path]:
    """Write ``utility``, ``front``, ``cascade`` and a curve an attack as .png and .svg; returns the paths."""
    rows = [row for row in results.rows if row.done]
    if not rows:
        return []
    looks = {row.entry.label: look_of(number) for number, row in enumerate(results.rows)}
    written = []
    attacks = dict.fromkeys(name for row in rows for cell in row.done for name in cell.attacks)
    with style():
        for name, figure in (
            ("utility", utility_figure(rows, looks)),
            ("front", front_figure(rows, looks, results.domain)),
            ("cascade", cascade_figure(rows)),
            *((name, attack_figure(rows, looks, name)) for name in attacks),
        ):
            written += _save(figure, folder / name)
    return written


def utility_figure(rows: Sequence[Row], looks: dict[str, Look]) -> Figure:
    """Utility never drawn on against the number of requests: a panel a domain, a line a method, a band of min–max.

    A step at which some seed missed the targets has a hollow marker: there the forgetting is not equal.
    """
    domains = list(rows[0].done[0].base.never)
    figure, axes = new_figure(1, len(domains), width=4.2, height=4.4)
    for axis, domain in zip(axes, domains, strict=True):
        for row in rows:
            look = looks[row.entry.label]
            curve = list(utility_curve(row, domain))
            at = list(range(len(curve)))
            axis.plot(at, [s.mean for s, _ in curve], look.dash, color=look.colour, lw=1.6, label=row.title)
            axis.fill_between(
                at, [s.low for s, _ in curve], [s.high for s, _ in curve], color=look.colour, alpha=0.15, lw=0
            )
            for x, (spread, equal) in enumerate(curve):
                axis.plot(x, spread.mean, look.marker, ms=6, mec=look.colour, mfc=look.colour if equal else "white")
        axis.set(title=domain, xlabel="requests processed", ylim=(-0.02, 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("P on records never drawn on")
    _legend(figure, rows, looks, note="filled: every seed at the targets\nhollow: some seed above them")
    return figure


def utility_curve(row: Row, domain: str) -> Iterator[tuple[Spread, bool]]:
    """P of a domain's never-drawn-on half over the seeds after 0, 1, 2, ... requests, and whether all reached."""
    chains = [[cell.base, *cell.steps] for cell in row.done]
    for number, models in enumerate(zip(*chains, strict=True)):
        spread = Spread.of([model.never.get(domain) for model in models])
        equal = number == 0 or all(cell.reached(cell.steps[number - 1]) for cell in row.done)
        if spread is not None:
            yield spread, equal


def front_figure(rows: Sequence[Row], looks: dict[str, Look], domain: str) -> Figure:
    """Forgetting against utility at the end: P of the worst request, and its exact memorization. Better is up, left."""
    figure, axes = new_figure(1, 2, width=5.0, height=4.4)
    limits = rows[0].done[0].limits
    panels = (
        ("p", "P of the forget sets, worst request", limits.p),
        ("em", "exact memorization, worst request", limits.exact_memorization),
    )
    for axis, (name, label, limit) in zip(axes, panels, strict=True):
        for row in rows:
            spreads, look = row.spreads(), looks[row.entry.label]
            x, y = spreads.get(name), spreads.get(f"never/{domain}")
            if x is None or y is None:
                continue
            if name == "p":
                x = _above_floor(x)
            axis.errorbar(
                x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]],
                yerr=[[y.mean - y.low], [y.high - y.mean]],
                fmt=look.marker, ms=8, color=look.colour, elinewidth=1, capsize=2, label=row.title,
            )  # fmt: skip
        if limit is not None and (limit > 0 or name == "em"):
            axis.axvline(limit, color="0.4", lw=1, ls="--")
            axis.annotate(
                "target", (limit, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points",
                va="top", fontsize=8, color="0.3",
            )  # fmt: skip
        axis.set(xlabel=label, ylim=(-0.02, 1.02))
        if name == "p":
            axis.set_xscale("log")
            low, high = axis.get_xlim()
            # Whole decades: a stretch of one has ticks that nobody can read.
            axis.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(-0.02, 1.02)
    axes[0].set_ylabel(f"{domain}: P on records never drawn on, at the end")
    _legend(figure, rows, looks, note="mean and range over seeds")
    return figure


def attack_figure(rows: Sequence[Row], looks: dict[str, Look], attack: str) -> Figure:
    """What an attack moves, of the forgotten records, against what it spends: mean and range over seeds."""
    figure, (axis,) = new_figure(1, 1, width=5.6, height=4.4)
    unit, name = "budget", "P"
    for row in rows:
        curves = [cell.final[attack] for cell in row.done if attack in cell.final]
        if not curves:
            continue
        unit, spent = curves[0]["unit"], [point["at"] for point in curves[0]["points"]]
        metric, name = words.about(curves[0])[0]
        falling = spent != sorted(spent)
        # What is spent may fall, as the bits of a weight do: then each point has a place of its own.
        places = list(range(len(spent))) if falling else spent
        seeds = zip(*(curve["points"] for curve in curves), strict=True)
        spreads = [Spread.of([point[metric] for point in points]) for points in seeds]
        known = [(x, spread) for x, spread in zip(places, spreads, strict=True) if spread is not None]
        at, look = [x for x, _ in known], looks[row.entry.label]
        axis.plot(at, [s.mean for _, s in known], look.dash, color=look.colour, marker=look.marker, ms=6, lw=1.6)
        axis.fill_between(
            at, [s.low for _, s in known], [s.high for _, s in known], color=look.colour, alpha=0.15, lw=0
        )
        axis.set_xticks(places, map(str, spent))
    axis.set(title=attack, xlabel=unit, ylabel=f"{name} of the forgotten records", ylim=(-0.02, 1.02))
    _legend(figure, rows, looks, note="mean and range over seeds")
    return figure


def cascade_figure(rows: Sequence[Row]) -> Figure:
    """P of each request after each step, mean over seeds and below it their range; a square marks its own step."""
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    chain = rows[0].done[0].chain
    figure, axes = new_figure(lines, columns, width=3.2, height=2.9)
    image = None
    for axis, row in zip(axes, rows, strict=False):
        matrix = cascade(row.done)
        means = [[math.nan if spread is None else spread.mean for spread in line] for line in matrix]
        image = axis.imshow(means, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axis.grid(False)
        axis.set_title(row.title, fontsize=10)
        if len(chain) <= 10:
            axis.set(xticks=range(len(chain) + 1), yticks=range(len(chain)))
            axis.set_yticklabels(chain, fontsize=8)
            for y, spreads in enumerate(matrix):
                axis.add_patch(Rectangle((y + 0.54, y - 0.46), 0.92, 0.92, fill=False, ec="white", lw=1.2))
                for x, spread in enumerate(spreads):
                    if spread is not None:
                        ink = "black" if spread.mean > 0.6 else "white"
                        low, high = f"{spread.low:.2f}", f"{spread.high:.2f}"
                        place = y if low == high else y - 0.15
                        axis.text(x, place, f"{spread.mean:.2f}", ha="center", va="center", fontsize=7, color=ink)
                        if low != high:
                            axis.text(x, y + 0.22, f"{low}–{high}", ha="center", va="center", fontsize=4.5, color=ink)
        axis.set_xlabel("requests processed")
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("request")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="P of the request's records", shrink=0.8, aspect=40)
    return figure


def cascade(cells: Sequence[CellResult]) -> list[list[Spread | None]]:
    """P over seeds, ``[requests][steps + 1]``, column 0 the base model; ``None`` where no seed has it."""
    chain = cells[0].chain
    models = [[cell.base, *cell.steps] for cell in cells]
    return [
        [_p_of([seed[column].requests.get(request) for seed in models]) for column in range(len(chain) + 1)]
        for request in chain
    ]


def _p_of(levels: Sequence[Any]) -> Spread | None:
    return Spread.of([None if level is None else level.p for level in levels])


def _above_floor(spread: Spread) -> Spread:
    """For a logarithmic axis, on which 0 has no place."""
    return Spread(spread.n, max(spread.mean, FLOOR), spread.std, max(spread.low, FLOOR), max(spread.high, FLOOR))


def _legend(figure: Figure, rows: Sequence[Row], looks: dict[str, Look], *, note: str) -> None:
    """Beside the panels; of many methods in several columns, for which the figure becomes wider."""
    columns = math.ceil(len(rows) / LEGEND_LINES)
    figure.set_figwidth(figure.get_figwidth() + LEGEND_WIDTH * (columns - 1))
    handles = [
        Line2D([], [], color=look.colour, ls=look.dash, marker=look.marker, label=row.title)
        for row in rows
        for look in (looks[row.entry.label],)
    ]
    figure.legend(
        handles=handles,
        loc="outside right upper",
        ncols=columns,
        fontsize=8,
        handlelength=3,
        title=note,
        title_fontsize=8,
    )


def _save(figure: Figure, path: Path) -> list[Path]:
    written = []
    for kind in ("png", "svg"):
        write_bytes(path.with_suffix(f".{kind}"), rendered(figure, kind))
        written.append(path.with_suffix(f".{kind}"))
    return written
