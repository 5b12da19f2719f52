"""Prefect task: the method makes a candidate."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn.project import Project
from alkn.records import Plan, Unlearned
from alkn.step import unlearn_step
from tasks.progress import progress_bars


@task(cache_policy=NO_CACHE)
def unlearn(project: Project, plan: Plan) -> Unlearned:
    """Run the method on the parent's model; the candidate, its task vector and state are on disk afterwards."""
    with progress_bars(f"unlearn {plan.request}") as progress:
        return unlearn_step(project, plan, progress=progress)
