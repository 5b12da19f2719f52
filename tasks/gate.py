"""Prefect task: the candidate is judged."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn.project import Project
from alkn.records import Plan, Sealed, Unlearned
from alkn.step import gate_step


@task(cache_policy=NO_CACHE)
def gate(project: Project, plan: Plan, unlearned: Unlearned, evaluation_seconds: float) -> Sealed:
    """Every gate says its word; the manifest, written last, closes the step."""
    return gate_step(project, plan, unlearned, seconds={"unlearn": unlearned.seconds, "evaluate": evaluation_seconds})
