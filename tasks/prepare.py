"""Prefect tasks that make what a chain rests on: splits and base model."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn import chain
from alkn.project import Project
from alkn.requests.ledger import load_ledger
from alkn.settings import Settings
from tasks import versioning
from tasks.progress import progress_bars


@task(cache_policy=NO_CACHE)
def prepare_data(project: Project, settings: Settings) -> None:
    """Make the benchmark's splits if they are missing, and record them with DVC."""
    built = chain.prepare_data(project, settings)
    if settings.benchmark is not None and (built or _is_behind(project, "data")):
        versioning.record_stage(project, "data")


@task(cache_policy=NO_CACHE)
def prepare_base(project: Project, settings: Settings) -> None:
    """Make the base model if it is missing, and record it with DVC."""
    with progress_bars("base") as progress:
        made = chain.prepare_base(project, settings, progress=progress)
    if made or _is_behind(project, "base"):
        versioning.record_stage(project, "base")


def _is_behind(project: Project, stage: str) -> bool:
    """Whether DVC lacks what was made: a run may have ended between the two.

    Under a chain nothing is made anew. Outputs that differ alone are damage, which 'dvc checkout' mends.
    """
    if stage not in versioning.recorded_stages(project):
        return True
    return not load_ledger(project).accepted and versioning.is_of_other_inputs(project, stage)
