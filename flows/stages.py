"""``alkn stage``: one part of the chain, as dvc.yaml and launchers of several processes run it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import click

from flows.console import here, say


@click.group()
def stage() -> None:
    """What dvc.yaml runs: one part of the chain, without Prefect and MLflow."""


@stage.command("data")
def stage_data() -> None:
    """Write the benchmark's splits."""
    from alkn.record_sets import build_splits
    from alkn.settings import load_settings

    project = here()
    with project.chain_lock():
        build_splits(project, load_settings(project.data_params))


@stage.command("base")
def stage_base() -> None:
    """Make the base model."""
    from alkn.base import make_base
    from alkn.settings import load_settings
    from tasks.progress import progress_bars

    project = here()
    with project.chain_lock(), progress_bars("base") as progress:
        make_base(project, load_settings(project.base.params), progress=progress)


@stage.command("step")
@click.argument("request_id")
def stage_step(request_id: str) -> None:
    """Make an accepted step again, with the settings it was made with, or the first pending one for the first time.

    'accelerate launch' and 'torchrun' may start this in several processes; 'alkn run' records a pending one.
    """
    from alkn.chain import begin_together, place_in_chain
    from alkn.core.scoring import no_progress
    from alkn.requests.ledger import load_ledger
    from alkn.step import make_step
    from tasks.progress import progress_bars

    project = here()
    ledger, first = load_ledger(project), int(os.environ.get("RANK", "0")) == 0
    with project.chain_lock() if first else nullcontext():
        if ledger.where(request_id) == "pending":
            previous, earlier = begin_together(project, request_id, project.settings())
        else:
            previous, earlier = place_in_chain(ledger, request_id)
        with progress_bars(request_id) if first else nullcontext(no_progress) as progress:
            sealed = make_step(project, request_id, previous=previous, earlier=earlier, progress=progress)
    if not sealed.accepted and first:
        say(f"{request_id}: a gate failed: {sealed.reason}", err=True)
        sys.exit(1)
