"""DVC: pointers of requests and splits, and the stages of the chain. The only file that imports dvc."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo

from alkn.errors import AlknError
from alkn.estimate import free_bytes
from alkn.project import Project

# Standard output belongs to the command line: DVC's hints on what to add to git do not. What fails is raised.
logging.getLogger("dvc").setLevel(logging.WARNING)
logging.getLogger("dvc_data").setLevel(logging.CRITICAL)

T = TypeVar("T")
ATTEMPTS = 60
FULL = 2**16
"""With less than so many bytes free, a failure of DVC is that of a full disk."""


class VersioningFailed(AlknError):
    """DVC refused; its message says why."""


def _with(project: Project, action: Callable[[Repo], T]) -> T:
    """Run an action on the project's DVC repo, again while another process holds DVC's lock."""
    for attempt in range(ATTEMPTS):
        try:
            # DVC resolves a target against the working directory, whatever the repo's root is.
            with contextlib.chdir(project.root), Repo(str(project.root)) as repo:
                try:
                    return action(repo)
                except LockError:
                    raise
                except (DvcException, OSError) as error:
                    raise _failure(project, repo, error) from error
        except LockError:
            if attempt == ATTEMPTS - 1:
                raise VersioningFailed(f"{project.root}: DVC has been locked for {ATTEMPTS // 2} s") from None
            time.sleep(0.5)
    raise AssertionError("unreachable")


def _failure(project: Project, repo: Repo, error: DvcException | OSError) -> Exception:
    """What to raise for an error of DVC; the half-written copies that it leaves in its cache are removed.

    They may be personal text, and nothing points at them. DVC says "failed to upload" when the disk is full.
    """
    full = free_bytes(project.root) < FULL
    with repo.lock:
        for half in (project.root / ".dvc" / "cache").rglob(".*.tmp"):
            half.unlink(missing_ok=True)
    if isinstance(error, OSError):
        return error
    if full:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(project.root))
    return VersioningFailed(f"DVC: {error}")


def init(root: Path) -> None:
    """Make ``root`` a DVC repo, analytics off, if it is none; without git it works too."""
    if (root / ".dvc").is_dir():
        return
    repo = Repo.init(str(root), no_scm=not (root / ".git").exists())
    with repo.config.edit() as config:
        config["core"]["analytics"] = False
    repo.close()


def track_file(project: Project, path: Path) -> Path:
    """``dvc add``: put a file or folder under DVC, and return its pointer."""
    _with(project, lambda repo: repo.add(str(path)))
    return path.with_name(f"{path.name}.dvc")


def is_tracked(path: Path) -> bool:
    """Whether a file has a DVC pointer."""
    return path.with_name(f"{path.name}.dvc").is_file()


def record_stage(project: Project, stage: str) -> None:
    """Record outputs that this process has made as a stage's: dvc.lock and cache, nothing is run."""
    _with(project, lambda repo: repo.commit(f"dvc.yaml:{stage}", force=True))


def is_of_other_inputs(project: Project, stage: str) -> bool:
    """Whether what dvc.lock holds of a stage was made from other settings or files than lie there now."""
    status = _with(project, lambda repo: repo.status(targets=[f"dvc.yaml:{stage}"]))
    return any(isinstance(line, dict) and "changed deps" in line for line in status.get(stage, ()))


def stages(project: Project) -> list[str]:
    """Names of all stages of dvc.yaml."""
    return _with(project, lambda repo: [stage.addressing for stage in repo.index.stages if hasattr(stage, "name")])


def recorded_stages(project: Project) -> set[str]:
    """Names of the stages that dvc.lock holds."""
    import yaml

    lock = project.root / "dvc.lock"
    if not lock.is_file():
        return set()
    return set(yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"])
