"""``alkn verify``: an untouched chain holds; changed metrics, swapped models and returned knowledge are caught."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import yaml
from safetensors.torch import load_file, save_file

from alkn.attacking import attack_stored
from alkn.core.task_vector import TaskVector
from alkn.errors import InputError
from alkn.files import digest_of, keyed_digest_of, read_json, read_jsonl, write_json, write_yaml
from alkn.matrix import regression_matrix
from alkn.models import load_model, load_tokenizer, save_model
from alkn.planning import plan_step
from alkn.project import Project, Step
from alkn.requests.ledger import ATTESTED, BASE, Entry, Ledger, load_ledger, save_ledger
from alkn.settings import Settings, validate_settings
from alkn.step import judge, make_step, measure_step
from alkn.verify import verify_champion

REQUESTS = ("r001", "r002")
CHANGES: dict[str, Any] = {
    "method": {"name": "gradient_difference", "lr": 0.003, "steps": 200},
    "targets": {"p": 0.3, "exact_memorization": 0.9},
    "gates": {"utility": {"enabled": False}, "robustness": {"probability": {"quantization": 0.6}}},
    "attacks": {"quantization": {"bits": [8]}},
}


@pytest.fixture(scope="module")
def made(tiny_ground: Project, tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two requests, unlearned and accepted. Read only."""
    from alkn.settings import validate_settings

    project = Project(tmp_path_factory.mktemp("made") / "p")
    shutil.copytree(tiny_ground.root, project.root)
    values = {**tiny_values, **CHANGES}
    write_yaml(project.params, values)
    settings = validate_settings(values, project.params)
    accepted: dict[str, Entry] = {}
    for name in REQUESTS:
        write_yaml(project.step(name).params, settings.of_step())
        previous, earlier = next(reversed(accepted), BASE), tuple(accepted)
        sealed = make_step(project, name, previous=previous, earlier=earlier)
        assert sealed.accepted, sealed.reason
        digest = keyed_digest_of(project.request(name), project.key())
        accepted[name] = Entry(received="2026-01-01", records=4, digest=digest, previous=previous)
    save_ledger(project, Ledger(accepted=accepted))
    return project


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Project:
    """A copy that a test may change."""
    shutil.copytree(made.root, tmp_path / "p")
    return Project(tmp_path / "p")


def forge(step: Step) -> None:
    """Make the manifest say what lies there now."""
    manifest = read_json(step.manifest)
    manifest["outputs"] = {name: digest_of(step.folder / name) for name in manifest["outputs"]}
    write_json(step.manifest, manifest)


def found(report: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {(one["kind"], one["where"], one["what"]) for one in report["findings"]}


def test_an_untouched_chain_holds(project: Project) -> None:
    before = digest_of(project.root / "steps")
    report = verify_champion(project)
    assert report["holds"] is True and report["findings"] == [] and report["champion"] == "r002"
    assert report["largest_difference"] == 0.0 and report["compared"] > 20, "the same machine, the same numbers"
    recorded = read_json(project.step("r002").gate)["gates"]
    assert {gate: verdict["passed"] for gate, verdict in report["gates"].items()} == {
        gate: verdict["passed"] for gate, verdict in recorded.items()
    }
    assert report["attacks"]["quantization"]["points"] and report["steps"] == ["base", *REQUESTS]
    assert read_json(project.root / "reports" / "verify.json") == report
    assert digest_of(project.root / "steps") == before, "nothing of the chain is touched"
    for request in REQUESTS:
        assert not any(row["answer"] in json.dumps(report) for row in read_jsonl(project.request(request)))


@pytest.mark.parametrize("forged", [False, True])
def test_a_changed_metric_is_caught(project: Project, forged: bool) -> None:
    step = project.step("r002")
    evaluation = read_json(step.evaluation)
    true = evaluation["sets"]["earlier/r001"]["probability"]
    evaluation["sets"]["earlier/r001"]["probability"] = true / 2
    write_json(step.evaluation, evaluation)
    if forged:
        forge(step)
    report = verify_champion(project)
    differs = ("differs", "r002", "earlier/r001.probability")
    assert found(report) == ({differs} if forged else {differs, ("changed", "r002", "evaluation.json")})
    number = next(one for one in report["findings"] if one["kind"] == "differs")
    assert (number["expected"], number["found"]) == (true / 2, true)


@pytest.mark.parametrize("forged", [False, True])
def test_a_swapped_model_is_caught(project: Project, forged: bool) -> None:
    step = project.step("r002")
    shutil.rmtree(step.model)
    shutil.copytree(project.base.model, step.model)
    if forged:
        forge(step)
    report = verify_champion(project)
    assert (("changed", "r002", "model") in found(report)) is not forged
    assert ("differs", "r002", "forget.probability") in found(report)
    assert ("returned", "r002", "forgetting: P, mean") in found(report)


def test_knowledge_that_was_added_back_is_caught(project: Project) -> None:
    """The task vector of the earlier request added to the champion, every number and digest forged to fit."""
    step, earlier = project.step("r002"), project.step("r001")
    model, tokenizer = load_model(step.model), load_tokenizer(step.model)
    TaskVector.load(earlier.task_vector).apply_(model, 1.0)
    shutil.rmtree(step.model)
    save_model(model, tokenizer, step.model)
    honest = verify_champion(project)["evaluation"]
    write_json(step.evaluation, honest)
    forge(step)
    report = verify_champion(project)
    assert not report["holds"] and ("returned", "r002", "no_return: P of r001") in found(report)
    assert {one["kind"] for one in report["findings"]} == {"returned"}, "digests and numbers were forged to fit"
    worst = next(one for one in report["findings"] if one["what"] == "no_return: P of r001")
    assert worst["found"] > worst["expected"] == 0.3


def test_each_file_that_the_chain_rests_on(project: Project) -> None:
    """An earlier model, a request's file, splits, frozen settings, the ledger: each by its name, and no text."""
    shutil.copy(project.base.model / "model.safetensors", project.step("r001").model / "model.safetensors")
    path = project.request("r001")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (project.splits / "generic.txt").write_text("other\n")
    with open(project.step("r001").params, "a") as f:
        f.write("# a word\n")
    ledger = load_ledger(project)
    ledger.accepted["r001"] = ledger.accepted["r001"].model_copy(update={"previous": "r000"})
    save_ledger(project, ledger)
    names = {(where, what) for kind, where, what in found(verify_champion(project)) if kind == "changed"}
    assert names >= {
        ("r001", "model"), ("r001", "data/requests/r001.jsonl"), ("r001", "params.yaml"),
        ("r001", "data/ledger.yaml: previous"), ("r001", "data/splits"), ("r002", "data/splits"),
        ("base", "data/splits"),
    }  # fmt: skip
    assert ("r002", "model") not in names


def test_a_model_that_cannot_be_read_is_no_success(project: Project) -> None:
    (project.step("r002").model / "model.safetensors").write_bytes(b"none")
    report = verify_champion(project)
    assert not report["holds"] and ("unmeasured", "r002", "evaluation") in found(report)


def test_a_text_of_the_user_that_changed(project: Project) -> None:
    """The champion was measured on it: its digest is told, and that its numbers are others."""
    step, text = project.step("r002"), project.root / "own.txt"
    text.write_text("The mill by the river grinds corn for the whole valley.\n")
    frozen = yaml.safe_load(step.params.read_text())
    frozen["evaluation"]["texts"] = {"own": "own.txt"}
    write_yaml(step.params, frozen)
    make_step(project, "r002", previous="r001", earlier=("r001",))
    assert verify_champion(project)["holds"]
    text.write_text("Nobody has lived in the old lighthouse since the storm.\n")
    report = verify_champion(project)
    assert ("changed", "r002", "evaluation.texts.own") in found(report)
    assert ("differs", "r002", "text/own.perplexity") in found(report)
    text.unlink()
    report = verify_champion(project)
    assert {("changed", "r002", "evaluation.texts.own"), ("unmeasured", "r002", "evaluation")} <= found(report)
    assert "evaluation.texts.own" in report["missing"]["evaluation"]


def test_samples_of_earlier_requests(project: Project) -> None:
    """A step that measures samples says so with bounds; the same sample again; all records on demand."""
    values = read_json(project.step("r002").evaluation)
    step = project.step("r002")
    frozen = yaml.safe_load(step.params.read_text())
    frozen["evaluation"] |= {"earlier_records": 2}
    write_yaml(step.params, frozen)
    make_step(project, "r002", previous="r001", earlier=("r001",))
    evaluation = read_json(step.evaluation)
    sample = evaluation["sampled"]["earlier/r001"]
    assert (sample["records"], sample["of"], sample["confidence"]) == (2, 4, 0.95)
    for metric, (low, high) in sample["intervals"].items():
        assert low <= values["sets"]["earlier/r001"][metric] <= high
    per_record = read_json(step.per_record)["earlier/r001"]["probability"]
    assert len(per_record) == 2
    assert evaluation["sets"]["earlier/r001"]["probability"] == pytest.approx(sum(per_record.values()) / 2)
    again, exact = verify_champion(project), verify_champion(project, exact=True)
    assert again["holds"] and again["largest_difference"] == 0.0
    assert exact["holds"] and list(exact["missing"]) == ["comparison of earlier/r001"]
    now = exact["evaluation"]["sets"]["earlier/r001"]["probability"]
    assert now == pytest.approx(values["sets"]["earlier/r001"]["probability"], abs=1e-6)


def test_the_command_and_its_exit_status(project: Project, make_changed: Callable[[Project], None]) -> None:
    from click.testing import CliRunner

    from flows.cli import cli

    here = Path.cwd()
    try:
        good = CliRunner().invoke(cli, ["-C", str(project.root), "verify", "--json"])
        make_changed(project)
        bad = CliRunner().invoke(cli, ["-C", str(project.root), "verify"])
    finally:
        os.chdir(here)
    assert good.exit_code == 0 and json.loads(good.stdout)["holds"] is True
    assert bad.exit_code == 1 and "r002 does not hold: 2 findings" in bad.output


@pytest.fixture
def make_changed() -> Callable[[Project], None]:
    def change(project: Project) -> None:
        evaluation = read_json(project.step("r002").evaluation)
        evaluation["sets"]["forget"]["probability"] += 0.5
        write_json(project.step("r002").evaluation, evaluation)

    return change


def test_a_chain_without_an_accepted_request(tiny_project: Callable[..., Project]) -> None:
    project = tiny_project()
    write_yaml(project.params, {})
    report = verify_champion(project)
    assert report["holds"] and report["champion"] == "base" and set(report["missing"]) == {"gates", "attacks"}


def test_the_tolerance_says_what_differs(project: Project) -> None:
    evaluation = read_json(project.step("r002").evaluation)
    evaluation["sets"]["forget"]["probability"] += 5e-4
    write_json(project.step("r002").evaluation, evaluation)
    forge(project.step("r002"))
    holds, values = {}, yaml.safe_load(project.params.read_text())
    for tolerance in (1e-3, 1e-5):
        write_yaml(project.params, {**values, "verification": {"tolerance": tolerance}})
        report = verify_champion(project)
        holds[tolerance] = not any(one["kind"] == "differs" for one in report["findings"])
    assert holds == {1e-3: True, 1e-5: False}


def test_the_gates_are_given_the_parent_the_base_and_the_models_weights(
    project: Project, tiny_values: dict[str, Any]
) -> None:
    """Utility kept of either is the ratio of their P, by hand; one weight that is no number, and ``finite`` says so."""
    settings = validate_settings({**tiny_values, **CHANGES, "gates": {}}, project.params)
    plan = plan_step(project, "r002", previous="r001", earlier=("r001",), settings=settings)
    step = project.step("r002")
    evaluation, attacks = read_json(step.evaluation), read_json(step.attacks)
    verdicts, _ = judge(project, plan, evaluation=evaluation, attacks=attacks, reached=True)
    found = {check["what"]: check["value"] for check in verdicts["utility"]["checks"]}
    now, parent, base = (
        read_json(one.evaluation)["sets"]["utility/facts"]["probability"]
        for one in (step, project.step("r001"), project.base)
    )
    assert parent != base and found["facts kept of parent"] == pytest.approx(now / parent)
    assert found["facts kept of base"] == pytest.approx(now / base)
    assert verdicts["finite"]["passed"] is True
    file = step.model / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    verdicts, failed = judge(project, plan, evaluation=evaluation, attacks=attacks, reached=True)
    assert verdicts["finite"]["passed"] is False and any("finite" in reason for reason in failed)


def test_without_a_base_model(tmp_path: Path) -> None:
    assert Settings().verification.tolerance == 1e-6
    with pytest.raises(InputError, match="no base model yet"):
        verify_champion(Project(tmp_path))


def erase(project: Project, *requests: str) -> None:
    """As the erasure of a request's records leaves a project: the ledger says so, and the file is gone."""
    ledger = load_ledger(project)
    accepted = {
        name: entry.model_copy(update={"erased": "2026-02-01"}) if name in requests else entry
        for name, entry in ledger.accepted.items()
    }
    save_ledger(project, Ledger(accepted=accepted))
    for name in requests:
        project.request(name).unlink()


def test_what_was_measured_on_erased_records_is_attested(project: Project) -> None:
    """The champion holds without them, on their recorded numbers; a changed recorded number is still caught."""
    erase(project, *REQUESTS)
    report = verify_champion(project)
    assert report["holds"] is True, report["findings"]
    assert report["missing"]["forget"] == report["missing"]["earlier/r001"] == ATTESTED
    assert report["missing"]["quantization"] == report["missing"]["model.gibberish"] == ATTESTED
    assert report["gates"]["robustness"]["passed"] is True and report["attacks"] == {"missing": ANY}
    recorded = read_json(project.step("r002").evaluation)
    assert report["evaluation"]["sets"]["forget"] == recorded["sets"]["forget"]
    assert 0 < report["compared"] < sum(map(len, recorded["sets"].values()))

    recorded["sets"]["forget"]["probability"] /= 2
    write_json(project.step("r002").evaluation, recorded)
    assert ("changed", "r002", "evaluation.json") in found(verify_champion(project))


def test_a_file_that_is_only_missing_is_not_erased(project: Project) -> None:
    project.request("r001").unlink()
    assert ("changed", "r001", "data/requests/r001.jsonl") in found(verify_champion(project))


def test_a_later_step_is_not_measured_on_erased_records(project: Project) -> None:
    """Neither by metrics nor by attacks, and both say why; the matrix says it too."""
    erase(project, "r001")
    settings = project.settings()
    plan = plan_step(project, "r002", previous="r001", earlier=("r001",), settings=settings)
    assert plan.attested == ("r001",)
    metrics, per_record = measure_step(project, plan)
    assert metrics["missing"]["earlier/r001"] == ATTESTED
    assert "earlier/r001" not in metrics["sets"] and "earlier/r001" not in per_record and "forget" in metrics["sets"]
    attacks = attack_stored(project, project.step("r002"), ("r001", "r002"), settings)
    assert attacks["missing"]["on r001"] == ATTESTED and set(attacks["quantization"]["points"][0]["requests"]) == {
        "r002"
    }
    matrix = regression_matrix(project, settings).content
    assert matrix["missing"] == {f"{model}.request/r001": ATTESTED for model in ("base", *REQUESTS)}
    assert set(matrix["cells"]["r002"]) == {"r002"}
