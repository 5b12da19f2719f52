"""Prefect tasks: the champion is verified again, and whoever should know is told."""

from __future__ import annotations

import re
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from alkn.project import Project
from alkn.verify import verify_champion
from tasks.progress import progress_bars

EVENT = "alkn.verification.failed"


@task(cache_policy=NO_CACHE)
def verify(project: Project, exact: bool) -> dict[str, Any]:
    """Measure, judge and attack the champion again; see :func:`alkn.verify.verify_champion`."""
    with progress_bars("reverify") as progress:
        return verify_champion(project, exact=exact, progress=progress)


@task(cache_policy=NO_CACHE)
def tell(project: Project, report: dict[str, Any]) -> None:
    """The result as an artifact, the newest under one key; an event if something does not hold. No text of a record."""
    name = project.settings().project.name
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    create_markdown_artifact(_page(report), key=f"verification-{slug}", description=f"Verification of {name}")
    if report["holds"]:
        return
    emit_event(
        EVENT,
        resource={"prefect.resource.id": f"alkn.champion.{slug}", "prefect.resource.name": name},
        payload={key: report[key] for key in ("champion", "model", "made", "findings")},
    )


def _page(report: dict[str, Any]) -> str:
    verdict = "holds" if report["holds"] else "**does not hold**"
    lines = [
        f"`{report['champion']}` {verdict}, {report['made']}.",
        "",
        f"Model `{report['model']}`; {len(report['steps'])} models of the chain checked; {report['compared']} numbers "
        f"compared, largest difference {report['largest_difference']:.2g}.",
    ]
    if report["findings"]:
        lines += ["", "| | step | what | recorded, or limit | found |", "|---|---|---|---|---|"]
        keys = ("kind", "where", "what", "expected", "found")
        lines += [f"| {' | '.join(str(one[key]) for key in keys)} |" for one in report["findings"]]
    lines += ["", "| gate | passed |", "|---|---|"]
    lines += [f"| {gate} | {verdict['passed']} |" for gate, verdict in report["gates"].items()]
    lines += [f"- not measured: {name}: {reason}" for name, reason in report["missing"].items()]
    return "\n".join(lines)
