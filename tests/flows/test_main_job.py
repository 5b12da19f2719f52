"""The main job from end to end: two requests in, two judged and tracked models out."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import Place, digests


@pytest.fixture
def stamps():  # noqa: ANN201
    """Digest and modification time of every file of the steps."""

    def take(place: Place) -> dict[str, tuple[str, int]]:
        steps = place.path("steps")
        return {name: (digest, (steps / name).lstat().st_mtime_ns) for name, digest in digests(steps).items()}

    return take


def test_the_run_ends_with_a_table_of_the_chain(chain: Place) -> None:
    table, errors = chain.printed
    for request in ("r001", "r002"):
        (row,) = [line for line in table.splitlines() if f" {request} " in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        report = next(r for r in json.loads(chain.path("reports/chain.json").read_text()) if r["request"] == request)
        assert cells[1:3] == ["accepted", "8"]
        assert cells[3:5] == [f"{report['p_before']:.3f}", f"{report['p_after']:.4f}"]
        assert report["p_before"] > 0.5 > 0.05 >= report["p_after"]
    assert "Traceback" not in errors


def test_every_view_tells_the_same_chain(chain: Place) -> None:
    report = {row["request"]: row for row in chain.json("report")}
    listed = {row["request"]: row for row in chain.json("request", "list")}
    shown = chain.json("request", "show", "r002")
    champion = chain.json("champion")

    assert list(report) == list(listed) == ["r001", "r002"]
    assert [row["verdict"] for row in (*report.values(), *listed.values())] == ["accepted"] * 4
    assert listed["r001"]["previous"] == "base"
    assert listed["r002"]["previous"] == shown["previous"] == "r001"
    assert listed["r002"]["due"] == "2099-12-31"
    assert shown["gates"]["target_reached"]["passed"] is True
    assert all(check["passed"] for gate in shown["gates"].values() for check in gate["checks"])
    evaluation = json.loads(chain.path("steps/r002/evaluation.json").read_text())
    assert report["r002"]["p_after"] == shown["p_after"] == evaluation["sets"]["forget"]["probability"]
    assert champion == {
        "request": "r002",
        "path": str(chain.path("steps/r002/model")),
        "digest": chain.manifest("r002")["outputs"]["model"],
    }
    assert (chain.path("steps/r002/model") / "model.safetensors").is_file()


def test_each_step_builds_on_the_one_before(chain: Place) -> None:
    base, first, second = (chain.manifest(step) for step in ("base", "r001", "r002"))
    assert first["inputs"]["parent"] == base["outputs"]["model"]
    assert second["inputs"]["parent"] == first["outputs"]["model"]
    assert len({m["outputs"]["model"] for m in (base, first, second)}) == 3
    assert [first["earlier"], second["earlier"]] == [[], ["r001"]]
    metrics = json.loads(chain.path("steps/r002/evaluation.json").read_text())["sets"]
    assert metrics["earlier/r001"]["probability"] < 0.15, "what r001 took away came back"


def test_git_and_dvc_hold_the_chain(chain: Place) -> None:
    log = chain.call("git", "log", "--reverse", "--format=%s").stdout.splitlines()
    assert [line for line in log if line.startswith("Record r")] == ["Record r001", "Record r002"]
    assert "Record base" in log
    assert chain.call("git", "status", "--short").stdout == ""
    tracked = chain.call("git", "ls-files").stdout.split()
    assert "steps/r002/manifest.json" in tracked
    assert not [name for name in tracked if name.endswith((".jsonl", ".safetensors", "/key"))]

    assert chain.dvc_is_clean()
    stages = chain.call("dvc", "stage", "list", "--name-only").stdout.split()
    assert [s for s in stages if s.startswith("step@")] == [f"step@{r}" for r in chain.ledger()["accepted"]]
    recorded = yaml.safe_load(chain.path("dvc.lock").read_text())["stages"]
    assert set(recorded) == {"data", "base", "step@r001", "step@r002"}


def test_a_second_run_does_nothing(chain: Place, fresh, stamps) -> None:  # noqa: ANN001
    place = fresh(chain)
    before, tree = stamps(place), digests(place.root, leave_out=(".git", ".prefect", ".alkn", ".dvc", "mlflow"))
    done = place.alkn("run")
    assert done.stdout.rstrip().endswith("nothing was pending")
    assert stamps(place) == before
    after = digests(place.root, leave_out=(".git", ".prefect", ".alkn", ".dvc", "mlflow", "mlartifacts", "reports"))
    assert after == tree
    assert place.call("git", "status", "--short").stdout == ""


def test_an_audit_makes_the_same_bytes_again(chain: Place, fresh) -> None:  # noqa: ANN001
    place = fresh(chain)
    lock = place.path("dvc.lock").read_bytes()
    manifests = {step: place.path(f"steps/{step}/manifest.json").read_bytes() for step in ("base", "r001", "r002")}
    models = digests(place.path("steps"))
    written = place.path("steps/r002/model/model.safetensors").stat().st_mtime_ns

    assert "up to date" in place.call("dvc", "repro").stdout
    assert place.path("steps/r002/model/model.safetensors").stat().st_mtime_ns == written

    audit = place.call("dvc", "repro", "--force")
    assert "alkn stage step r002" in audit.stdout
    assert place.path("steps/r002/model/model.safetensors").stat().st_mtime_ns > written, "nothing was made again"
    assert place.path("dvc.lock").read_bytes() == lock
    assert digests(place.path("steps")) == models
    for step, manifest in manifests.items():
        assert place.path(f"steps/{step}/manifest.json").read_bytes() == manifest
    assert place.call("git", "status", "--short").stdout == ""


def test_dvc_shows_metrics_and_settings(chain: Place, fresh) -> None:  # noqa: ANN001
    place = fresh(chain)
    metrics = json.loads(place.call("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert metrics["steps/r002/metrics.json"]["data"]["forget"]["probability"] <= 0.05
    assert metrics["steps/r002/metrics.json"]["data"]["earlier_worst"]["probability"] < 0.15

    place.edit(method={"lr": 0.0004}, targets={"p": 0.02})
    changed = json.loads(place.call("dvc", "params", "diff", "--json").stdout)["params.yaml"]
    assert {key: (value["old"], value["new"]) for key, value in changed.items()} == {
        "method.lr": (0.0005, 0.0004),
        "targets.p": (0.05, 0.02),
    }
    assert place.dvc_is_clean(), "later settings must not touch steps that were accepted with earlier ones"
    assert place.alkn("run").stdout.rstrip().endswith("nothing was pending")
    assert place.dvc_is_clean()
