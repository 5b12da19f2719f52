"""Prefect task: a request's data is versioned and its step is planned."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn import chain
from alkn.project import Project
from alkn.records import Plan
from alkn.requests.intake import begin_request
from alkn.settings import Settings
from tasks import versioning


@task(cache_policy=NO_CACHE)
def version(project: Project, request: str, settings: Settings) -> Plan:
    """Bring the request's records under DVC, check them against the ledger, freeze the step's settings."""
    begin_request(project, settings, request, track=lambda path: versioning.track_file(project, path))
    return chain.begin_step(project, request, settings)
