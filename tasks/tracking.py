"""MLflow: runs, metrics, datasets, models and their lineage. The only file that imports mlflow.

Everything logged is read from the files of a finished or judged step, so what could not be logged
when it happened is logged by the next run: numbers, digests, and each step's task vector, which is
as sensitive as the records. The models stay with DVC.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from alkn.errors import AlknError
from alkn.files import digest_of_value, read_json
from alkn.manifest import read_manifest
from alkn.project import Project, Step
from alkn.settings import Settings, Tracking

T = TypeVar("T")
DIGEST_LENGTH = 36
KEY, REQUEST, VERDICT = "alkn.key", "alkn.request", "alkn.verdict"


class TrackingUnavailable(AlknError):
    """The tracking server or database did not take what was logged; the step itself is safe on disk."""


def tracking_uri(root: Path, tracking: Tracking) -> str:
    """The tracking URI, a SQLite path relative to ``root`` made absolute."""
    prefix = "sqlite:///"
    uri = tracking.uri
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        return f"{prefix}{root / uri.removeprefix(prefix)}"
    return uri


class Store:
    """An experiment in an MLflow store.

    Args:
        root: folder that relative places are relative to.
        name: of the experiment.
        tracking: URI, artifacts, timeout.
    """

    def __init__(self, root: Path, name: str, tracking: Tracking) -> None:
        self._root, self._name, self._tracking = root, name, tracking
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(tracking.timeout))

    @cached_property
    def _client(self) -> Any:
        import mlflow

        # A new version's logged model is looked up under the global URI, whatever the client's own is.
        mlflow.set_tracking_uri(tracking_uri(self._root, self._tracking))
        # What fails is raised, and told by whoever asked: not also as a traceback.
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        return mlflow.MlflowClient()

    @cached_property
    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(self._name)
        if known is not None:
            return str(known.experiment_id)
        artifacts = self._root / self._tracking.artifacts
        local = tracking_uri(self._root, self._tracking).startswith("sqlite:")
        return str(self._client.create_experiment(self._name, artifact_location=artifacts.as_uri() if local else None))

    def _guarded(self, action: Callable[[], T]) -> T:
        import requests
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return action()
        except (MlflowException, SQLAlchemyError, requests.RequestException, OSError) as error:
            raise TrackingUnavailable(f"MLflow: {type(error).__name__}: {str(error)[:300]}") from error

    def _log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:500]) for name, value in _flat(values).items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])

    def _log_numbers(self, run_id: str, numbers: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(run_id, [Metric(name, float(value), now, step) for name, value in numbers.items()])


class Tracker(Store):
    """One project's experiment and registered model.

    Args:
        project: whose steps are logged.
        settings: name, URI and timeout.
    """

    def __init__(self, project: Project, settings: Settings) -> None:
        super().__init__(project.root, settings.project.name, settings.tracking)
        self._project, self._settings = project, settings

    def open_chain_run(self, name: str) -> str:
        """A parent run for one flow run; returns its id.

        The caller holds the chain, so a parent run that is still open belongs to a process that was
        killed; it is closed as such.
        """

        def start() -> str:
            left = self._client.search_runs([self._experiment], "tags.`alkn.kind` = 'chain' and status = 'RUNNING'")
            for run in left:
                self._client.set_terminated(run.info.run_id, "KILLED")
            return str(
                self._client.create_run(self._experiment, run_name=name, tags={"alkn.kind": "chain"}).info.run_id
            )

        return self._guarded(start)

    def close_run(self, run_id: str, *, failed: bool) -> None:
        """End a run."""
        self._guarded(lambda: self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED"))

    def log_files(self, run_id: str, files: Sequence[Path], *, folder: str) -> None:
        """Log files as artifacts of a run, in a folder of its own."""

        def log() -> None:
            for path in files:
                self._client.log_artifact(run_id, str(path), folder)

        self._guarded(log)

    def log_base(self) -> None:
        """Log the base model once: a run, its metrics, a logged model and the first registered version."""

        def log() -> None:
            step = self._project.base
            manifest = read_manifest(step)
            if manifest is None:
                return
            known = self._find_run("base", _key(manifest))
            if known is not None and VERDICT in known.data.tags:
                return
            if known is not None:
                self._discard(known.info.run_id)
            run_id = self._start("base", _key(manifest), parent=None)
            self._log_evaluation(run_id, read_json(step.evaluation))
            self._register(run_id, step, manifest["outputs"]["model"], parent_digest=None)
            self._client.set_tag(run_id, VERDICT, "base")
            self._client.set_terminated(run_id)

        self._guarded(log)

    def nominate(self, request_id: str, *, inputs: Mapping[str, str], chain_run: str | None) -> None:
        """Log an evaluated step before its gate: run, curves, metrics, datasets, model, alias ``candidate``.

        A run that an interrupted attempt left behind is replaced.
        """

        def log() -> None:
            key = digest_of_value(dict(inputs))
            known = self._find_run(request_id, key)
            if known is not None:
                self._discard(known.info.run_id)
            step = self._project.step(request_id)
            run_id = self._start(request_id, key, parent=chain_run)
            report = read_json(step.unlearning)
            self._log_settings(run_id, step)
            self._log_rounds(run_id, report)
            self._log_evaluation(run_id, read_json(step.evaluation))
            if step.attacks.is_file():  # steps of older versions have none
                self._log_attacks(run_id, read_json(step.attacks))
            self._log_datasets(run_id, request_id, inputs)
            version = self._register(run_id, step, report["outputs"]["model"], parent_digest=inputs["parent"])
            self._client.set_registered_model_alias(self._settings.project.name, "candidate", version)

        self._guarded(log)

    def record(self, request_id: str, *, champion: bool) -> None:
        """Log a step's verdict from its manifest; a step whose run is missing is logged whole first.

        Args:
            request_id: a sealed step.
            champion: whether it is the newest accepted step and so gets the alias.
        """

        def log() -> None:
            step = self._project.step(request_id)
            manifest = read_manifest(step)
            if manifest is None:
                raise AlknError(f"steps/{request_id} has no manifest; there is no verdict to log")
            key = _key(manifest)
            run = self._find_run(request_id, key)
            # A run that the tracking server lost half of has no version yet.
            if run is None or not self._versions(run.info.run_id):
                self.nominate(request_id, inputs=manifest["inputs"], chain_run=None)
                run = self._find_run(request_id, key)
            run_id = run.info.run_id
            self._log_evidence(run_id, step, manifest)
            self._set_aliases(run_id, accepted=manifest["accepted"], champion=champion)
            # Last: it says that everything before it is there.
            self._client.set_tag(run_id, VERDICT, "accepted" if manifest["accepted"] else "rejected")
            self._client.set_terminated(run_id)

        self._guarded(log)

    def is_recorded(self, request_id: str) -> bool:
        """Whether a sealed step's verdict is logged."""

        def look() -> bool:
            manifest = read_manifest(self._project.step(request_id))
            run = None if manifest is None else self._find_run(request_id, _key(manifest))
            return run is not None and VERDICT in run.data.tags

        return self._guarded(look)

    def _find_run(self, request_id: str, key: str) -> Any:
        found = self._client.search_runs(
            [self._experiment], f"tags.`{REQUEST}` = '{request_id}' and tags.`{KEY}` = '{key}'", max_results=1
        )
        return found[0] if found else None

    def _versions(self, run_id: str) -> list[Any]:
        """The versions that a run registered."""
        name = self._settings.project.name
        return list(self._client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"))

    def _discard(self, run_id: str) -> None:
        """Delete the run of an interrupted attempt with its model: no later step may name it as its parent."""
        for version in self._versions(run_id):
            self._client.delete_model_version(version.name, version.version)
        outputs = self._client.get_run(run_id).outputs
        for output in outputs.model_outputs if outputs is not None else ():
            self._client.delete_logged_model(output.model_id)
        self._client.delete_run(run_id)

    def _start(self, name: str, key: str, *, parent: str | None) -> str:
        tags = {REQUEST: name, KEY: key, "alkn.kind": "step"}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        return str(self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id)

    def _log_settings(self, run_id: str, step: Step) -> None:
        import yaml

        self._log_params(run_id, yaml.safe_load(step.params.read_text(encoding="utf-8")))

    def _log_rounds(self, run_id: str, report: Mapping[str, Any]) -> None:
        for row in report["rounds"]:
            self._log_numbers(run_id, {f"round/{k}": v for k, v in row.items() if k != "round"}, step=int(row["round"]))
        facts = {"passes": report["passes"], "steps": int(report["rounds"][-1]["round"])}
        facts |= report["task_vector"]
        self._log_numbers(run_id, {f"unlearning/{name}": value for name, value in facts.items()})

    def _log_evaluation(self, run_id: str, metrics: Mapping[str, Any]) -> None:
        numbers: dict[str, float] = {}
        for set_name, row in metrics["sets"].items():
            numbers |= {f"{set_name}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        numbers |= {f"model/{name}": value for name, value in metrics["model"].items()}
        self._log_numbers(run_id, numbers)
        for name, reason in metrics["missing"].items():
            self._client.set_tag(run_id, f"missing.{name.replace('/', '.')}", reason[:500])

    def _log_attacks(self, run_id: str, report: Mapping[str, Any]) -> None:
        """A curve an attack and number; an MLflow step is what was spent, in the curve's own unit."""
        for attack, curve in report.items():
            if attack == "missing":
                continue
            for point in curve["points"]:
                numbers = {f"attack/{attack}/{metric}": point[metric] for metric in curve["about"]}
                self._log_numbers(run_id, numbers, step=int(point["at"]))
        for attack, reason in report["missing"].items():
            self._client.set_tag(run_id, f"missing.attack.{attack}", reason[:500])

    def _log_datasets(self, run_id: str, request_id: str, inputs: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        used = {"forget": (f"request {request_id}", inputs["request"], f"data/requests/{request_id}.jsonl")}
        if inputs["splits"] != "none":
            used["retain"] = ("splits", inputs["splits"], "data/splits")
        datasets = [
            DatasetInput(
                Dataset(name, _short(digest), "local", json.dumps({"uri": path})),
                [InputTag("mlflow.data.context", context)],
            )
            for context, (name, digest, path) in used.items()
        ]
        self._client.log_inputs(run_id, datasets=datasets)

    def _register(self, run_id: str, step: Step, digest: str, *, parent_digest: str | None) -> str:
        """A logged model, READY, linked to its parent model and to a new version of the registered model."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput
        from mlflow.exceptions import MlflowException

        path = f"steps/{step.id}/model"
        tags = {"digest": digest, "path": path, "parent": parent_digest or "none"}
        model = self._client.create_logged_model(
            self._experiment, name=step.id, source_run_id=run_id, tags=tags, model_type="hf-causal-lm"
        )
        if step.task_vector.is_file():
            self._client.log_model_artifact(model.model_id, str(step.task_vector))
        else:
            self._client.log_model_artifact(model.model_id, str(step.manifest))
        self._client.finalize_logged_model(model.model_id, "READY")
        parent = self._find_model(parent_digest) if parent_digest else None
        if parent is not None:
            self._client.log_inputs(run_id, models=[LoggedModelInput(parent)])
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        name = self._settings.project.name
        try:
            self._client.get_registered_model(name)
        except MlflowException:
            self._client.create_registered_model(name)
        version = self._client.create_model_version(
            name, source=f"models:/{model.model_id}", run_id=run_id, tags=tags, model_id=model.model_id
        )
        return str(version.version)

    def _find_model(self, digest: str) -> str | None:
        found = self._client.search_logged_models([self._experiment], f"tags.digest = '{digest}'", max_results=1)
        return str(found[0].model_id) if found else None

    def _log_evidence(self, run_id: str, step: Step, manifest: Mapping[str, Any]) -> None:
        gate = read_json(step.gate)
        numbers = {
            f"gate/{name}": float(verdict["passed"])
            for name, verdict in gate["gates"].items()
            if verdict["passed"] is not None
        }
        seconds = {f"seconds/{name}": value for name, value in manifest["seconds"].items()}
        self._log_numbers(run_id, numbers | seconds)
        for outputs in self._client.get_run(run_id).outputs.model_outputs:
            self._client.log_model_artifact(outputs.model_id, str(step.manifest))
        for path in (step.manifest, step.evaluation, step.attacks, step.gate, step.unlearning):
            if path.is_file():
                self._client.log_artifact(run_id, str(path))
        if manifest["failed"]:
            self._client.set_tag(run_id, "alkn.failed", "; ".join(manifest["failed"])[:4000])

    def _set_aliases(self, run_id: str, *, accepted: bool, champion: bool) -> None:
        name = self._settings.project.name
        version = self._versions(run_id)[0]
        aliases = self._client.get_registered_model(name).aliases
        if aliases.get("candidate") == version.version:
            self._client.delete_registered_model_alias(name, "candidate")
        if accepted and champion:
            self._client.set_registered_model_alias(name, "champion", version.version)


def _key(manifest: Mapping[str, Any]) -> str:
    return digest_of_value(dict(manifest["inputs"]))


def _short(digest: str) -> str:
    return digest.split(":")[-1][:DIGEST_LENGTH]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out
