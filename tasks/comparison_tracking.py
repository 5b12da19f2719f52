"""A comparison in MLflow: its cells with their requests, and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alkn.settings import Tracking
from tasks.tracking import KEY, VERDICT, Store

CELL = "alkn.cell"


class ComparisonTracker(Store):
    """The experiment of a comparison: a run a cell with a child run a request, and a run of the report.

    What is logged are numbers, settings and the report's files; models and records stay on disk.

    Args:
        folder: of the comparison.
        name: of the experiment.
        tracking: URI, artifacts, timeout; relative to the folder.
    """

    def __init__(self, folder: Path, name: str, tracking: Tracking) -> None:
        super().__init__(folder.resolve(), name, tracking)

    def log_cell(self, name: str, key: str, cell: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Log a cell that is over, once: settings, its numbers over the request index, its rounds in child runs.

        Args:
            name: of the cell, which names its run.
            key: digest of what the cell rests on; a run of another key is another run.
            cell: ``state``, ``quantities``, ``base`` and ``steps`` (each with ``numbers``; steps with ``request``
                and ``rounds`` too).
            settings: of its steps.
        """

        def log() -> None:
            known = self._find(name, key)
            if known is not None and VERDICT in known.data.tags:
                return
            for run in [] if known is None else [known, *self._children(known)]:
                self._client.delete_run(run.info.run_id)
            run_id = self._begin(name, {KEY: key, "alkn.kind": "cell"})
            self._log_params(run_id, settings)
            for index, step in enumerate([cell["base"], *cell["steps"]]):
                self._log_numbers(run_id, step["numbers"], step=index)
            self._log_numbers(run_id, cell["quantities"], step=len(cell["steps"]))
            for step in cell["steps"]:
                self._log_child(run_id, step)
            # Last: it says that everything before it is there.
            self._client.set_tag(run_id, VERDICT, cell["state"])
            self._client.set_terminated(run_id, "FINISHED" if cell["state"] == "done" else "FAILED")

        self._guarded(log)

    def log_report(self, key: str, files: Sequence[Path]) -> None:
        """Log the report's files as artifacts of a run of their own; the same report is not logged twice."""

        def log() -> None:
            if self._find("report", key) is not None:
                return
            run_id = self._begin("report", {"alkn.kind": "report"})
            for path in files:
                self._client.log_artifact(run_id, str(path))
            self._client.set_tag(run_id, KEY, key)
            self._client.set_terminated(run_id)

        self._guarded(log)

    def _log_child(self, parent: str, step: Mapping[str, Any]) -> None:
        run_id = self._begin(step["request"], {"alkn.kind": "step", "mlflow.parentRunId": parent})
        for row in step["rounds"]:
            self._log_numbers(run_id, {k: v for k, v in row.items() if k != "round"}, step=int(row["round"]))
        self._log_numbers(run_id, step["numbers"])
        self._client.set_terminated(run_id)

    def _begin(self, name: str, tags: Mapping[str, str]) -> str:
        return str(self._client.create_run(self._experiment, run_name=name, tags={CELL: name, **tags}).info.run_id)

    def _find(self, name: str, key: str) -> Any:
        wanted = f"tags.`{CELL}` = '{name}' and tags.`{KEY}` = '{key}'"
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        return found[0] if found else None

    def _children(self, run: Any) -> list[Any]:
        wanted = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        return list(self._client.search_runs([self._experiment], wanted))
