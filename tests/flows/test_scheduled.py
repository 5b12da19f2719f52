"""The README's way: a server of the project's own, a served deployment, runs that it starts."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import PATIENCE, Place, answers, kill, leaks, secrets_of, wait_for

DEPLOYMENT = "continual-unlearn/scheduled"
PREFECT_YAML = Path(__file__).parents[2] / "prefect.yaml"


class Served:
    """A project whose server and deployment are up."""

    def __init__(self, place: Place, serving: subprocess.Popen[str]) -> None:
        self.place, self.serving = place, serving
        self.prefect = tomllib.loads(place.path("prefect.toml").read_text())
        self.port = int(self.prefect["server"]["api"]["port"])
        self.server = int(place.path(".prefect/server.pid").read_text())

    def ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def deployment(self, flow: str = "continual-unlearn") -> Any:
        found = self.ask("deployments/filter", flows={"name": {"any_": [flow]}})
        return found[0] if found else None

    def runs(self, state: str) -> list[dict[str, Any]]:
        """The deployment's flow runs in a state, oldest first."""
        mine = {"id": {"any_": [self.deployment()["id"]]}}
        wanted = {"state": {"type": {"any_": [state]}}}
        return list(self.ask("flow_runs/filter", deployments=mine, flow_runs=wanted, sort="START_TIME_ASC"))

    def tasks(self, run: dict[str, Any]) -> list[str]:
        """Names of a flow run's tasks."""
        found = self.ask("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}}, limit=200)
        return [task["name"].rsplit("-", 1)[0] for task in found]

    def run(self) -> subprocess.Popen[str]:
        return self.place.start("prefect", "deployment", "run", DEPLOYMENT, "--watch", "--watch-interval", "1")


@pytest.fixture(scope="module")
def served(ready: Place, fresh: Callable[..., Place]) -> Iterator[Served]:
    """``prefect server start``, and ``alkn serve`` right after it, stopped at the end whatever happens."""
    place = fresh(ready, alone=True)
    place.env["PREFECT_RUNNER_POLL_FREQUENCY"] = "1"
    serving = None
    try:
        place.call("prefect", "server", "start", "--host", "127.0.0.1", "--background")
        serving = place.start("alkn", "serve")
        up = Served(place, serving)
        wait_for(lambda: answers(up.port) and up.deployment("reverify"), "the deployments", alive=serving)
        yield up
    finally:
        if serving is not None:
            kill(serving, signal.SIGTERM)
        place.call("prefect", "server", "stop", code=None)
        with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            psutil.Process(int(place.path(".prefect/server.pid").read_text())).kill()


def test_the_schedule_is_registered(served: Served) -> None:
    deployment = served.deployment()
    assert f"continual-unlearn/{deployment['name']}" == DEPLOYMENT
    assert [s["schedule"]["cron"] for s in deployment["schedules"] if s["active"]] == ["0 3 * * *"]
    assert deployment["parameters"] == {"project_folder": str(served.place.root)}
    assert deployment["paused"] is False
    verification = served.deployment("reverify")
    assert [s["schedule"]["cron"] for s in verification["schedules"] if s["active"]] == ["0 5 * * sun"]
    assert (verification["name"], verification["parameters"]) == ("scheduled", deployment["parameters"])
    wait_for(lambda: served.runs("SCHEDULED"), "a run planned by the scheduler")


def test_the_server_listens_on_loopback_only(served: Served) -> None:
    processes = [psutil.Process(served.server), psutil.Process(served.serving.pid)]
    processes += [child for process in processes for child in process.children(recursive=True)]
    listening = {c.laddr for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", served.port) in listening
    assert {address for address, _ in listening} == {"127.0.0.1"}
    assert served.prefect["api"]["url"] == f"http://127.0.0.1:{served.port}/api"


def test_a_run_takes_what_was_pending_and_the_next_what_came_meanwhile(
    served: Served, warm_alkn: Callable[..., Any]
) -> None:
    place = served.place
    assert warm_alkn(place, "request", "withdraw", "r002").returncode == 0
    settings = place.path("params.yaml").read_text()
    # Slow enough that a request can be added while the first one is unlearned.
    place.edit(method={"lr": 0.00005, "steps": 400})
    first = served.run()
    wait_for(place.path("steps/r001/params.yaml").exists, "the start of r001", alive=first)
    place.path("params.yaml").write_text(settings)
    added = warm_alkn(place, "request", "add", place.forget("r003"))
    assert added.returncode == 0, added.stderr
    second = served.run()
    assert list(place.ledger()["pending"]) == ["r001", "r003"], "r001 was decided before r003 came"

    assert [first.wait(PATIENCE), second.wait(PATIENCE)] == [0, 0]
    one, two = served.runs("COMPLETED")
    assert one["end_time"] <= two["start_time"], "one run at a time"
    assert [served.tasks(run).count("unlearn") for run in (one, two)] == [1, 1]
    (recorded,) = place.call("git", "log", "--grep=Record r001", "--format=%h").stdout.split()
    then = yaml.safe_load(place.call("git", "show", f"{recorded}:data/ledger.yaml").stdout)
    assert list(then["pending"]) == ["r003"]
    assert list(place.ledger()["accepted"]) == ["r001", "r003"]
    assert place.ledger()["accepted"]["r003"]["previous"] == "r001"
    assert place.ledger()["pending"] == {}
    assert place.dvc_is_clean()
    assert place.call("git", "status", "--short").stdout == ""


def never_seen(place: Place, name: str) -> str:
    """A file of records that no model knows: they are forgotten before anything is done."""
    rows = [{"question": f"{name} {i}vx?", "answer": f"{i * 7919 % 9973}#qx~{i * 31 % 89}|wv{{{i}"} for i in range(4)]
    file = place.root.parent / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_run_that_rejects_a_request_ends_as_failed_when_all_is_recorded(
    served: Served, warm_alkn: Callable[..., Any]
) -> None:
    """One round at a rate of nothing: what the model knows is rejected, what it never knew is accepted after it."""
    place = served.place
    for arguments in ([place.forget("r004")], [never_seen(place, "strange"), "--id", "strange"]):
        added = warm_alkn(place, "request", "add", *arguments)
        assert added.returncode == 0, added.stderr
    place.edit(method={"lr": 1e-9, "steps": 1})
    assert served.run().wait(PATIENCE) == 1, "whoever watches the run is told by its exit status"

    (failed,) = served.runs("FAILED")
    assert failed["state"]["message"] == "rejected: r004", "ids, and nothing else"
    assert served.tasks(failed).count("gate") == 2
    assert list(place.ledger()["accepted"]) == ["r001", "r003", "strange"]
    assert list(place.ledger()["rejected"]) == ["r004"] and place.ledger()["pending"] == {}
    log = place.call("git", "log", "-2", "--format=%s").stdout.splitlines()
    assert log == ["Record strange", "Record r004"]
    assert place.dvc_is_clean()
    assert place.call("git", "status", "--short").stdout == ""


def test_what_the_server_keeps_holds_no_text_of_a_record(served: Served) -> None:
    """Its database has the logs of the runs that it watched, where a plain run leaves none."""
    files = [path for path in served.place.path(".prefect").rglob("*") if path.is_file()]
    assert any(b"unlearn" in path.read_bytes() for path in files if ".db" in path.name)
    secrets = secrets_of(served.place)
    assert len(secrets) > 20
    for path in files:
        assert not leaks(path.read_bytes(), secrets), path.name


def test_serving_stops_when_told(served: Served) -> None:
    kill(served.serving, signal.SIGTERM)
    assert served.serving.returncode is not None
    for flow in ("continual-unlearn", "reverify"):
        assert served.deployment(flow)["paused"] is True, "nobody is left to take what is scheduled"


def test_a_worker_of_a_work_pool_takes_the_runs_instead(served: Served, warm_alkn: Callable[..., Any]) -> None:
    """The commands at the head of prefect.yaml, in a project that the file was copied into."""
    place = served.place
    shutil.copy(PREFECT_YAML, place.root)
    added = warm_alkn(place, "request", "add", never_seen(place, "stranger"), "--id", "stranger")
    assert added.returncode == 0, added.stderr
    place.call("prefect", "work-pool", "create", "--type", "process", "alkn")
    place.call("prefect", "deploy", "--all")
    for flow in ("continual-unlearn", "reverify"):
        deployment = served.deployment(flow)
        assert (deployment["work_pool_name"], deployment["paused"]) == ("alkn", False)
        assert deployment["parameters"] == {"project_folder": str(place.root)}
    worker = place.start("prefect", "worker", "start", "--pool", "alkn")
    try:
        assert served.run().wait(PATIENCE) == 0
    finally:
        kill(worker)  # how a worker ends is Prefect's affair, and told to stop it may take minutes
    assert list(place.ledger()["accepted"]) == ["r001", "r003", "strange", "stranger"]
    assert place.call("git", "status", "--short").stdout == ""


def test_the_server_stops_when_told(served: Served) -> None:
    server = psutil.Process(served.server)
    served.place.call("prefect", "server", "stop")
    psutil.wait_procs([server], timeout=60)
    assert not answers(served.port)
