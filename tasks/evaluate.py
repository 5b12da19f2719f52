"""Prefect task: the candidate is measured."""

from __future__ import annotations

import time
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn.project import Project
from alkn.records import Plan
from alkn.step import evaluate_step
from tasks.progress import progress_bars


@task(cache_policy=NO_CACHE)
def evaluate(project: Project, plan: Plan) -> dict[str, Any]:
    """Read the candidate back from disk and measure it on every set; returns the metrics and ``seconds``."""
    started = time.monotonic()
    with progress_bars(f"evaluate {plan.request}") as progress:
        metrics = evaluate_step(project, plan, progress=progress)
    return {**metrics, "seconds": time.monotonic() - started}
