"""One cell by the library alone: what ends it, what it leaves, what is made again and what is not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from alkn.compare.cell import ground_is_made, ground_of, make_ground, project_of, requests_of, run_cell
from alkn.compare.config import Cell, Comparison, load_comparison
from alkn.compare.results import CellResult, choose, collect, read_cell
from alkn.core.truth_ratio import truth_ratios
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.models import context_length, load_model, load_tokenizer
from alkn.project import Project
from alkn.reference import make_reference, request_records

VALUES: dict[str, Any] = {
    "seeds": [0],
    "settings": {
        "benchmark": {
            "name": "people", "requests": 2, "customers_per_request": 2, "records_per_customer": 3, "kept_customers": 4,
            "holdout_customers": 1, "facts": 4,
        },
        "base": {
            "architecture": {"vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "layers": 1},
            "training": {"epochs": 40, "batch_size": 4, "until": 0.3},
        },
        "evaluation": {"metrics": ["probability", "exact_memorization"]},
    },
    "methods": [
        {"label": "steps", "method": {"name": "gradient_difference", "steps": 2, "check_every": 1}},
        {"label": "wreck", "method": {"name": "task_vector", "lr": 1e30, "epochs": 2, "scale": 1.0}},
    ],
    "attacks": {"quantization": {"bits": [4]}},
    "references": [7],
}  # fmt: skip
STEPS, WRECK = Cell("steps", "", 0), Cell("wreck", "", 0)


def quiet(*_: object) -> None:
    """Told about progress."""


def written(folder: Path, **changes: Any) -> Comparison:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({**VALUES, **changes}))
    return load_comparison(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ground, its reference, and both cells. What a test changes it puts back."""
    folder = tmp_path_factory.mktemp("cells")
    comparison = written(folder)
    Project(folder).key(create=True)
    assert not ground_is_made(folder, comparison, 0)
    make_ground(folder, comparison, 0, quiet)
    assert ground_is_made(folder, comparison, 0)
    for cell in (STEPS, WRECK):
        run_cell(folder, comparison, cell, quiet)
    return folder


def result(folder: Path, cell: Cell) -> CellResult:
    found = read_cell(folder, written(folder), {}, cell)
    assert found is not None
    return found


def test_a_target_that_is_not_reached_does_not_end_the_chain(folder: Path) -> None:
    found = result(folder, STEPS)
    assert found.state == "done" and len(found.steps) == 2 and found.reached_count == 0
    assert [step.passes for step in found.steps] == [2 * 32, 2 * 32], "two steps of 16 + 16 records each"
    known = [level.p for step in (found.base, *found.steps) for level in step.requests.values()]
    assert len(known) == 6 and all(p is not None and 0 <= p <= 1 for p in known), "requests to come are measured too"


def test_a_training_that_diverges_ends_its_cell_with_the_reason(folder: Path) -> None:
    found = result(folder, WRECK)
    assert found.state == "diverged" and found.reason.startswith("r001: ") and len(found.steps) == 0
    state = project_of(folder, WRECK).root / "cell.json"
    before = state.read_bytes()
    run_cell(folder, written(folder), WRECK, quiet)
    assert state.read_bytes() == before


def test_forget_quality_is_scipys_and_attacks_are_there(folder: Path) -> None:
    from scipy.stats import ks_2samp

    comparison = written(folder)
    ground, project, settings = ground_of(folder, 0), project_of(folder, STEPS), comparison.cell_settings(STEPS)
    reference = make_reference(ground, comparison.ground_settings(0), without=requests_of(ground), seed=7)
    assert reference.cached, "the reference is made once a seed, not by each cell"

    def ratios(path: Path, request: str) -> list[float]:
        encoder = Encoder(load_tokenizer(path), settings.data, context=context_length(path))
        return truth_ratios(load_model(path), encoder.record_set(request, request_records(ground, request))).values

    last = project.step("r002").model
    expected = {
        request: ks_2samp(ratios(last, request), ratios(reference.model, request)).pvalue
        for request in ("r001", "r002")
    }
    final = json.loads((project.root / "final.json").read_text())
    assert {name: test["p_value"] for name, test in final["forget_quality"].items()} == pytest.approx(expected)
    numbers = result(folder, STEPS).quantities()
    assert numbers["quality_min"] == pytest.approx(min(expected.values()))
    assert numbers["quality_median"] == pytest.approx(sum(expected.values()) / 2)
    assert numbers["attack/quantization"] == final["quantization"]["points"][-1]["probability"]


def test_other_attacks_are_run_on_the_model_that_is_there(folder: Path) -> None:
    comparison = written(folder, attacks={"relearning": {"steps": [0, 1], "share": 0.2}})
    evaluation = project_of(folder, STEPS).step("r002").evaluation
    before = evaluation.stat().st_mtime_ns
    found = read_cell(folder, comparison, {}, STEPS)
    assert found is not None and found.final == {}, "what another budget found is not shown"
    run_cell(folder, comparison, STEPS, quiet)
    found = read_cell(folder, comparison, {}, STEPS)
    assert found is not None and found.attacks == ["relearning"] and evaluation.stat().st_mtime_ns == before
    run_cell(folder, written(folder), STEPS, quiet)


def test_on_record_counts_with_the_same_settings_and_the_same_data_alone(folder: Path, tmp_path: Path) -> None:
    comparison, found = written(folder), result(folder, STEPS)
    shutil.copytree(folder / "base", tmp_path / "base", symlinks=True)
    for cell, counts in (
        (found, True), (replace(found, splits="sha256:0"), False), (replace(found, asked="sha256:0"), False)
    ):  # fmt: skip
        assert (STEPS not in collect(tmp_path, comparison, {STEPS.name: cell}).missing) is counts


def test_a_domain_that_nobody_measures_is_refused_before_anything_is_made(folder: Path) -> None:
    comparison = written(folder, choose_by="custmers")
    with pytest.raises(InputError, match="choose_by: unknown utility domain 'custmers'. Did you mean 'customers'?"):
        make_ground(folder, comparison, 0, quiet)
    with pytest.raises(InputError, match="choose_by: unknown utility domain 'custmers'"):
        choose([result(folder, STEPS)], comparison.choose_by)
    written(folder)


def test_changed_settings_are_another_cell(folder: Path) -> None:
    changed = [{**VALUES["methods"][0], "method": {**VALUES["methods"][0]["method"], "steps": 3}}, VALUES["methods"][1]]
    results = collect(folder, written(folder, methods=changed), {})
    assert [len(row.missing) for row in results.rows] == [1, 0]
    settings = json.loads(json.dumps(VALUES["settings"]))
    settings["base"]["training"]["epochs"] = 41
    comparison = written(folder, settings=settings)
    assert [len(row.missing) for row in collect(folder, comparison, {}).rows] == [1, 1]
    assert not ground_is_made(folder, comparison, 0)


def test_a_changed_number_is_not_taken(folder: Path) -> None:
    """An evaluation that was edited by hand is made again, with the step's model and those before it."""
    step = project_of(folder, STEPS).step("r001")
    good = step.evaluation.read_bytes()
    step.evaluation.write_bytes(good.replace(b"probability", b"probability ", 1))
    run_cell(folder, written(folder), STEPS, quiet)
    assert step.evaluation.read_bytes() == good


def test_a_trial_is_the_beginning_of_the_cell_that_goes_on_from_it(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "base").symlink_to(folder / "base")
    (tmp_path / ".alkn").symlink_to(folder / ".alkn")
    method = {"label": "steps", "method": VALUES["methods"][0]["method"], "sweep": {"check_every": [1]}}
    comparison = written(tmp_path, methods=[method], sweep_requests=1)
    trial, whole = Cell("steps", "check_every=1", 0, trial=True), Cell("steps", "check_every=1", 0)
    run_cell(tmp_path, comparison, trial, quiet)
    results = collect(tmp_path, comparison, {})
    assert [list(tried.result.chain) for tried in results.trials] == [["r001"]] and results.missing == [whole]
    step = project_of(tmp_path, trial).step("r001").manifest
    sealed = step.stat().st_mtime_ns
    run_cell(tmp_path, comparison, whole, quiet)
    results = collect(tmp_path, comparison, {})
    assert step.stat().st_mtime_ns == sealed and results.missing == []
    (tried,), ((made,),) = results.trials, [row.cells for row in results.rows]
    assert list(made.chain) == ["r001", "r002"] and made.steps[0] == tried.result.steps[0]
    assert made.steps[1].requests == result(folder, STEPS).steps[1].requests, "the same numbers as without a sweep"
    longer = written(tmp_path, methods=[method], sweep_requests=2)
    assert [cell.trial for cell in collect(tmp_path, longer, {}).missing] == [True], "other requests are another trial"


def test_requests_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    forget = tmp_path / "data" / "splits" / "forget"
    forget.mkdir(parents=True)
    for number in (10, 2, 1, 11):
        (forget / f"tofu_{number}.jsonl").touch()
    assert requests_of(Project(tmp_path)) == ["tofu_1", "tofu_2", "tofu_10", "tofu_11"]
