"""``alkn init``: make a project folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from alkn.dvc_yaml import dvc_stages
from alkn.errors import InputError
from alkn.files import write_bytes, write_yaml
from alkn.models import check_model_folder
from alkn.project import Project
from alkn.record_sets import Records, adopt_split
from alkn.report.signing import signing_key
from alkn.requests.ledger import Ledger, save_ledger
from alkn.requests.schema import read_records
from alkn.settings import Settings, read_mapping, validate_settings
from tasks import git, versioning

GITIGNORE = """\
/.venv/
/.alkn/
/.prefect/
/mlflow.db*
/mlartifacts/
/mlruns/
/reports/
/reference/
/data/splits/
/data/requests/*.jsonl
/steps/*/*
!/steps/*/manifest.json
!/steps/*/params.yaml
__pycache__/
"""
PREFECT_TOML = """\
# Prefect in this folder: a home of its own, loopback only, nothing sent out.
home = ".prefect"

[api]
url = "http://127.0.0.1:{port}/api"

[server]
analytics_enabled = false

[server.api]
host = "127.0.0.1"
port = {port}

[server.concurrency]
lease_storage = "prefect.server.concurrency.lease_storage.filesystem"

[cloud]
enable_orchestration_telemetry = false

[logging]
extra_loggers = "alkn,tasks"
"""
SHARED_PREFECT_TOML = "# This project shares the Prefect home and server of your own profile.\n"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """What the user asked ``alkn init`` for.

    Attributes:
        model: folder or hub id of the base model; ``None``: the benchmark's, trained from scratch.
        splits: retain, utility, holdout -> the user's file, where given.
        params: a ready params.yaml to start from.
        port: of the project's Prefect server; ``None``: one of its own is chosen.
        share_prefect: use the user's own Prefect home and server.
    """

    model: str | None
    splits: dict[str, Path]
    params: Path | None
    port: int | None
    share_prefect: bool


def make_project(folder: Path, wanted: Wanted) -> Project:
    """Check everything, build the folder beside its place, then move it there.

    Raises:
        InputError: if the folder is in use or an input is wrong; nothing was written then.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty")
    model = None if wanted.model is None else _resolve_model(wanted.model)
    if model is None and wanted.splits and wanted.params is None:
        raise InputError("--retain, --utility and --holdout are for a model of your own: give --model too")
    records = {name: read_records(path) for name, path in wanted.splits.items()}
    if model is not None and "retain" not in records:
        raise InputError("--model needs --retain FILE: records that must stay known, for the method to learn from")
    values = _values(folder, wanted, model, records)
    settings = validate_settings(values, wanted.params or folder / "params.yaml")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(building, values, settings, records, wanted, folder)
        if folder.exists():
            # Filled, not replaced: a shell may stand in it.
            for path in building.iterdir():
                os.replace(path, folder / path.name)
            building.rmdir()
        else:
            os.replace(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    project = Project.at(folder)
    _set_up_versioning(project, settings, bool(records))
    return project


def _values(folder: Path, wanted: Wanted, model: Path | None, records: dict[str, Records]) -> dict[str, object]:
    if wanted.params is not None:
        values = read_mapping(wanted.params)
    else:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.resolve().name).strip("-._") or "project"
        values = {"project": {"name": name}, "seed": 0}
        if model is None:
            values |= {"benchmark": {"name": "people"}, "base": {"architecture": {"vocab_size": 1024}}}
        values["method"] = {"name": "alkn", "preset": "interleaved"}
        if model is None:
            values["targets"] = {"p": 0.01, "exact_memorization": "holdout"}
        elif "holdout" in records:
            values["targets"] = {"p": "holdout", "exact_memorization": "holdout"}
        values["git"] = {"commit": True}
    if model is not None:
        values["base"] = {**(values.get("base") or {}), "model": str(model)}
    return dict(values)


def _write(
    root: Path, values: dict[str, object], settings: Settings, records: dict[str, Records], wanted: Wanted, folder: Path
) -> None:
    project = Project(root)
    head = b"# Settings of this project. docs/SETTINGS.md lists every key with its default.\n"
    write_bytes(project.params, head + yaml.safe_dump(values, sort_keys=False).encode())
    save_ledger(project, Ledger())
    stages = dvc_stages(
        benchmark=settings.benchmark is not None,
        splits=settings.benchmark is not None or bool(records),
        own_model=settings.base.model is not None,
    )
    write_yaml(root / "dvc.yaml", stages)
    write_bytes(root / ".gitignore", GITIGNORE.encode())
    port = wanted.port or _own_port(folder)
    write_bytes(
        root / "prefect.toml",
        (SHARED_PREFECT_TOML if wanted.share_prefect else PREFECT_TOML.format(port=port)).encode(),
    )
    for name, rows in records.items():
        adopt_split(project, name, rows)
    (root / "data" / "requests").mkdir(parents=True, exist_ok=True)
    project.key(create=True)
    signing_key(project)


def _set_up_versioning(project: Project, settings: Settings, own_splits: bool) -> None:
    if settings.git.commit and not (project.root / ".git").exists():
        git.run(project.root, "init", "--quiet")
    versioning.init(project.root)
    if own_splits:
        versioning.track_file(project, project.splits)
    if settings.git.commit:
        git.commit_records(project.root)


def _resolve_model(text: str) -> Path:
    path = Path(text).expanduser()
    if path.exists() or not HUB_ID.fullmatch(text):
        check_model_folder(path)
        return path.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"--model {text}: no such folder, and the hub did not give it ({type(error).__name__})"
        ) from None
    check_model_folder(Path(found))
    return Path(found)


def _own_port(folder: Path) -> int:
    """A port of the project's own: by its path, the next free one on loopback."""
    start = int.from_bytes(hashlib.sha256(str(folder.resolve()).encode()).digest()[:4], "big")
    for offset in range(1000):
        port = 4300 + (start + offset) % 1000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise InputError("no free port between 4300 and 5299: give one with --port")
