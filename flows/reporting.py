"""``alkn report --html``: the page on disk."""

from __future__ import annotations

import importlib.metadata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alkn.files import write_bytes
from alkn.project import Project
from alkn.report.page import report_page
from alkn.report.story import read_story


def write_page(project: Project, path: Path) -> dict[str, Any]:
    """Write the report; returns where it is, how many requests it tells of, and those that could not be read."""
    story = read_story(project, project.settings().project.name)
    program = f"alkn {importlib.metadata.version('alkn')}"
    write_bytes(path, report_page(story, made=datetime.now(UTC).date().isoformat(), program=program))
    return {"html": str(path), "requests": len(story.decided), "unread": dict(story.unread)}
