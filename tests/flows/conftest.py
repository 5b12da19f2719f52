"""Real projects, driven by the real command line as a user drives it; nothing stands in for anything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PARAMS = """\
project: {name: tiny}
seed: 0
benchmark:
  {name: people, requests: 4, customers_per_request: 2, records_per_customer: 4, kept_customers: 7,
   holdout_customers: 3, facts: 8}
base:
  architecture: {vocab_size: 512, hidden_size: 64, intermediate_size: 128, layers: 2}
  training: {epochs: 50, batch_size: 8, until: 0.8}
method: {name: alkn, preset: rounds, steps: 40, lr: 0.0005, epochs: 2, batch_size: 4, share: 0.1}
targets: {p: 0.05, exact_memorization: 0.4}
attacks: {relearning: {steps: [0, 2]}, quantization: {bits: [4]}}
gates: {utility: {base: 0.05, parent: 0.05}, no_return: {slack: 3}}
evaluation: {max_new_tokens: 16}
run: {threads: 1}
git: {commit: true}
"""
TEXTS = ("question", "answer", "paraphrased_question", "paraphrased_answer")
NAME = re.compile(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b")
BIN = Path(sys.executable).parent
PATIENCE = 600


def environment(home: Path) -> dict[str, str]:
    """A user's shell with nothing set up: no git identity, no Prefect profile, no way out of the machine."""
    ours = ("PREFECT_", "GIT_", "MLFLOW_", "DVC_", "HF_", "ALKN_", "PYTEST_", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
    nowhere = "http://127.0.0.1:9"
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_SITE_CACHE_DIR": str(home / "dvc"),
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_PROXY": "127.0.0.1,localhost",
    }


class Place:
    """A project folder and the commands given in it; what started ones print goes to files in ``logs``."""

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        self.root, self.env = root, {**env, "PWD": str(root)}
        self.printed: list[str] = []
        self.logs = root.parent
        self.progress = self.logs / "no-command-yet"

    def call(self, *command: str, code: int | None = 0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Any command, waited for; its exit status must be ``code``."""
        done = subprocess.run(
            command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=PATIENCE, input=stdin
        )
        self.printed += [done.stdout, done.stderr]
        assert code in (None, done.returncode), f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def alkn(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return self.call("alkn", *arguments, code=code)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.alkn(*arguments, "--json").stdout)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command in a process group of its own; ``progress`` is the file that its errors and live bars go to."""
        name = self.logs / f"{command[0]}-{time.monotonic_ns()}"
        self.progress = name.with_suffix(".err")
        env = {**self.env, "FORCE_COLOR": "1", "TTY_INTERACTIVE": "1"}
        with open(name.with_suffix(".out"), "w") as out, open(self.progress, "w") as err:
            return subprocess.Popen(
                command, cwd=self.root, env=env, stdout=out, stderr=err, text=True, start_new_session=True
            )

    def path(self, name: str) -> Path:
        return self.root / name

    def ledger(self) -> dict[str, Any]:
        return dict(yaml.safe_load(self.path("data/ledger.yaml").read_text()))

    def manifest(self, step: str) -> dict[str, Any]:
        return dict(json.loads(self.path(f"steps/{step}/manifest.json").read_text()))

    def edit(self, **changes: Any) -> None:
        """Change top-level keys of params.yaml, mappings key by key."""
        values = yaml.safe_load(self.path("params.yaml").read_text())
        for name, value in changes.items():
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
        self.path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def dvc_is_clean(self) -> bool:
        return json.loads(self.call("dvc", "status", "--json").stdout or "{}") == {}

    def forget(self, request: str) -> str:
        """The benchmark's file of a request, which the base model knows by heart."""
        return f"data/splits/forget/{request}.jsonl"


def records_of(place: Place) -> list[dict[str, str]]:
    """The records of every request."""
    files = sorted(place.path("data/requests").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def secrets_of(place: Place) -> set[bytes]:
    """Every question, answer and full name of the requests."""
    records = records_of(place)
    found = {record[field] for record in records for field in TEXTS if field in record}
    found |= {name for record in records for name in NAME.findall(record["question"])}
    return {text.encode() for text in found if len(text) >= 8}


def leaks(content: bytes, texts: set[bytes]) -> list[str]:
    """The beginnings of the texts that are found."""
    return [text.decode()[:3] + "..." for text in texts if text in content]


def digests(root: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Every file below a folder with its digest and every link with its target, less what starts with ``leave_out``."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name.startswith(leave_out):
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def wait_for(condition: Callable[[], Any], what: str, *, pause: float = 0.05, alive: Any = None) -> Any:
    """Poll until the condition is true, or the process that should make it true has ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        if alive is not None and alive.poll() is not None:
            pytest.fail(f"{what}: the process ended first, exit status {alive.returncode}")
        time.sleep(pause)
    pytest.fail(f"{what}: waited {PATIENCE} s in vain")


def plain(screen: str) -> str:
    """What a terminal shows, less colours and moves of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)


def kill(process: subprocess.Popen[str], how: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process started by :meth:`Place.start`, with all its children, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    process.wait(PATIENCE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mlflow_client(place: Place, database: str = "mlflow.db") -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{place.path(database)}")


def step_runs(client: Any, request: str | None = None, *, deleted: bool = False) -> list[Any]:
    """MLflow runs of steps, of one request or of all."""
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name("tiny").experiment_id
    wanted = "tags.`alkn.kind` = 'step'" + (f" and tags.`alkn.request` = '{request}'" if request else "")
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    return list(client.search_runs([experiment], wanted, run_view_type=view))


@pytest.fixture(scope="session")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Iterator[Callable[[], str]]:
    """A real Prefect server that copies of projects use, so that not each run starts one; call it for its API address.

    It comes up while the first project is made.
    """
    home = Place(tmp_path_factory.mktemp("prefect"), {**env, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"})
    home.env["PREFECT_HOME"] = str(home.root)
    port = free_port()
    server = home.start("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui")

    def url() -> str:
        wait_for(lambda: answers(port), "the shared Prefect server", alive=server)
        return f"http://127.0.0.1:{port}/api"

    yield url
    kill(server, signal.SIGTERM)


def answers(port: int) -> bool:
    """Whether a Prefect server on loopback is up."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as reply,
    ):
        return bool(reply.status == 200)
    return False


@pytest.fixture(scope="session")
def ready(
    tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], shared_server: object, warm_alkn: object
) -> Place:
    """A base model and two pending requests. Read only: take a copy with :func:`fresh`."""
    folder = tmp_path_factory.mktemp("ready")
    (folder / "params.yaml").write_text(PARAMS)
    Place(folder, env).alkn("init", "project", "--params", "params.yaml", "--port", str(free_port()))
    place = Place(folder / "project", env)
    assert "nothing was pending" in place.alkn("run").stdout
    place.alkn("request", "add", place.forget("r001"))
    place.alkn("request", "add", place.forget("r002"), "--due", "2099-12-31")
    return place


@pytest.fixture(scope="session")
def fresh(
    tmp_path_factory: pytest.TempPathFactory, ready: Place, env: dict[str, str], shared_server: Callable[[], str]
) -> Callable[..., Place]:
    """``fresh(place)``: a copy that a test may change, with an MLflow database in which nothing is logged yet.

    With ``alone=True`` its runs start Prefect by themselves, as they do where no server was started.
    MLflow stores absolute paths, so its database is no use in a copy; its empty tables are.
    """
    empty = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    shutil.copy(ready.path("mlflow.db"), empty)
    with contextlib.closing(sqlite3.connect(empty)) as database:
        for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
            if table not in ("alembic_version", "workspaces"):
                database.execute(f"delete from {table}")  # noqa: S608 - the names are the schema's own
        database.commit()

    def copy(source: Place, folder: Path | None = None, *, alone: bool = False) -> Place:
        target = (folder or tmp_path_factory.mktemp("copy")) / "project"
        left_out = shutil.ignore_patterns("mlflow.db*", "mlartifacts", "reports")
        shutil.copytree(source.root, target, symlinks=True, ignore=left_out)
        shutil.copy(empty, target / "mlflow.db")
        return Place(target, dict(env) if alone else {**env, "PREFECT_API_URL": shared_server()})

    return copy


@pytest.fixture(scope="session")
def chain(ready: Place, fresh: Callable[..., Place]) -> Place:
    """Both requests unlearned by ``alkn run``. Read only; ``printed`` holds what the run said."""
    place = fresh(ready, alone=True)
    place.alkn("run")
    return place


@pytest.fixture(scope="session")
def warm_alkn(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """``warm_alkn(place, *arguments)``: exit status, stdout and stderr of a quick ``alkn``, see warm_alkn.py."""
    folder = tmp_path_factory.mktemp("warm")
    program = Path(__file__).with_name("warm_alkn.py")
    server = subprocess.Popen(
        [sys.executable, str(program)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def call(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
        out, err = folder / "out", folder / "err"
        order = {
            "folder": str(place.root), "arguments": list(arguments), "api": place.env.get("PREFECT_API_URL"),
            "out": str(out), "err": str(err),
        }  # fmt: skip
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        return subprocess.CompletedProcess(["alkn", *arguments], code, out.read_text(), err.read_text())

    yield call
    stdin.close()
    server.wait(30)
