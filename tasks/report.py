"""Prefect task: tables and pictures of the chain, on disk, in MLflow and as artifacts of the flow run; all derived."""

from __future__ import annotations

import base64
import logging
import re
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
    slug = re.sub(r"[^a-z0-9]+", "-", story.name.lower()).strip("-")  # several projects may share a server
    create_markdown_artifact(chain_markdown(story), key=f"chain-{slug}", description=f"The chain of {story.name}")
    for name in SHOWN:
        if name in drawn:
            what, picture = Path(name).stem, base64.b64encode(drawn[name]).decode()
            create_image_artifact(
                f"data:image/png;base64,{picture}", key=f"{what}-{slug}", description=f"{what} of {story.name}"
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
