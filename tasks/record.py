"""Prefect tasks: what was decided goes into ledger, DVC, MLflow and git.

All of it is derived from the step's files, so a run that was cut off is completed by the next one,
and a tracking server that is down costs a warning, not a result.
"""

from __future__ import annotations

import logging
from datetime import date

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn.project import Project
from alkn.records import Plan, Sealed
from alkn.requests.ledger import BASE, editing, load_ledger
from alkn.settings import Settings
from tasks import git, versioning
from tasks.tracking import Tracker, TrackingUnavailable

logger = logging.getLogger(__name__)


@task(cache_policy=NO_CACHE)
def open_chain_run(project: Project, settings: Settings, name: str) -> str | None:
    """The MLflow parent run of this flow run, or ``None`` while tracking is down."""
    try:
        tracker = Tracker(project, settings)
        tracker.log_base()
        return tracker.open_chain_run(name)
    except TrackingUnavailable as error:
        logger.warning("not logged, the next run will: %s", error)
        return None


@task(cache_policy=NO_CACHE)
def close_chain_run(project: Project, settings: Settings, run: str | None, failed: bool) -> None:
    """End the MLflow parent run."""
    if run is None:
        return
    try:
        Tracker(project, settings).close_run(run, failed=failed)
    except TrackingUnavailable as error:
        logger.warning("the chain's run could not be closed: %s", error)


@task(cache_policy=NO_CACHE)
def nominate(project: Project, plan: Plan, chain_run: str | None) -> None:
    """Log the evaluated candidate to MLflow, before its gate, under the alias ``candidate``."""
    try:
        Tracker(project, plan.settings).nominate(plan.request, inputs=plan.inputs, chain_run=chain_run)
    except TrackingUnavailable as error:
        logger.warning("%s not logged, the next run will: %s", plan.request, error)


@task(cache_policy=NO_CACHE)
def record(project: Project, sealed: Sealed, settings: Settings) -> None:
    """Write the verdict into the ledger, then DVC, MLflow and, where it is on, git."""
    with editing(project) as ledger:
        ledger.decide(
            sealed.request,
            accepted=sealed.accepted,
            previous=sealed.manifest["previous"],
            reason=sealed.reason,
            day=date.today(),
        )
    complete_records(project, settings)


def complete_records(project: Project, settings: Settings) -> None:
    """Bring DVC, MLflow and git up to the ledger: whatever an earlier run decided and did not record."""
    ledger = load_ledger(project)
    known = versioning.recorded_stages(project)
    for request in ledger.accepted:
        if f"step@{request}" not in known:
            versioning.record_stage(project, f"step@{request}")
    try:
        tracker = Tracker(project, settings)
        tracker.log_base()
        for request in (*ledger.accepted, *ledger.rejected):
            if not tracker.is_recorded(request):
                tracker.record(request, champion=request == ledger.newest)
    except TrackingUnavailable as error:
        logger.warning("not everything is logged, the next run will: %s", error)
    commit_to_git(project, settings)


def commit_to_git(project: Project, settings: Settings) -> None:
    """Commit what git tracks of the chain, where the settings ask for it."""
    if settings.git.commit:
        ledger = load_ledger(project)
        git.commit_records(project.root, steps=(BASE, *ledger.accepted, *ledger.rejected))
