"""Prefect task: the candidate is attacked."""

from __future__ import annotations

import time
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn.attacking import attack_step
from alkn.project import Project
from alkn.records import Plan
from tasks.progress import progress_bars


@task(cache_policy=NO_CACHE)
def attack(project: Project, plan: Plan) -> dict[str, Any]:
    """Read the candidate back from disk and attack it; returns the curves and ``seconds``."""
    started = time.monotonic()
    with progress_bars(f"attack {plan.request}") as progress:
        curves = attack_step(project, plan, progress=progress)
    return {**curves, "seconds": time.monotonic() - started}
