"""The verification of the champion, on a schedule of its own: does what was forgotten stay forgotten?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from alkn.errors import DoesNotHold
from alkn.project import Project
from tasks.verify import tell, verify

FLOW = "reverify"


@flow(name=FLOW, persist_result=False)
def reverify(project_folder: str = ".", exact: bool = False) -> dict[str, Any] | State[Any]:
    """Verify the newest accepted model again, on numbers measured now.

    Args:
        project_folder: a project made by ``alkn init``.
        exact: measure all records of earlier requests, also where a step took a sample.

    Returns:
        ``champion``, ``model`` (its digest) and ``compared``; if something came back or is not what was recorded,
        the flow run ends as failed, and the event ``alkn.verification.failed`` says what.

    Raises:
        DoesNotHold: at the caller in this process, with the whole report.
        InputError: if there is no base model.
    """
    project = Project.at(Path(project_folder))
    report = verify(project, exact)
    tell(project, report)
    if report["holds"]:
        return {key: report[key] for key in ("champion", "model", "compared")}
    fault = DoesNotHold(report)
    return Failed(message=str(fault), data=fault)
