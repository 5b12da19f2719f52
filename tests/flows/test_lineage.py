"""What MLflow says of a chain: runs, curves, data, models, parents; nothing is lost when it is down."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from conftest import Place, mlflow_client, step_runs

from alkn import step as steps
from alkn.chain import begin_step
from alkn.project import Project
from tasks.tracking import Tracker


@pytest.fixture(scope="module")
def client(chain: Place) -> Any:
    return mlflow_client(chain)


@pytest.fixture(scope="module")
def runs(client: Any) -> dict[str, Any]:
    """The runs of base model and steps; ``get_run``, because a search leaves model inputs out."""
    return {run.info.run_name: client.get_run(run.info.run_id) for run in step_runs(client)}


def test_a_flow_run_is_a_parent_with_a_child_for_each_request(client: Any, runs: dict[str, Any]) -> None:
    assert set(runs) == {"base", "r001", "r002"}
    parents = {runs[name].data.tags["mlflow.parentRunId"] for name in ("r001", "r002")}
    (parent,) = (client.get_run(run_id) for run_id in parents)
    assert parent.data.tags["alkn.kind"] == "chain"
    assert {run.info.status for run in (parent, *runs.values())} == {"FINISHED"}
    assert [runs[name].data.tags["alkn.verdict"] for name in ("base", "r001", "r002")] == ["base", *["accepted"] * 2]


def test_settings_curves_and_metrics_are_logged(chain: Place, client: Any, runs: dict[str, Any]) -> None:
    for request in ("r001", "r002"):
        run = runs[request]
        frozen = yaml.safe_load(chain.path(f"steps/{request}/params.yaml").read_text())
        assert run.data.params["method.lr"] == str(frozen["method"]["lr"])
        assert run.data.params["targets.p"] == "0.05"
        curve = client.get_metric_history(run.info.run_id, "round/p")
        assert len(curve) > 2
        assert [point.step for point in curve] == list(range(len(curve)))
        assert curve[0].value > 0.3 > 0.05 >= curve[-1].value
        assert run.data.metrics["forget/probability"] <= 0.05
        assert run.data.metrics["gate/utility"] == 1.0
        assert run.data.metrics["unlearning/steps"] == len(curve) - 1, "the rounds of preset 'rounds'"
        assert {"utility/customers/probability", "utility/facts/probability", "holdout/probability"} <= set(
            run.data.metrics
        )
        attacks = json.loads(chain.path(f"steps/{request}/attacks.json").read_text())
        for attack, spent in (("relearning", [0, 2]), ("quantization", [32, 4])):
            regained = client.get_metric_history(run.info.run_id, f"attack/{attack}/probability")
            assert {point.step: point.value for point in regained} == {
                point["at"]: pytest.approx(point["probability"]) for point in attacks[attack]["points"]
            }
            assert sorted(point.step for point in regained) == sorted(spent)
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert names == {"manifest.json", "evaluation.json", "attacks.json", "gate.json", "unlearning.json"}
    assert "earlier/r001/probability" in runs["r002"].data.metrics


def test_data_is_named_by_its_digest(chain: Place, runs: dict[str, Any]) -> None:
    for request in ("r001", "r002"):
        data = {entry.tags[0].value: entry.dataset for entry in runs[request].inputs.dataset_inputs}
        assert set(data) == {"forget", "retain"}
        assert data["forget"].name == f"request {request}"
        digest = chain.manifest(request)["inputs"]["request"]
        assert digest == chain.ledger()["accepted"][request]["digest"]
        assert len(data["forget"].digest) >= 32
        assert digest.removeprefix("hmac-sha256:").startswith(data["forget"].digest)


def test_each_model_names_its_parent(chain: Place, client: Any, runs: dict[str, Any]) -> None:
    made = {name: run.outputs.model_outputs[0].model_id for name, run in runs.items()}
    for child, parent in (("r001", "base"), ("r002", "r001")):
        assert [link.model_id for link in runs[child].inputs.model_inputs] == [made[parent]]
        model = client.get_logged_model(made[child])
        assert model.status == "READY"
        assert model.tags["digest"] == chain.manifest(child)["outputs"]["model"]
        assert model.tags["parent"] == chain.manifest(parent)["outputs"]["model"]
        assert model.tags["path"] == f"steps/{child}/model"
        artifacts = {file.path for file in client.list_logged_model_artifacts(made[child])}
        assert artifacts == {"task_vector.safetensors", "manifest.json"}


def test_every_accepted_model_is_registered_and_the_newest_is_champion(client: Any, runs: dict[str, Any]) -> None:
    versions = {v.run_id: v for v in client.search_model_versions("name = 'tiny'")}
    assert set(versions) == {run.info.run_id for run in runs.values()}
    newest = versions[runs["r002"].info.run_id]
    assert client.get_registered_model("tiny").aliases == {"champion": newest.version}
    assert int(newest.version) == max(int(v.version) for v in versions.values())
    assert newest.tags["path"] == "steps/r002/model"


def test_a_model_is_candidate_until_its_gate(ready: Place, fresh: Callable[..., Place]) -> None:
    """The flow's own parts up to the gate, as a run does that is killed there; in a database of another name."""
    place = fresh(ready)
    place.path("mlflow.db").rename(place.path("lineage.db"))
    place.edit(tracking={"uri": "sqlite:///lineage.db"})
    project = Project.at(place.root)
    settings = project.settings()
    plan = begin_step(project, "r001", settings)
    steps.unlearn_step(project, plan)
    steps.evaluate_step(project, plan)
    steps.attack_step(project, plan)
    tracker = Tracker(project, settings)
    tracker.log_base()
    tracker.nominate("r001", inputs=plan.inputs, chain_run=None)

    client = mlflow_client(place, "lineage.db")
    (run,) = step_runs(client, "r001")
    assert "alkn.verdict" not in run.data.tags
    candidate = client.get_model_version_by_alias("tiny", "candidate")
    assert candidate.run_id == run.info.run_id
    assert "champion" not in client.get_registered_model("tiny").aliases

    place.alkn("run")
    aliases = client.get_registered_model("tiny").aliases
    assert "candidate" not in aliases
    assert client.get_model_version("tiny", aliases["champion"]).tags["path"] == "steps/r002/model"
    assert len(step_runs(client, "r001")) == 1
    assert not place.path("mlflow.db").exists()


def test_what_was_not_logged_while_mlflow_was_down_is_logged_by_the_next_run(
    ready: Place, fresh: Callable[..., Place], warm_alkn: Callable[..., Any]
) -> None:
    place = fresh(ready)
    assert warm_alkn(place, "request", "withdraw", "r002").returncode == 0
    uri = place.path("params.yaml").read_text()
    place.edit(tracking={"uri": "http://127.0.0.1:9", "timeout": 1})
    down = place.alkn("run")
    assert "not logged, the next run will" in down.stderr
    assert "Traceback" not in down.stderr
    assert list(place.ledger()["accepted"]) == ["r001"]
    assert place.dvc_is_clean()
    assert mlflow_client(place).get_experiment_by_name("tiny") is None

    place.path("params.yaml").write_text(uri)
    assert place.alkn("run").stdout.rstrip().endswith("nothing was pending")
    client = mlflow_client(place)
    found = {run.info.run_name: run for run in step_runs(client)}
    assert set(found) == {"base", "r001"}
    assert found["r001"].data.tags["alkn.verdict"] == "accepted"
    assert len(client.get_metric_history(found["r001"].info.run_id, "round/p")) > 2
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.run_id == found["r001"].info.run_id
