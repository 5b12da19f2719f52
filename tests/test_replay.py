"""Earlier requests in a later step: whose records the method is given, and which model teaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alkn import registry
from alkn.core.unlearning import Outcome, StopRule, Task
from alkn.encoding import Encoder
from alkn.files import read_json, read_jsonl, write_yaml
from alkn.models import load_model
from alkn.planning import limits_of, plan_step
from alkn.project import Project
from alkn.requests.ledger import Entry, Ledger, save_ledger
from alkn.settings import load_settings, validate_settings
from alkn.step import make_step, unlearn_step

QUICK: dict[str, Any] = {
    "name": "alkn", "lr": 3e-3, "steps": 40, "decay_steps": 20, "batch_size": 4, "rehearsal": 8, "rehearsal_batch": 4,
    "retain_batch": 4,
}  # fmt: skip


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that steps give to ``alkn``, which then does its work."""
    seen: list[Task] = []
    entry = registry.methods["alkn"]

    def call(task: Task, params: object) -> Outcome:
        seen.append(task)
        outcome: Outcome = entry.call(task, params)
        return outcome

    monkeypatch.setitem(registry.methods._entries, "alkn", dataclasses.replace(entry, call=call))
    return seen


def two_steps(project: Project) -> None:
    """The second request is planned on top of the first, and unlearned."""
    make_step(project, "r001", previous="base", earlier=())
    plan = plan_step(
        project, "r002", previous="r001", earlier=("r001",), settings=load_settings(project.step("r002").params)
    )
    unlearn_step(project, plan)


def test_a_replaying_method_is_given_earlier_requests_and_the_base_model(
    tiny_project: Callable[..., Project], tasks: list[Task]
) -> None:
    project = tiny_project("r001", "r002", method=QUICK)
    two_steps(project)
    first, second = tasks
    encoder = Encoder.of(project.base.model, load_settings(project.step("r002").params))
    wanted = encoder.examples("r001", read_jsonl(project.request("r001")))
    limits = load_settings(project.step("r001").params).targets
    assert first.stop == StopRule(0.8 * float(limits.p), 0.8 * float(limits.exact_memorization)), "margin .8"
    assert list(first.earlier) == []
    assert [e.tokens.tolist() for e in second.earlier] == [e.tokens.tolist() for e in wanted]
    base, parent = (load_model(step.model).state_dict() for step in (project.base, project.step("r001")))
    teacher = second.teacher("origin").state_dict()
    assert all(torch.equal(teacher[name], t.float()) for name, t in base.items())
    assert any(not torch.equal(teacher[name], t.float()) for name, t in parent.items())
    assert not any(p.requires_grad for p in second.teacher("origin").parameters())


def test_others_are_not(tiny_project: Callable[..., Project], tasks: list[Task]) -> None:
    two_steps(tiny_project("r001", "r002", method={**QUICK, "replay": 0, "teacher": "parent"}))
    assert [list(task.earlier) for task in tasks] == [[], []] and tasks[1].origin is None


def test_an_erased_request_is_not_replayed_and_the_model_that_it_left_teaches(
    tiny_project: Callable[..., Project], tasks: list[Task]
) -> None:
    """The base model would bring back what nobody can push down again."""
    project = tiny_project("r001", "r002", method=QUICK)
    make_step(project, "r001", previous="base", earlier=())
    gone = Entry(received="2026-01-01", records=4, digest="d", previous="base", erased="2026-02-01")
    save_ledger(project, Ledger(accepted={"r001": gone}))
    project.request("r001").unlink()
    settings = load_settings(project.step("r002").params)
    unlearn_step(project, plan_step(project, "r002", previous="r001", earlier=("r001",), settings=settings))
    assert list(tasks[-1].earlier) == []
    left = load_model(project.step("r001").model).state_dict()
    assert all(torch.equal(t, left[name].float()) for name, t in tasks[-1].teacher("origin").state_dict().items())


def test_a_target_holdout_is_the_level_of_each_number_there(
    tiny_project: Callable[..., Project], tiny_values: dict[str, Any]
) -> None:
    project = tiny_project()
    held = read_json(project.base.evaluation)["sets"]["holdout"]
    targets = {"p": "holdout", "exact_memorization": "holdout"}
    settings = validate_settings({**tiny_values, "targets": targets}, project.params)
    assert held["probability"] != held["exact_memorization"]
    assert limits_of(project, settings) == StopRule(held["probability"], held["exact_memorization"])
    mixed = validate_settings({**tiny_values, "targets": {**targets, "p": 0.03}}, project.params)
    assert limits_of(project, mixed) == StopRule(0.03, held["exact_memorization"])


def test_a_finished_unlearning_of_other_settings_is_made_anew(tiny_project: Callable[..., Project]) -> None:
    """Cut off before its verdict, then asked for another rate; asked for the same again it is as it was."""
    project = tiny_project("r001", method={"name": "gradient_ascent", "steps": 1, "lr": 1e-3})
    step, made = project.step("r001"), []
    for lr in (1e-3, 1e-3, 2e-3):
        values = load_settings(step.params).of_step() | {"method": {"name": "gradient_ascent", "steps": 1, "lr": lr}}
        write_yaml(step.params, values)
        plan = plan_step(project, "r001", previous="base", earlier=(), settings=load_settings(step.params))
        unlearn_step(project, plan)
        assert read_json(step.unlearning)["inputs"] == dict(plan.inputs)
        made.append((step.unlearning.stat().st_mtime_ns, (step.model / "model.safetensors").read_bytes()))
    assert made[0] == made[1] and made[1][0] != made[2][0] and made[1][1] != made[2][1]
