"""The pictures of a chain: what was forgotten, what came back, what stayed, what attacks find."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter

from alkn.report import words
from alkn.report.drawing import FLOOR, look_of, new_figure, rendered, style
from alkn.report.facts import Decided
from alkn.report.story import TABLES, Story, attack_rows, matrix_cells, utility_rows
from alkn.requests.ledger import BASE

MOST = 14
"""Requests that a picture of the whole chain has room for with their names."""

Drawn = Callable[[], Figure]


def chain_figures(story: Story) -> Iterator[tuple[str, str, Drawn]]:
    """Name, what is to be seen, and how to draw it, for each picture of the whole chain that has something to show."""
    if story.decided:
        said = "P and exact memorization of each request's records while it was unlearned"
        yield "forgetting", said, partial(forgetting, story.decided)
    if story.accepted:
        yield "matrix", "P of each request's records under every accepted model", partial(matrix, story)
        yield "utility", "P of what was never drawn on, after each accepted request", partial(utility, story)
    for attack in dict.fromkeys(row["attack"] for row in attack_rows(story)):
        yield (
            f"attack_{attack}", f"What the attack {attack.replace('_', ' ')} brings back",
            partial(attack_on_all, story, attack),
        )  # fmt: skip


def pictures(story: Story) -> dict[str, bytes]:
    """File name -> PNG of each picture of the chain."""
    with style():
        return {f"{name}.png": rendered(draw(), "png") for name, _, draw in chain_figures(story)}


def tables(story: Story) -> dict[str, bytes]:
    """File name -> CSV with the numbers behind the pictures; a table without a line is left out."""
    found = {}
    for name, rows_of in TABLES.items():
        rows = list(rows_of(story))
        if rows:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            found[f"{name}.csv"] = text.getvalue().encode()
    return found


def forgetting(requests: Sequence[Decided]) -> Figure:
    """P and exact memorization of the forget records against the method's steps, a line a request."""
    figure, axes = new_figure(1, 2, width=3.6, height=3.3, share=False)
    for panel, (axis, name) in enumerate(zip(axes, ("p", "exact_memorization"), strict=True)):
        for number, facts in enumerate(requests):
            rows, line = facts.unlearning["rounds"], look_of(number)
            axis.plot(
                [row["round"] for row in rows], [max(row[name], FLOOR) if name == "p" else row[name] for row in rows],
                line.dash, color=_ink(line.colour), marker=line.marker, ms=3.5, lw=1.4, markevery=_some(len(rows)),
                label=facts.id if facts.accepted else f"{facts.id} (rejected)",
            )  # fmt: skip
        limits = {_limit(facts, name) for facts in requests} - {None}
        for limit in limits if len(limits) == 1 else ():
            axis.axhline(limit, color="0.5", lw=1, ls="--")
        axis.set(title=("P, mean", "exact memorization")[panel], xlabel="steps of the method")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_yscale("log")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_ylim(-0.02, 1.02)
    _legend(figure, axes[0], note="grey, dashed: target")
    return figure


def matrix(story: Story) -> Figure:
    """P of each request (rows) under each model (columns); a frame marks the model that forgot the request."""
    requests = [facts.id for facts in story.accepted]
    models, cells = [BASE, *requests], matrix_cells(story)
    values = [[_p(cells.get(model, {}).get(request)) for model in models] for request in requests]
    figure, (axis,) = new_figure(
        1, 1, width=min(8.0, 1.6 + 0.62 * len(models)), height=min(8.0, 1.5 + 0.45 * len(requests))
    )
    # Cells and scale are drawn as shapes, not as an image: the page may load none.
    colours = matplotlib.colormaps["cividis"].resampled(20)
    edges = [[i - 0.5 for i in range(n + 1)] for n in (len(models), len(requests))]
    image = axis.pcolormesh(*edges, np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1)
    axis.invert_yaxis()
    axis.grid(False)
    few = len(models) <= MOST
    if few:
        axis.set_xticks(range(len(models)), models, rotation=0 if len(models) < 8 else 45)
        axis.set_yticks(range(len(requests)), requests)
    for y, row in enumerate(values):
        axis.add_patch(Rectangle((y + 0.52, y - 0.48), 0.96, 0.96, fill=False, ec="#D55E00", lw=2))
        for x, value in enumerate(row):
            if few and not math.isnan(value):
                ink = "black" if value > 0.6 else "white"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axis.set(xlabel="model after request", ylabel="records of request")
    scale = figure.colorbar(image, ax=axis, label="P", shrink=0.9)
    if scale.solids is not None:
        scale.solids.set_rasterized(False)
    return figure


def utility(story: Story) -> Figure:
    """P of each utility domain against the number of accepted requests."""
    figure, (axis,) = new_figure(1, 1, width=5.0, height=3.3)
    for number, domain in enumerate(story.domains):
        rows, line = [row for row in utility_rows(story) if row["domain"] == domain], look_of(number)
        at, p = [row["requests"] for row in rows], [row["probability"] for row in rows]
        axis.plot(at, p, line.dash, color=_ink(line.colour), marker=line.marker, ms=5, lw=1.6, label=_plain(domain))
    axis.set(xlabel="accepted requests", ylabel="P, never drawn on", ylim=(-0.02, 1.02))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axis)
    return figure


def attack_on_all(story: Story, attack: str) -> Figure:
    """What one attack brings back from each step's model, a line a step."""
    curves = {
        facts.id if facts.accepted else f"{facts.id} (rejected)": facts.attacks[attack]
        for facts in story.decided
        if facts.attacks is not None and attack in facts.attacks
    }
    return attack_figure(curves)


def attack_figure(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The number that the attack moves, of the forgotten records, against what is spent; label -> curve."""
    figure, (axis,) = new_figure(1, 1, width=5.0, height=3.3)
    unit, name = "spent", "P"
    for number, (label, curve) in enumerate(curves.items()):
        unit, line = curve["unit"], look_of(number)
        metric, name = words.about(curve)[0]
        for variant, points in _variants(curve).items():
            spent = [point["at"] for point in points]
            # What is spent may fall, as the bits of a weight do: then each point has a place of its own.
            places = spent if spent == sorted(set(spent)) else list(range(len(spent)))
            axis.plot(
                places, [point[metric] for point in points], line.dash, color=_ink(line.colour),
                marker=line.marker, ms=5, lw=1.5, label=f"{label} {variant}".strip(),
            )  # fmt: skip
            axis.set_xticks(places, map(str, spent))
    axis.set(xlabel=unit, ylabel=f"{name} of the forgotten records", ylim=(-0.02, 1.02))
    _legend(figure, axis)
    return figure


def _variants(curve: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in curve["points"]:
        found.setdefault(str(point.get("name", "")), []).append(point)
    # Points with a name each are places on one line, not lines of one point.
    if len(found) > 1 and all(len(points) == 1 for points in found.values()):
        return {"": [point for points in found.values() for point in points]}
    return found


def _legend(figure: Figure, axis: Any, note: str = "") -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=note or None, title_fontsize=8)


def _ink(colour: str) -> Any:
    """Black is the ink of the page, whatever that is there."""
    return matplotlib.rcParams["text.color"] if colour == "#000000" else colour


def _plain(text: str) -> str:
    """A user's word as it is: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def _some(count: int) -> int:
    return max(1, count // 10)


def _limit(facts: Decided, name: str) -> float | None:
    """The target as a number: ``holdout`` is the base model's level there."""
    value = facts.params.get("targets", {}).get(name)
    if value == "holdout":
        value = facts.base.get("sets", {}).get("holdout", {}).get("probability" if name == "p" else name)
    return float(value) if isinstance(value, int | float) else None


def _p(cell: Mapping[str, Any] | None) -> float:
    value = None if cell is None else cell.get("probability")
    return math.nan if value is None else float(value)
