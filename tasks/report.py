"""Prefect task: tables and pictures of the chain, on disk, in MLflow and as artifacts of the flow run; all derived."""

from __future__ import annotations

import base64
import logging
from pathlib import Path

from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from alkn.files import remove, write_bytes
from alkn.project import Project
from alkn.settings import Settings
from tasks.tracking import Tracker, TrackingUnavailable

logger = logging.getLogger(__name__)

SHOWN = ("matrix.png", "utility.png")
"""Pictures that the flow run shows beside its table."""


@task(cache_policy=NO_CACHE)
def report(project: Project, settings: Settings, chain_run: str | None) -> None:
    """Write reports/plots, log it to the chain's MLflow run, and leave table and pictures with the flow run."""
    from alkn.report.markdown import chain_markdown
    from alkn.report.plots import pictures, tables
    from alkn.report.story import read_story

    story = read_story(project, settings.project.name, check=False)
    drawn = pictures(story)
    try:
        files = write_plots(project, {**tables(story), **drawn})
    except OSError as error:  # everything is recorded by now, and this can be made again
        logger.warning("reports/plots was not written: %s", error.strerror)
        return
    if chain_run is not None:
        try:
            Tracker(project, settings).log_files(chain_run, files, folder="report")
        except TrackingUnavailable as error:
            logger.warning("the pictures are not logged, the next run's will be: %s", error)
    create_markdown_artifact(chain_markdown(story), key="chain", description="The chain after this run")
    for name in SHOWN:
        if name in drawn:
            picture = f"data:image/png;base64,{base64.b64encode(drawn[name]).decode()}"
            create_image_artifact(
                picture, key=f"chain-{Path(name).stem}", description=f"{Path(name).stem} of the chain"
            )


def write_plots(project: Project, files: dict[str, bytes]) -> list[Path]:
    """Replace what lies in reports/plots; returns the paths."""
    folder = project.root / "reports" / "plots"
    for old in folder.glob("*") if folder.is_dir() else ():
        if old.name not in files:
            remove(old)
    for name, data in files.items():
        write_bytes(folder / name, data)
    return [folder / name for name in files]
