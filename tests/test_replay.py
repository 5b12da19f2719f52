"""Earlier requests in a later step: whose records the method is given, what θ_0 is, and what erasure forbids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alkn import registry
from alkn.core.unlearning import Outcome, Task
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import read_jsonl
from alkn.models import load_model
from alkn.project import Project
from alkn.requests.ledger import Entry, Ledger, save_ledger
from alkn.settings import load_settings
from alkn.step import make_step, plan_step, unlearn_step

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
    project = tiny_project("r001", "r002", method={**QUICK, "replay": 4, "teacher": "base"})
    two_steps(project)
    first, second = tasks
    encoder = Encoder.of(project.base.model, load_settings(project.step("r002").params))
    wanted = encoder.examples("r001", read_jsonl(project.request("r001")))
    assert list(first.earlier) == []
    assert [e.tokens.tolist() for e in second.earlier] == [e.tokens.tolist() for e in wanted]
    base, parent = (load_model(step.model).state_dict() for step in (project.base, project.step("r001")))
    teacher = second.teacher("base").state_dict()
    assert all(torch.equal(teacher[name], t.float()) for name, t in base.items())
    assert any(not torch.equal(teacher[name], t.float()) for name, t in parent.items())
    assert not any(p.requires_grad for p in second.teacher("base").parameters())


def test_others_are_not(tiny_project: Callable[..., Project], tasks: list[Task]) -> None:
    two_steps(tiny_project("r001", "r002", method=QUICK))
    assert [list(task.earlier) for task in tasks] == [[], []] and tasks[1].origin is None


def test_the_base_model_does_not_teach_what_was_erased(tiny_project: Callable[..., Project], tasks: list[Task]) -> None:
    """Its words would bring back what nobody can push down again; with θ_{t-1} the rest is replayed."""
    project = tiny_project("r001", "r002", method={**QUICK, "replay": 4, "teacher": "base"})
    make_step(project, "r001", previous="base", earlier=())
    gone = Entry(received="2026-01-01", records=4, digest="d", previous="base", erased="2026-02-01")
    save_ledger(project, Ledger(accepted={"r001": gone}))
    project.request("r001").unlink()
    settings = load_settings(project.step("r002").params)
    plan = plan_step(project, "r002", previous="r001", earlier=("r001",), settings=settings)
    with pytest.raises(InputError, match=r"method.teacher: 'base' still knows what was erased \(r001\)"):
        unlearn_step(project, plan)
    other = load_settings(tiny_project("r002", method={**QUICK, "replay": 4}).step("r002").params)
    unlearn_step(project, dataclasses.replace(plan, settings=other))
    assert list(tasks[-1].earlier) == []
