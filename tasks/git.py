"""Git: one commit a recorded change of the chain, where the settings ask for it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from alkn.errors import AlknError

TRACKED = (
    "params.yaml",
    "dvc.yaml",
    "dvc.lock",
    "prefect.toml",
    "prefect.yaml",
    ".gitignore",
    ".dvcignore",
    ".dvc/config",
    ".dvc/.gitignore",
    "data/ledger.yaml",
    "data/certificate.pub",
    "data/params.yaml",
    "data/splits.dvc",
    "data/requests/*.dvc",
)
OF_STEP = ("manifest.json", "params.yaml")


def run(root: Path, *arguments: str) -> str:
    """Run git in ``root`` and return what it printed.

    Raises:
        AlknError: with git's own message.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],  # noqa: S607 - git is found on PATH
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise AlknError(f"git {arguments[0]}: {error.stderr.strip()[:300]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AlknError(f"git {arguments[0]}: {type(error).__name__}") from None
    return done.stdout


def commit_records(root: Path, *, steps: Iterable[str] = ()) -> None:
    """Commit pointers, ledger, lock file and manifests, if any of them changed; nothing else is added.

    Args:
        root: the project folder.
        steps: those that are decided; what another one left half done is no record.
    """
    wanted = (*TRACKED, *(f"steps/{step}/{name}" for step in steps for name in OF_STEP))
    present = [pattern for pattern in wanted if any(root.glob(pattern))]
    run(root, "add", "--", *present)
    changed = run(root, "diff", "--cached", "--name-only", "--relative", "--", *present).split()
    if not changed:
        return
    recorded = sorted({Path(name).parts[1] for name in changed if name.startswith("steps/")})
    message = f"Record {', '.join(recorded)}" if recorded else "Record the chain"
    identity = [] if _has_identity(root) else ["-c", "user.name=alkn", "-c", "user.email=alkn@localhost"]
    run(root, *identity, "commit", "--quiet", "-m", message, "--", *changed)


def _has_identity(root: Path) -> bool:
    try:
        return bool(run(root, "config", "user.email").strip())
    except AlknError:
        return False
