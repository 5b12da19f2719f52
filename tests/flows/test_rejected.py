"""A gate that fails: the model stays out of the chain, its evidence stays, and the chain goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Place, digests, mlflow_client, step_runs


@pytest.fixture(scope="module")
def rejected(chain: Place, fresh: Callable[..., Place], warm_alkn: Callable[..., Any]) -> Place:
    """The chain with r003 refused for its utility and r004 for its target, in one folder."""
    place = fresh(chain)
    assert warm_alkn(place, "request", "add", place.forget("r003")).returncode == 0
    before = place.path("dvc.lock").read_bytes()
    done = place.alkn("run", "--set", "gates.utility.base=0.9999", code=1)
    place.printed = [done.stdout, done.stderr]
    assert place.path("dvc.lock").read_bytes() == before
    assert warm_alkn(place, "request", "add", place.forget("r004")).returncode == 0
    place.alkn("run", "--set", "method.steps=2", "--set", "method.lr=1e-7", code=1)
    return place


def test_the_run_says_what_was_rejected_and_why(rejected: Place) -> None:
    table, errors, *_ = rejected.printed
    assert "r003 was rejected: utility: " in table
    assert "Traceback" not in errors
    assert rejected.alkn("report").stdout.count("was rejected: ") == 2
    assert {row["request"]: row["verdict"] for row in rejected.json("report")} == {
        "r001": "accepted", "r002": "accepted", "r003": "rejected", "r004": "rejected",
    }  # fmt: skip


def test_the_ledger_holds_the_reason(rejected: Place) -> None:
    ledger = rejected.ledger()
    assert list(ledger["accepted"]) == ["r001", "r002"]
    assert ledger["pending"] == {}
    third, fourth = ledger["rejected"]["r003"], ledger["rejected"]["r004"]
    assert third["reason"].startswith("utility: ")
    assert "target" in fourth["reason"]
    assert third["previous"] == fourth["previous"] == "r002", "a rejected model must not be built upon"
    parent = rejected.manifest("r002")["outputs"]["model"]
    assert [rejected.manifest(step)["inputs"]["parent"] for step in ("r003", "r004")] == [parent, parent]


def test_the_chain_stays_as_it_was(rejected: Place, chain: Place) -> None:
    champion = rejected.json("champion")
    assert (champion["request"], champion["digest"]) == ("r002", chain.manifest("r002")["outputs"]["model"])
    assert rejected.path("dvc.lock").read_bytes() == chain.path("dvc.lock").read_bytes()
    stages = rejected.call("dvc", "stage", "list", "--name-only").stdout.split()
    assert [stage for stage in stages if stage.startswith("step@")] == ["step@r001", "step@r002"]
    assert rejected.dvc_is_clean()
    assert "alkn stage step" not in rejected.call("dvc", "repro").stdout
    for step in ("base", "r001", "r002"):
        assert digests(rejected.path(f"steps/{step}")) == digests(chain.path(f"steps/{step}"))


def test_the_evidence_is_kept(rejected: Place) -> None:
    for step, gate in (("r003", "utility"), ("r004", "target_reached")):
        judged = json.loads(rejected.path(f"steps/{step}/gate.json").read_text())
        assert judged["accepted"] is False
        assert judged["gates"][gate]["passed"] is False
        assert [line for line in judged["failed"] if line.startswith(gate)]
        assert rejected.path(f"steps/{step}/model/model.safetensors").is_file()
        assert rejected.manifest(step)["accepted"] is False
        shown = rejected.json("request", "show", step)
        assert shown["gates"][gate]["passed"] is False
        assert rejected.call("git", "ls-files", f"steps/{step}").stdout.split() == [
            f"steps/{step}/manifest.json",
            f"steps/{step}/params.yaml",
        ]


def test_mlflow_has_the_verdicts_and_the_old_champion(rejected: Place) -> None:
    client = mlflow_client(rejected)
    runs = {run.info.run_name: run for run in step_runs(client)}
    assert {name: run.data.tags["alkn.verdict"] for name, run in runs.items()} == {
        "base": "base", "r001": "accepted", "r002": "accepted", "r003": "rejected", "r004": "rejected",
    }  # fmt: skip
    assert runs["r003"].data.tags["alkn.failed"].startswith("utility: ")
    assert runs["r003"].data.metrics["gate/utility"] == 0.0
    aliases = client.get_registered_model("tiny").aliases
    assert set(aliases) == {"champion"}
    assert client.get_model_version("tiny", aliases["champion"]).run_id == runs["r002"].info.run_id


def test_the_chain_goes_on(rejected: Place, warm_alkn: Callable[..., Any]) -> None:
    """Last of this file: the same records under a new id, with the settings that they can pass."""
    assert warm_alkn(rejected, "request", "add", rejected.forget("r003"), "--id", "again").returncode == 0
    rejected.alkn("run")
    ledger = rejected.ledger()
    assert list(ledger["accepted"]) == ["r001", "r002", "again"]
    assert list(ledger["rejected"]) == ["r003", "r004"]
    assert ledger["accepted"]["again"]["previous"] == "r002"
    assert rejected.json("champion")["request"] == "again"
    assert rejected.dvc_is_clean()
    assert rejected.call("git", "status", "--short").stdout == ""
