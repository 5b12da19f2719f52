"""Which Prefect server is spoken to, and the deployments that it schedules."""

from __future__ import annotations

import os
import signal
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alkn.errors import InputError
from alkn.project import Project

STARTUP_S = 60
"""How long ``alkn serve`` waits for a server that is coming up."""


@contextmanager
def prefect_api(root: Path) -> Iterator[None]:
    """Speak to the project's Prefect server if it is up, else to one inside this process.

    ``PREFECT_API_URL`` in the environment wins. Prefect's own logging stays quiet: errors are
    printed once, by the command line.
    """
    # By default SIGTERM ends Python at once, and Prefect's own server would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "60")
    url = project_api(root)
    if "PREFECT_API_URL" in os.environ or url is None or _answers(url):
        yield
        return
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: None}):
        yield


def project_api(root: Path) -> str | None:
    """The API address in the project's prefect.toml, if it has one."""
    path = root / "prefect.toml"
    if not path.is_file():
        return None
    url = tomllib.loads(path.read_text(encoding="utf-8")).get("api", {}).get("url")
    return None if url is None else str(url)


def serve_deployments(project: Project) -> None:
    """Serve ``continual-unlearn`` and ``reverify`` under the name and schedules of the settings; one run at a time.

    Raises:
        InputError: if the server does not answer.
    """
    url = os.environ.get("PREFECT_API_URL") or project_api(project.root)
    if url is not None and not _comes_up(url, project.root):
        raise InputError(
            f"no Prefect server answers at {url}; start it first: prefect server start --host 127.0.0.1 --background"
        )
    settings = project.settings().prefect
    from prefect import Flow, serve
    from prefect.types.entrypoint import EntrypointType

    from flows.continual_unlearn import continual_unlearn
    from flows.reverify import reverify

    served: dict[Flow[..., Any], tuple[str, str]] = {
        continual_unlearn: (settings.cron, "Unlearn every pending deletion request of this project, in its order."),
        reverify: (settings.verify_cron, "Verify this project's newest accepted model again."),
    }
    # Registering comes before Prefect's own handler is there, and a signal between the two must pause as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        deployments: list[Any] = [
            flow.to_deployment(
                name=settings.deployment,
                cron=cron,
                parameters={"project_folder": str(project.root)},
                entrypoint_type=EntrypointType.MODULE_PATH,
                description=description,
            )
            for flow, (cron, description) in served.items()
        ]
        serve(*deployments, limit=1)
    finally:
        _pause([f"{flow.name}/{settings.deployment}" for flow in served])


def _pause(names: Sequence[str]) -> None:
    """Pause deployments that nobody serves any more.

    Prefect's runner does so too when it stops, unless the signal hits while one of its own tasks is at work:
    the exit that its handler raises there cancels the calls that pause.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
        for name in names:
            with suppress(PrefectException):  # it was never registered
                client.pause_deployment(client.read_deployment_by_name(name).id)


def _comes_up(url: str, root: Path) -> bool:
    """Whether the server answers; one that was just started in the background is given time to come up."""
    end = time.monotonic() + STARTUP_S
    while not _answers(url):
        if not _is_starting(root) or time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _is_starting(root: Path) -> bool:
    """Whether the process that ``prefect server start --background`` left in the project's Prefect home is alive."""
    try:
        os.kill(int((root / ".prefect" / "server.pid").read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:  # noqa: S310 - the project's own address
            return int(reply.status) == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False
