"""A run that is killed outright is taken up by the next one, and ends with the same bytes as one that was not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import yaml
from conftest import Place, digests, kill, mlflow_client, plain, step_runs, wait_for

REQUEST = "steps/r002"


def unlearning(place: Place) -> bool:
    """Request 2's first rounds are done, by the bar on the screen, and its model is not written."""
    bars = re.findall(r"unlearn r002: \w+\s+\S+\s+(\d+)/40", plain(place.progress.read_text()))
    rounds = [int(count) for count in bars]
    return max(rounds, default=0) in range(1, 40) and not place.path(f"{REQUEST}/model").exists()


def evaluated(place: Place) -> bool:
    """Request 2 is measured and not judged."""
    return place.path(f"{REQUEST}/metrics.json").is_file() and not place.path(f"{REQUEST}/manifest.json").is_file()


def judged(place: Place) -> bool:
    """Request 2 has its manifest, and the ledger still says pending."""
    return place.path(f"{REQUEST}/manifest.json").is_file() and "r002" in place.ledger()["pending"]


MOMENTS = {"while unlearning": unlearning, "before the verdict": evaluated, "before the ledger": judged}


def killed_at(moment: Callable[[Place], bool], new_copy: Callable[[], Place]) -> Place:
    """A copy whose run was killed at the moment, tried again on new copies while the kill comes too late."""
    for _ in range(4):
        place = new_copy()
        run = place.start("alkn", "run")
        wait_for(lambda at=place: moment(at), "the moment of the kill", pause=0.001, alive=run)
        kill(run)
        if moment(place) and "r002" in place.ledger()["pending"]:
            return place
    pytest.fail("the kill came too late four times")


@pytest.mark.parametrize("name", MOMENTS)
def test_a_killed_run_is_taken_up_where_it_stopped(
    ready: Place, chain: Place, fresh: Callable[..., Place], name: str
) -> None:
    place = killed_at(MOMENTS[name], lambda: fresh(ready, alone=name == "while unlearning"))
    assert place.ledger()["accepted"].keys() == {"r001"}
    finished = digests(place.path("steps/r001"))
    manifest = place.path("steps/r001/manifest.json")
    sealed = manifest.stat()
    model = place.path(f"{REQUEST}/model/model.safetensors")
    written = model.stat().st_mtime_ns if model.exists() else None

    table = place.alkn("run").stdout
    assert "r002" in table and "nothing was pending" not in table

    assert place.ledger()["accepted"].keys() == {"r001", "r002"}
    assert place.ledger()["pending"] == {}
    assert digests(place.path("steps/r001")) == finished
    assert (manifest.stat().st_mtime_ns, manifest.stat().st_ino) == (sealed.st_mtime_ns, sealed.st_ino)
    if written is not None:
        assert model.stat().st_mtime_ns == written, "the unlearning was complete, and was repeated"
    for step in ("r001", "r002"):
        assert place.manifest(step)["outputs"] == chain.manifest(step)["outputs"]
        assert digests(place.path(f"steps/{step}/model")) == digests(chain.path(f"steps/{step}/model"))
    assert not list(place.path("steps").rglob(".*tmp*")), "half-written files are left"

    assert place.dvc_is_clean()
    assert place.path("dvc.lock").read_text() == chain.path("dvc.lock").read_text()
    assert place.call("git", "status", "--short").stdout == ""
    is_tracked_once(place)


def is_tracked_once(place: Place) -> None:
    """One run a step, with its verdict and its model; the aliases are those of a chain that nothing happened to."""
    client = mlflow_client(place)
    for request in ("r001", "r002"):
        (run,) = step_runs(client, request)
        assert run.info.status == "FINISHED"
        assert run.data.tags["alkn.verdict"] == "accepted"
        assert run.data.metrics["forget/probability"] <= 0.05
        (output,) = run.outputs.model_outputs
        assert client.get_logged_model(output.model_id).status == "READY"
    assert len(client.search_model_versions("name = 'tiny'")) == 3, "an interrupted attempt left a version"
    experiment = client.get_experiment_by_name("tiny").experiment_id
    assert sorted(model.name for model in client.search_logged_models([experiment])) == ["base", "r001", "r002"]
    chain_runs = client.search_runs([experiment], "tags.`alkn.kind` = 'chain'")
    assert "RUNNING" not in {parent.info.status for parent in chain_runs}
    aliases = client.get_registered_model("tiny").aliases
    newest = client.get_model_version("tiny", aliases.pop("champion"))
    assert newest.run_id == run.info.run_id
    assert aliases == {}


def test_a_verdict_that_dvc_and_git_did_not_get_is_recorded(chain: Place, fresh: Callable[..., Place]) -> None:
    """As if killed after the ledger was written; nothing is pending then."""
    place = fresh(chain)
    whole = place.path("dvc.lock").read_text()
    lock = yaml.safe_load(whole)
    del lock["stages"]["step@r002"]
    place.path("dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    assert not place.dvc_is_clean()
    assert "nothing was pending" in place.alkn("run").stdout
    assert place.path("dvc.lock").read_text() == whole and place.dvc_is_clean()
    assert place.call("git", "status", "--short").stdout == ""


def test_the_chain_is_taken_up_after_a_kill_between_files(
    ready: Place, chain: Place, fresh: Callable[..., Place]
) -> None:
    """As if killed after the model was renamed into place and before the report that says it is whole."""
    place = fresh(ready)
    done = chain.path("steps/r001")
    half = place.path("steps/r001")
    half.mkdir()
    (half / "params.yaml").write_bytes((done / "params.yaml").read_bytes())
    (half / "model").mkdir()
    (half / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    (half / ".model.tmp").mkdir()
    (half / "unlearning.json").write_bytes((done / "unlearning.json").read_bytes())
    place.alkn("request", "withdraw", "r002")
    place.alkn("run")
    assert digests(half / "model") == digests(done / "model")
    assert json.loads((half / "manifest.json").read_text())["accepted"] is True
    assert not (half / ".model.tmp").exists()
