"""Prefect task: the candidate is judged."""

from __future__ import annotations

from collections.abc import Mapping

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn.project import Project
from alkn.records import Plan, Sealed, Unlearned
from alkn.step import gate_step


@task(cache_policy=NO_CACHE)
def gate(project: Project, plan: Plan, unlearned: Unlearned, seconds: Mapping[str, float]) -> Sealed:
    """Every gate says its word; the manifest, written last, closes the step. ``seconds``: of the parts before."""
    return gate_step(project, plan, unlearned, seconds={"unlearn": unlearned.seconds, **seconds})
