"""``alkn compare`` as a user calls it: real processes, Prefect, MLflow; killed, gone on with, recomputed by hand."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Place, digests, wait_for

from alkn.compare.cell import make_ground, run_cell
from alkn.compare.config import load_comparison
from alkn.project import Project

SETTINGS: dict[str, Any] = {
    "benchmark": {
        "name": "people", "requests": 2, "customers_per_request": 2, "records_per_customer": 4, "kept_customers": 5,
        "holdout_customers": 2, "facts": 6,
    },
    "base": {
        "architecture": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "layers": 2},
        "training": {"epochs": 40, "batch_size": 8, "until": 0.6},
    },
    "evaluation": {"metrics": ["probability", "exact_memorization"]},
    "targets": {"p": 0.1, "exact_memorization": 0.5},
}  # fmt: skip
COMPARISON: dict[str, Any] = {
    "name": "tiny",
    "notes": ["nothing was tuned"],
    "seeds": [0, 1],
    "settings": SETTINGS,
    "methods": [
        {"label": "negation", "method": {"name": "task_vector", "lr": 0.001, "epochs": 3}},
        {"label": "gd", "method": {"name": "gradient_difference", "lr": 0.001, "steps": 60}},
    ],
    "attacks": {"relearning": {"steps": [0, 2], "share": 0.2}},
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
CELLS = [f"{label}/seed{seed}" for label in ("negation", "gd") for seed in (0, 1)]
DOMAINS = ("customers", "facts")


def place_in(folder: Path, env: dict[str, str], server: Callable[[], str]) -> Place:
    (folder / "compare.yaml").write_text(yaml.safe_dump(COMPARISON))
    return Place(folder, {**env, "PREFECT_API_URL": server()})


def compare(place: Place, *arguments: str) -> Any:
    return place.json("compare", "compare.yaml", "--folder", "out", "--workers", "2", *arguments)


@dataclass(frozen=True)
class Compared:
    """A comparison that was killed in the middle and gone on with.

    ``sealed`` is when the step that was done before the kill was sealed, in ns, before and after.
    """

    place: Place
    sealed: tuple[int, int]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], shared_server: Callable[[], str]) -> Compared:
    place = place_in(tmp_path_factory.mktemp("compared"), env, shared_server)
    run = place.start("alkn", "compare", "compare.yaml", "--folder", "out", "--workers", "1")
    seal = place.path("out/cells/negation/seed0/steps/r001/manifest.json")
    wait_for(seal.exists, "the first step", pause=0.005, alive=run)
    # Only the parent: its workers must notice.
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    wait_for(lambda: not workers(place.root), "the end of the workers")
    assert not place.path("out/cells/negation/seed1/cell.json").exists(), "the kill came too late"
    before = seal.stat().st_mtime_ns
    assert compare(place)["failed"] == {}
    return Compared(place, (before, seal.stat().st_mtime_ns))


@pytest.fixture(scope="module")
def compared(killed: Compared) -> Place:
    """Two methods with two seeds each, compared. Read only."""
    return killed.place


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, compared: Place) -> Path:
    """The same cells on the same bases, one after another in this process: what every other way must give."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "compare.yaml").write_text(yaml.safe_dump(COMPARISON))
    comparison = load_comparison(folder / "compare.yaml")
    Project(folder).key(create=True)
    shutil.copytree(compared.path("out/base"), folder / "base")
    for seed in comparison.seeds:
        make_ground(folder, comparison, seed, lambda *_: None)
    for entry in comparison.methods:
        for cell in comparison.cells(entry):
            assert run_cell(folder, comparison, cell, lambda *_: None)["state"] == "done"
    return folder


def evaluation(place: Place, cell: str, step: str) -> dict[str, Any]:
    return dict(json.loads(place.path(f"out/cells/{cell}/steps/{step}/evaluation.json").read_text())["sets"])


def numbers(folder: Path) -> dict[str, bytes]:
    """Every file of numbers that the cells end with, less the times."""
    names = ("steps/*/evaluation.json", "steps/*/unlearning.json", "steps/*/ahead.json", "final.json", "cell.json")
    cells = folder / "cells"
    return {
        path.relative_to(cells).as_posix(): path.read_bytes()
        for cell in CELLS
        for name in names
        for path in (cells / cell).glob(name)
        if path.parent.name != "base"
    }


def test_the_table_is_what_the_evaluations_say(compared: Place) -> None:
    with open(compared.path("out/report/table.csv"), newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["negation", "gd"]
    for method, row in rows.items():
        own, end, reached = [], [], 0
        passes, utility = [], {f"{kind}/{d}": [] for kind in ("drawn", "never") for d in DOMAINS}
        for seed in (0, 1):
            cell = f"{method}/seed{seed}"
            first, last = evaluation(compared, cell, "r001"), evaluation(compared, cell, "r002")
            mine = [(s["forget"]["probability"], s["forget"]["exact_memorization"]) for s in (first, last)]
            reached += sum(p <= 0.1 and em <= 0.5 for p, em in mine)
            own.append(np.max(mine, axis=0))
            end.append(max(last["forget"]["probability"], last["earlier/r001"]["probability"]))
            steps = compared.path(f"out/cells/{cell}/steps")
            passes.append(
                sum(json.loads((steps / r / "unlearning.json").read_text())["passes"] for r in ("r001", "r002"))
            )
            for domain in DOMAINS:
                utility[f"drawn/{domain}"].append(last[f"retain/{domain}"]["probability"])
                utility[f"never/{domain}"].append(last[f"utility/{domain}"]["probability"])
        expected = {"p": np.array(own)[:, 0], "em": np.array(own)[:, 1], "p_end": end, "passes": passes, **utility}
        for name, values in expected.items():
            assert float(row[f"{name} mean"]) == pytest.approx(np.mean(values), rel=1e-12), name
            assert float(row[f"{name} std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-12), name
            assert float(row[f"{name} min"]) == min(values) and float(row[f"{name} max"]) == max(values), name
        assert (int(row["targets reached"]), int(row["requests"]), row["seeds"]) == (reached, 4, "0 1")
        assert float(row["seconds mean"]) > 0
        for seed in (0, 1):
            curve = json.loads(compared.path(f"out/cells/{method}/seed{seed}/final.json").read_text())
            assert [point["at"] for point in curve["relearning"]["points"]] == [0, 2]
    page = compared.path("out/report/table.md").read_text()
    assert "nothing was tuned" in page and "| negation | 0, 1 |" in page and "P after relearning" in page


def test_seeds_differ_and_share_their_base(compared: Place) -> None:
    bases = [evaluation_of_base(compared, seed) for seed in (0, 1)]
    assert bases[0] != bases[1]
    for cell in CELLS:
        assert compared.path(f"out/cells/{cell}/steps/base").resolve() == compared.path(
            f"out/base/{cell[-5:]}/steps/base"
        )
    assert evaluation(compared, CELLS[0], "r001") != evaluation(compared, CELLS[1], "r001")
    for step, kept in (("r001", False), ("r002", True)):
        assert compared.path(f"out/cells/{CELLS[0]}/steps/{step}/model").exists() is kept


def evaluation_of_base(place: Place, seed: int) -> Any:
    return json.loads(place.path(f"out/base/seed{seed}/steps/base/evaluation.json").read_text())


def test_the_pictures_are_there(compared: Place) -> None:
    for name in ("utility", "front", "cascade", "relearning"):
        assert compared.path(f"out/report/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in compared.path(f"out/report/{name}.svg").read_text()


def test_mlflow_has_every_cell_and_no_text(compared: Place) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{compared.path('out/mlflow.db')}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    cells = client.search_runs([experiment], "tags.`alkn.kind` = 'cell'")
    assert sorted(run.info.run_name for run in cells) == sorted(CELLS)
    for run in cells:
        assert run.info.status == "FINISHED" and run.data.params["targets.p"] == "0.1"
        history = sorted(client.get_metric_history(run.info.run_id, "never/customers"), key=lambda m: m.step)
        last = evaluation(compared, run.info.run_name, "r002")["utility/customers"]["probability"]
        assert [m.step for m in history] == [0, 1, 2] and history[2].value == pytest.approx(last)
        steps = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        assert sorted(step.info.run_name for step in steps) == ["r001", "r002"]
    (report,) = client.search_runs([experiment], "tags.`alkn.kind` = 'report'")
    logged = {artifact.path for artifact in client.list_artifacts(report.info.run_id)}
    assert logged >= {"table.md", "table.csv", "utility.png", "front.svg", "cascade.png", "relearning.svg"}
    records = [
        json.loads(line)
        for path in compared.path("out/base/seed0/data/splits/forget").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    texts = [record["answer"].encode() for record in records]
    assert len(texts) == 16
    for path in compared.path("out").rglob("*"):
        inside = path.relative_to(compared.path("out")).parts
        if path.is_file() and "splits" not in inside and not path.is_symlink():
            data = path.read_bytes()
            assert not [text for text in texts if text in data], path


def workers(folder: Path) -> list[int]:
    """Processes that were given a folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"alkn.compare.worker" in words and any(str(folder).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found


def test_a_killed_comparison_goes_on_and_ends_with_the_same_numbers(killed: Compared, alone: Path) -> None:
    assert killed.sealed[0] == killed.sealed[1], "a sealed step was made again"
    found, wanted = numbers(killed.place.path("out")), numbers(alone)
    assert len(wanted) == len(CELLS) * (3 * 2 + 2)
    # The key of the digests of requests is each folder's own.
    assert {name: less_keys(data) for name, data in found.items()} == {n: less_keys(d) for n, d in wanted.items()}


def less_keys(data: bytes) -> Any:
    values = json.loads(data)
    return (
        {name: value for name, value in values.items() if name not in ("inputs", "made")}
        if isinstance(values, dict)
        else values
    )


def test_a_comparison_that_is_asked_to_end_does(
    compared: Place, tmp_path: Path, env: dict[str, str], shared_server: Callable[[], str]
) -> None:
    """SIGTERM ends the cell at work, and none of those that wait begins; the next run goes on."""
    place = place_in(tmp_path, env, shared_server)
    for name in ("base", ".alkn"):
        shutil.copytree(compared.path(f"out/{name}"), place.path(f"out/{name}"), symlinks=True)
    endless = json.loads(json.dumps(COMPARISON))
    endless["methods"][0]["method"]["epochs"] = 100_000
    place.path("compare.yaml").write_text(yaml.safe_dump(endless))
    run = place.start("alkn", "compare", "compare.yaml", "--folder", "out", "--workers", "1")
    wait_for(lambda: list(place.path("out").glob(".progress/*.json")), "the first cell at work", alive=run)
    os.kill(run.pid, signal.SIGTERM)
    wait_for(lambda: run.poll() is not None, "the end of the comparison")
    assert run.returncode != 0
    wait_for(lambda: not workers(place.root), "the end of the workers")
    assert len(list(place.path("out/logs").iterdir())) == 1, "another cell was begun"
    assert not list(place.path("out").rglob("cell.json"))


def test_a_changed_method_and_its_sweep_leave_the_other_alone(
    compared: Place, tmp_path: Path, env: dict[str, str], shared_server: Callable[[], str]
) -> None:
    """``gd`` gets a sweep: two rates on one request of the first seed, then the better one; ``negation`` stays."""
    place = place_in(tmp_path, env, shared_server)
    for name in ("base", ".alkn", "cells"):
        shutil.copytree(compared.path(f"out/{name}"), place.path(f"out/{name}"), symlinks=True)
    changed = json.loads(json.dumps(COMPARISON))
    changed["methods"][1]["sweep"] = {"lr": [0.0005, 0.002]}
    changed["sweep_requests"] = 1
    place.path("compare.yaml").write_text(yaml.safe_dump(changed))
    before = digests(place.path("out/cells/negation"))
    found = compare(place)
    assert found["failed"] == {} and found["missing"] == []
    assert digests(place.path("out/cells/negation")) == before
    with open(place.path("out/report/sweep.csv"), newline="") as file:
        trials = list(csv.DictReader(file))
    assert [(trial["variant"], trial["requests"]) for trial in trials] == [("lr=0.0005", "1"), ("lr=0.002", "1")]
    (chosen,) = [trial["variant"] for trial in trials if trial["chosen"] == "True"]
    best = max(trials, key=lambda t: (t["targets reached"] == t["requests"], float(t["never/customers"])))
    assert chosen == best["variant"]

    def made(name: str) -> set[str]:
        root = place.path("out/cells/gd")
        return {path.parent.relative_to(root).as_posix() for path in root.rglob(name)}

    assert made("trial.json") == {"lr=0.0005/seed0", "lr=0.002/seed0"}
    assert made("cell.json") == {"seed0", "seed1", f"{chosen}/seed0", f"{chosen}/seed1"}
    (row,) = [row for row in found["rows"] if row["method"] == "gd"]
    assert (row["variant"], row["seeds"]) == (chosen, "0 1")


def test_what_is_on_record_beside_a_page_is_not_made_again(
    compared: Place,
    tmp_path: Path,
    env: dict[str, str],
    shared_server: Callable[[], str],
    warm_alkn: Callable[..., Any],
) -> None:
    """Another machine has the page and its record alone: it shows the same table, and makes what is asked anew."""
    page = ("--page", "docs/RESULTS.md")
    done = warm_alkn(compared, "compare", "compare.yaml", "--folder", "out", "--report-only", *page)
    assert done.returncode == 0, done.stderr
    place = place_in(tmp_path, env, shared_server)
    shutil.copytree(compared.path("docs"), place.path("docs"))
    record = place.path("docs/results/cells.json").read_bytes()
    found = compare(place, *page)
    assert found["failed"] == {} and found["missing"] == []
    assert not place.path("out/base").exists() and not place.path("out/cells").exists()
    for name in ("table.md", "table.csv", "cells.json"):
        assert place.path(f"out/report/{name}").read_bytes() == compared.path(f"out/report/{name}").read_bytes()
    assert place.path("docs/results/cells.json").read_bytes() == record

    changed = json.loads(json.dumps(COMPARISON))
    changed["methods"][1]["method"]["lr"] = 0.002
    place.path("compare.yaml").write_text(yaml.safe_dump(changed))
    found = compare(place, *page)
    assert found["failed"] == {} and found["missing"] == []
    assert [path.name for path in place.path("out/cells").iterdir()] == ["gd"]
    rows = {row["method"]: row for row in found["rows"]}
    before = {row["method"]: row for row in compare(compared, "--report-only")["rows"]}
    assert rows["negation"] == before["negation"]
    assert rows["gd"]["never/customers mean"] != before["gd"]["never/customers mean"]

    # Other attacks ask for other numbers of the last models.
    changed["attacks"]["relearning"]["share"] = 0.3
    place.path("compare.yaml").write_text(yaml.safe_dump(changed))
    left = compare(place, "--report-only", *page)
    assert "attack/relearning mean" in before["gd"]
    assert not [row for row in left["rows"] if row.get("attack/relearning mean") is not None]


def test_what_is_wrong_is_said_before_anything_is_made(compared: Place, warm_alkn: Callable[..., Any]) -> None:
    done = warm_alkn(compared, "compare", "compare.yaml", "--folder", "other", "--only", "gdd")
    assert done.returncode == 2 and "unknown method label 'gdd'. Did you mean 'gd'?" in done.stderr
    done = warm_alkn(compared, "compare", "nowhere.yaml", "--folder", "other")
    assert done.returncode == 2 and "nowhere.yaml: no such file" in done.stderr
    assert not compared.path("other").exists()


def test_the_page_is_written_from_what_is_there(compared: Place, warm_alkn: Callable[..., Any]) -> None:
    done = warm_alkn(
        compared, "compare", "compare.yaml", "--folder", "out", "--report-only", "--page", "docs/RESULTS.md"
    )
    assert done.returncode == 0, done.stderr
    page = compared.path("docs/RESULTS.md").read_text()
    assert (
        "    alkn compare compare.yaml --folder out" in page and "seeds 0, 1" in page and "| negation | 0, 1 |" in page
    )
    for name in ("utility", "front", "cascade", "relearning"):
        assert f"(results/{name}.png)" in page and compared.path(f"docs/results/{name}.png").is_file()
