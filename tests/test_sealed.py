"""A pending request's step that is done: taken as it is where nothing changed, else made anew or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alkn.chain import begin_together, prepare_base
from alkn.errors import ChainBroken, InputError
from alkn.files import digest_of, keyed_digest_of, read_json, read_jsonl, write_json, write_jsonl
from alkn.planning import plan_step, sealed_step
from alkn.project import Project
from alkn.requests.ledger import Entry, Ledger, load_ledger, save_ledger
from alkn.settings import load_settings, validate_settings
from alkn.step import make_step

QUICK: dict[str, Any] = {"name": "gradient_ascent", "steps": 1}


@pytest.fixture
def project(tiny_project: Callable[..., Project]) -> Project:
    """r001 is pending, and its step is done: the run ended before the ledger was written."""
    project = tiny_project("r001", "r002", method=QUICK)
    entries = {
        name: Entry(
            received="2026-01-01", records=4, digest=keyed_digest_of(project.request(name), project.key())
        )
        for name in ("r001", "r002")
    }  # fmt: skip
    save_ledger(project, Ledger(pending=entries))
    make_step(project, "r001", previous="base", earlier=())
    return project


def test_a_step_that_is_done_is_taken_as_it_is(project: Project) -> None:
    sealed = sealed_step(project, "r001")
    assert sealed is not None and sealed.manifest == read_json(project.step("r001").manifest)
    assert sealed_step(project, "r002") is None, "it has no manifest"


def change_settings(project: Project) -> None:
    params = project.step("r001").params
    params.write_text(params.read_text().replace("steps: 1", "steps: 2"))


def change_splits(project: Project) -> None:
    path = project.splits / "utility.jsonl"
    write_jsonl(path, read_jsonl(path)[:-1])


def change_base(project: Project) -> None:
    evaluation = read_json(project.base.evaluation)
    evaluation["sets"]["holdout"]["probability"] += 0.1
    write_json(project.base.evaluation, evaluation)
    manifest = read_json(project.base.manifest)
    manifest["outputs"]["evaluation.json"] = digest_of(project.base.evaluation)
    write_json(project.base.manifest, manifest)


def attest_another_file(project: Project) -> None:
    ledger = load_ledger(project)
    ledger.pending["r001"] = ledger.pending["r001"].model_copy(update={"digest": "hmac-sha256:0"})
    save_ledger(project, ledger)


def drop_a_record(project: Project) -> None:
    write_jsonl(project.request("r001"), read_jsonl(project.request("r001"))[1:])


@pytest.mark.parametrize(
    "change",
    [change_settings, change_splits, change_base, attest_another_file, drop_a_record],
    ids=lambda f: f.__name__,
)
def test_a_step_of_something_else_is_not_taken(change: Callable[[Project], None], project: Project) -> None:
    change(project)
    assert sealed_step(project, "r001") is None


def test_a_step_on_another_parent_is_not_taken(project: Project) -> None:
    """The other request was accepted first meanwhile."""
    make_step(project, "r002", previous="base", earlier=())
    ledger = load_ledger(project)
    ledger.accepted["r002"] = ledger.pending.pop("r002").model_copy(update={"previous": "base"})
    save_ledger(project, ledger)
    assert sealed_step(project, "r001") is None


def test_it_is_said_if_what_it_builds_on_is_damaged(project: Project) -> None:
    (project.base.model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ChainBroken, match="steps/base/model was changed after it was made"):
        sealed_step(project, "r001")


def test_all_that_a_step_reads_is_among_its_inputs(project: Project) -> None:
    """Base model and its numbers, the parent's state, and the records of earlier requests."""
    settings = load_settings(project.step("r002").params)
    inputs = plan_step(project, "r002", previous="r001", earlier=("r001",), settings=settings).inputs
    base, parent = (read_json(step.manifest)["outputs"] for step in (project.base, project.step("r001")))
    assert inputs["base"] == base["model"] and inputs["base_evaluation"] == base["evaluation.json"]
    assert inputs["parent"] == parent["model"] and inputs["state"] == parent["state.safetensors"]
    assert inputs["earlier/r001"] == keyed_digest_of(project.request("r001"), project.key())


def test_processes_that_begin_together_hold_the_file_against_the_ledger(
    project: Project, tiny_values: dict[str, Any]
) -> None:
    settings = validate_settings({**tiny_values, "method": QUICK}, project.params)
    assert begin_together(project, "r001", settings) == ("base", ())
    drop_a_record(project)
    with pytest.raises(InputError, match=r"data/requests/r001\.jsonl was changed after intake"):
        begin_together(project, "r001", settings)


def test_splits_beside_a_model_of_ones_own_do_not_change_under_a_chain(
    tiny_project: Callable[..., Project], tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    """Without a step the model is measured on the new ones; under a chain they are refused."""
    project = tiny_project()
    project.base.model.rename(tmp_path / "own")
    own = {**tiny_values, "benchmark": None, "base": {"model": str(tmp_path / "own")}}
    settings = validate_settings(own, project.params)
    assert prepare_base(project, settings) and not prepare_base(project, settings)
    before = project.base.evaluation.read_bytes()
    change_splits(project)
    assert prepare_base(project, settings)
    assert project.base.evaluation.read_bytes() != before
    save_ledger(project, Ledger(accepted={"r001": Entry(received="2026-01-01", records=4, previous="base")}))
    assert not prepare_base(project, settings)
    change_splits(project)
    with pytest.raises(InputError, match=r"steps/base no longer fits params\.yaml \(seed, data, base or the splits"):
        prepare_base(project, settings)
