"""The flow that verifies the champion again: completed while all holds, failed with an event once something differs."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Place, wait_for

from alkn.files import write_yaml
from alkn.project import Project


@pytest.fixture
def place(tiny_project: Callable[..., Project], env: dict[str, str], shared_server: Callable[[], str]) -> Place:
    """A base model and no request yet: the least that can be verified."""
    project = tiny_project()
    write_yaml(project.params, {"project": {"name": "Tiny One"}})
    return Place(project.root, {**env, "PREFECT_API_URL": shared_server()})


def ask(place: Place, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{place.env['PREFECT_API_URL']}/{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def runs(place: Place) -> list[tuple[dict[str, Any], str]]:
    """The flow runs of ``reverify``, oldest first, with the text of the artifact that each left."""
    found = ask(place, "flow_runs/filter", flows={"name": {"any_": ["reverify"]}}, sort="START_TIME_ASC")
    pages = ask(place, "artifacts/filter", artifacts={"key": {"any_": ["verification-tiny-one"]}})
    by_run = {page["flow_run_id"]: str(page["data"]) for page in pages}
    return [(run, by_run[run["id"]]) for run in found]


def events(place: Place) -> list[dict[str, Any]]:
    wanted = {"event": {"name": ["alkn.verification.failed"]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}
    return list(ask(place, "events/filter", filter=wanted)["events"])


TWICE = """
import json, pathlib, flows
from flows.reverify import reverify
reverify()
path = pathlib.Path("steps/base/evaluation.json")
evaluation = json.loads(path.read_text())
evaluation["sets"]["known/r001"]["probability"] = 0.5
path.write_text(json.dumps(evaluation))
reverify()
"""


def test_it_completes_while_all_holds_and_fails_with_an_event_when_not(place: Place) -> None:
    true = json.loads(place.path("steps/base/evaluation.json").read_text())["sets"]["known/r001"]["probability"]
    done = place.call(sys.executable, "-c", TWICE, code=1)
    assert "DoesNotHold" in done.stderr
    (good, page), (bad, last) = runs(place)
    assert good["state"]["type"] == "COMPLETED" and "`base` holds" in page
    assert bad["state"]["type"] == "FAILED" and "**does not hold**" in last
    said = "base does not hold: base: changed: evaluation.json; base: differs: known/r001.probability"
    assert bad["state"]["message"] == said
    report = json.loads(place.path("reports/verify.json").read_text())
    assert report["holds"] is False and report["model"] in page and report["model"] in last
    (event,) = wait_for(lambda: events(place), "the event, and only of the run that failed")
    assert event["resource"]["prefect.resource.id"] == "alkn.champion.tiny-one"
    found = {one["what"]: one for one in event["payload"]["findings"]}["known/r001.probability"]
    assert (found["expected"], found["found"]) == (0.5, pytest.approx(true, abs=1e-6))
    rows = [json.loads(line) for line in place.path("data/requests/r001.jsonl").read_text().splitlines()]
    told = json.dumps([event, good, bad, page, last]) + done.stderr + done.stdout
    assert not any(row["answer"] in told for row in rows)
