"""The report of a chain as one page of HTML: it needs nothing but itself, and loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from alkn.report import certificate, plots, words
from alkn.report.drawing import inline_svg, style
from alkn.report.facts import Decided
from alkn.report.story import HEADLINE, Story

TEMPLATES = Path(__file__).parent / "templates"
FIRST = ("probability", "probability_p95", "probability_worst", "exact_memorization")
"""Of the records to be forgotten, in this order; then the others as the evaluation has them."""


def report_page(story: Story, *, made: str, program: str) -> bytes:
    """The page, UTF-8.

    Args:
        story: what is told.
        made: the day it is made.
        program: name and version of what makes it.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(number=words.number, plain=words.plain, interval=words.interval, short=words.short)
    page = environment.get_template("report.html.j2").render(
        story=story,
        made=made,
        program=program,
        summary=_summary(story),
        pictures=list(_pictures(story)),
        requests=[_request(facts) for facts in story.decided],
        waiting=[
            {"id": name, "verdict": verdict, "entry": entry, "overdue": bool(entry.due and entry.due < made)}
            for verdict in ("pending", "withdrawn")
            for name, entry in getattr(story.ledger, verdict).items()
        ],
        matrix_source=_matrix_source(story),
        verified=_verified(story),
        not_measured=list(_not_measured(story)),
    )
    return page.encode()


def _summary(story: Story) -> dict[str, Any]:
    newest = story.ledger.newest
    return {
        "counts": {verdict: len(getattr(story.ledger, verdict)) for verdict in type(story.ledger).model_fields},
        "champion": newest,
        "digest": story.digests.get(newest, ""),
        "late": [facts.id for facts in story.decided if certificate.request_of(facts)["late"]],
    }


def _pictures(story: Story) -> Iterator[dict[str, Any]]:
    with style(on_page=True):
        for name, caption, draw in plots.chain_figures(story):
            yield {"name": name, "caption": caption, "svg": _svg(draw(), name, caption)}


def _request(facts: Decided) -> dict[str, Any]:
    metrics, without = certificate.metrics_of(facts)
    forget = metrics.get("forget", {})
    order = [name for name in FIRST if name in forget] + [name for name in forget if name not in FIRST]
    return {
        "id": facts.id,
        "accepted": facts.accepted,
        "asked": certificate.request_of(facts),
        "timely": words.timely(certificate.request_of(facts)),
        "statement": certificate.statement(facts),
        "previous": facts.manifest["previous"],
        "method": _method(facts),
        "intervals": certificate.intervals_of(facts),
        "forget": [_row(words.name_of(name), forget[name], metrics.get("holdout", {}).get(name)) for name in order],
        "headline": {
            name: _row(name, forget.get(name, {"value": None, "before": facts.before.get(name)})) for name in HEADLINE
        },
        "earlier": [
            (name.partition("/")[2], [_row(words.name_of(m), row[m]) for m in FIRST if m in row])
            for name, row in metrics.items()
            if name.startswith("earlier/")
        ],
        "kept": [
            _row(f"{name}: {words.name_of(metric)}", row[metric])
            for name, row in metrics.items()
            if name.startswith(("utility/", "retain/"))
            for metric in ("probability", "exact_memorization")
            if metric in row
        ]
        + [_row(words.name_of(name), row) for name, row in metrics.get("model", {}).items()],
        "references": facts.honest,
        "ceiling": bool(facts.evaluation.get("ceiling")),
        "gates": facts.gate["gates"],
        "attacks": [_attack(facts, name, curve) for name, curve in certificate.attacks_of(facts).items()],
        "not_measured": list(certificate.not_measured(facts, without)),
        "digests": certificate.digests_of(facts),
        "code": facts.manifest["code"],
        "environment": facts.manifest["environment"],
        "seed": facts.manifest["seed"],
        "curve": _drawn(facts),
        "worst_attack": max(
            (point["probability"] for curve in certificate.attacks_of(facts).values() for point in curve["points"]),
            default=None,
        ),
        "utility": [
            (name.partition("/")[2], row["probability"]["value"])
            for name, row in metrics.items()
            if name.startswith("utility/") and "probability" in row
        ],
    }


def _row(name: str, row: Mapping[str, Any], never: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One line of a table of numbers; what is not there is ``None`` and becomes a dash."""
    return {
        "name": name, "value": row["value"], "before": row.get("before"), "interval": row.get("interval"),
        "base": row.get("base"), "reference": next(iter(row.get("reference", {}).values()), None),
        "never": None if never is None else never["value"],
    }  # fmt: skip


def _attack(facts: Decided, name: str, curve: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": words.name_of(name),
        "unit": curve["unit"],
        "about": words.about(curve),
        "budget": words.settings(curve["budget"]),
        "points": [{**point, "spent": f"{point['at']} {point.get('name', '')}".strip()} for point in curve["points"]],
        "missing": curve["missing"],
    }


def _drawn(facts: Decided) -> Markup:
    with style(on_page=True):
        return _svg(plots.forgetting([facts]), f"own_{facts.id}", f"forgetting of {facts.id} over the method's steps")


def _svg(figure: Any, name: str, title: str) -> Markup:
    """Drawn by matplotlib, which escapes what it writes."""
    return Markup(inline_svg(figure, name, title))  # noqa: S704 - no text of a user is put in but through matplotlib


def _method(facts: Decided) -> str:
    method = facts.params.get("method", {})
    return " ".join(str(method[name]) for name in ("name", "preset") if name in method) or "–"


def _matrix_source(story: Story) -> str:
    if story.matrix is not None:
        cells = [cell for row in story.matrix["cells"].values() for cell in row.values()]
        sampled = any(cell["records"] < cell["of"] for cell in cells)
        return "measured by 'alkn evaluate'" + (", large requests on a sample of their records" if sampled else "")
    return "from each step's own evaluation; 'alkn evaluate' measures the models on later requests too"


def _verified(story: Story) -> dict[str, Any] | None:
    """What the last verification found; ``current`` says whether it was of the model that is in use now."""
    report = story.verified
    if report is None:
        return None
    newest = story.ledger.newest
    found = [
        f"{one['kind']}: {one['where']}, {one['what']}: expected {words.plain(one['expected'])},"
        f" found {words.plain(one['found'])}"
        for one in report["findings"]
    ]
    return {
        "found": found,
        "champion": report["champion"],
        "made": report["made"],
        "compared": report["compared"],
        "current": report["champion"] == newest and report["model"] == story.digests.get(newest),
    }


def _not_measured(story: Story) -> Iterator[tuple[str, str]]:
    for request, why in story.unread.items():
        yield f"request {request}", why
    if story.matrix is None:
        yield "the whole matrix", "there is no reports/matrix.json of these models; 'alkn evaluate' makes it"
    else:
        for what, why in story.matrix.get("missing", {}).items():
            yield f"matrix: {what}", why
    if story.verified is None:
        yield "whether the model in use still is what was accepted", "'alkn verify' has not been run"
    else:
        for what, why in story.verified["missing"].items():
            yield f"verification: {what}", why
    if not any(facts.honest for facts in story.decided):
        yield "a model that never saw the records, beside every number", "there is none; 'alkn reference' trains one"
