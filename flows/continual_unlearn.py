"""The product in one page: every pending deletion request goes from its records to a judged, tracked model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Failed

from alkn.errors import RequestsRejected
from alkn.planning import sealed_step
from alkn.project import Project
from alkn.records import Sealed
from alkn.requests.ledger import load_ledger
from alkn.settings import Settings
from tasks.attack import attack
from tasks.evaluate import evaluate
from tasks.gate import gate
from tasks.prepare import prepare_base, prepare_data
from tasks.record import close_chain_run, complete_records, nominate, open_chain_run, record
from tasks.report import report
from tasks.unlearn import unlearn
from tasks.version import version

FLOW = "continual-unlearn"


@flow(name=FLOW, persist_result=False)
def continual_unlearn(
    project_folder: str = ".", overrides: list[str] | None = None
) -> list[dict[str, Any]] | State[Any]:
    """Unlearn what is pending, in the ledger's order; each step starts from the newest accepted model.

    Args:
        project_folder: a project made by ``alkn init``.
        overrides: settings as ``a.b=c``, over params.yaml.

    Returns:
        One row a request that was decided: ``request``, ``accepted``, ``reason``; if any was rejected, the
        flow run ends as failed, so that whoever watches it is told, and all the same everything is recorded.

    Raises:
        RequestsRejected: at the caller in this process, with the rows.
        InputError: if the settings are wrong, or another run holds the chain.
    """
    project = Project.at(Path(project_folder))
    settings = project.settings(tuple(overrides or ()))
    with project.chain_lock():
        prepare_data(project, settings)
        prepare_base(project, settings)
        complete_records(project, settings)
        pending = list(load_ledger(project).pending)
        if not pending:
            return []
        chain_run = open_chain_run(project, settings, flow_run.get_name() or FLOW)
        decided: list[Sealed] = []
        done = False
        try:
            for request in pending:
                if load_ledger(project).where(request) == "pending":  # it may have been withdrawn meanwhile
                    decided.append(process(project, request, settings, chain_run))
            done = True
            report(project, settings, chain_run)
        finally:
            close_chain_run(project, settings, chain_run, failed=not done)
        rows = [{"request": s.request, "accepted": s.accepted, "reason": s.reason} for s in decided]
    if all(row["accepted"] for row in rows):
        return rows
    rejected = RequestsRejected(rows)
    return Failed(message=str(rejected), data=rejected)


def process(project: Project, request: str, settings: Settings, chain_run: str | None) -> Sealed:
    """One request: version → unlearn → evaluate → attack → nominate → gate → record."""
    sealed = sealed_step(project, request)
    if sealed is None:
        plan = version(project, request, settings)
        unlearned = unlearn(project, plan)
        evaluation = evaluate(project, plan)
        attacked = attack(project, plan)
        nominate(project, plan, chain_run)
        seconds = {"evaluate": evaluation["seconds"], "attack": attacked["seconds"]}
        sealed = gate(project, plan, unlearned, seconds)
    record(project, sealed, settings)
    return sealed
