"""Prefect tasks that make what a chain rests on: splits and base model."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn import chain
from alkn.project import Project
from alkn.settings import Settings
from tasks import versioning
from tasks.progress import progress_bars


@task(cache_policy=NO_CACHE)
def prepare_data(project: Project, settings: Settings) -> None:
    """Make the benchmark's splits if they are missing, and record them with DVC."""
    built = chain.prepare_data(project, settings)
    if settings.benchmark is not None and (built or "data" not in versioning.recorded_stages(project)):
        versioning.record_stage(project, "data")


@task(cache_policy=NO_CACHE)
def prepare_base(project: Project, settings: Settings) -> None:
    """Make the base model if it is missing, and record it with DVC."""
    with progress_bars("base") as progress:
        made = chain.prepare_base(project, settings, progress=progress)
    if made or "base" not in versioning.recorded_stages(project):
        versioning.record_stage(project, "base")
