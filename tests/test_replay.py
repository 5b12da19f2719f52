"""Earlier requests in a later step: whose records the method is given, where it begins, and which model teaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from alkn import registry
from alkn.core.scoring import Example
from alkn.core.task_vector import TaskVector
from alkn.core.unlearning import Outcome, Task
from alkn.encoding import Encoder
from alkn.files import read_json, read_jsonl
from alkn.models import load_model
from alkn.project import Project, Step
from alkn.records import Plan
from alkn.requests.ledger import Entry, Ledger, save_ledger
from alkn.settings import load_settings
from alkn.step import evaluate_step, make_step, plan_step, unlearn_step

QUICK: dict[str, Any] = {
    "name": "alkn", "lr": 3e-3, "steps": 40, "decay_steps": 20, "batch_size": 4, "rehearsal": 8, "rehearsal_batch": 4,
    "retain_batch": 4,
}  # fmt: skip


Weights = dict[str, Tensor]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Task, Weights]]:
    """The tasks that steps give to ``alkn``, which then does its work, and the weights that each begins with."""
    seen: list[tuple[Task, Weights]] = []
    entry = registry.methods["alkn"]

    def call(task: Task, params: object) -> Outcome:
        seen.append((task, task.copy_weights()))
        outcome: Outcome = entry.call(task, params)
        return outcome

    monkeypatch.setitem(registry.methods._entries, "alkn", dataclasses.replace(entry, call=call))
    return seen


def read(step: Step) -> Weights:
    """The weights of a step's model in float32."""
    return {name: p.float() for name, p in load_model(step.model).named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all weights are the same bits."""
    return all(torch.equal(one[name], t) for name, t in other.items())


def ids(examples: Iterable[Example]) -> list[list[int]]:
    """Token ids of each."""
    return [e.tokens.tolist() for e in examples]


def erase(project: Project, name: str) -> None:
    """The first request's records are gone, and the ledger says so."""
    entry = Entry(received="2026-01-01", records=4, digest="d", previous="base", erased="2026-02-01")
    save_ledger(project, Ledger(accepted={name: entry}))
    project.request(name).unlink()


def plan_second(project: Project) -> Plan:
    """The second request, on top of the first."""
    settings = load_settings(project.step("r002").params)
    return plan_step(project, "r002", previous="r001", earlier=("r001",), settings=settings)


def two_steps(project: Project) -> None:
    """The second request is planned on top of the first, and unlearned."""
    make_step(project, "r001", previous="base", earlier=())
    unlearn_step(project, plan_second(project))


def encoded(project: Project, name: str) -> list[list[int]]:
    """Token ids of a request's records."""
    encoder = Encoder.of(project.base.model, load_settings(project.step("r002").params))
    return ids(encoder.examples(name, read_jsonl(project.request(name))))


def test_a_replaying_method_is_given_earlier_requests_and_the_base_model(
    tiny_project: Callable[..., Project], given: list[tuple[Task, Weights]]
) -> None:
    project = tiny_project("r001", "r002", method=QUICK)
    two_steps(project)
    (first, _), (second, begun) = given
    assert list(first.earlier) == []
    assert ids(second.earlier) == encoded(project, "r001") and ids(second.forget) == encoded(project, "r002")
    base, parent = read(project.base), read(project.step("r001"))
    assert same(begun, parent) and not same(base, parent)
    teacher = second.teacher("origin")
    assert same(dict(teacher.named_parameters()), base)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_others_are_not(tiny_project: Callable[..., Project], given: list[tuple[Task, Weights]]) -> None:
    two_steps(tiny_project("r001", "r002", method={**QUICK, "replay": 0, "teacher": "parent"}))
    assert [list(task.earlier) for task, _ in given] == [[], []] and given[1][0].origin is None


def test_an_erased_request_is_not_replayed_and_the_model_that_it_left_teaches(
    tiny_project: Callable[..., Project], given: list[tuple[Task, Weights]]
) -> None:
    """The base model would bring back what nobody can push down again."""
    project = tiny_project("r001", "r002", method=QUICK)
    make_step(project, "r001", previous="base", earlier=())
    erase(project, "r001")
    unlearn_step(project, plan_second(project))
    task, _ = given[-1]
    assert list(task.earlier) == []
    assert same(dict(task.teacher("origin").named_parameters()), read(project.step("r001")))


def test_forgotten_anew_all_requests_are_one_task_that_begins_at_the_base_model(
    tiny_project: Callable[..., Project], given: list[tuple[Task, Weights]]
) -> None:
    project = tiny_project("r001", "r002", method={**QUICK, "start": "origin"})
    two_steps(project)
    (first, _), (second, begun) = given
    wanted = [encoded(project, name) for name in ("r001", "r002")]
    assert list(first.requests) == [len(wanted[0])]
    assert ids(second.forget) == [*wanted[0], *wanted[1]] and list(second.requests) == [len(w) for w in wanted]
    assert list(second.earlier) == [] and second.origin is None
    assert same(begun, read(project.base)) and not same(begun, read(project.step("r001")))


def test_forgotten_anew_the_task_vector_is_still_taken_from_the_model_before(
    tiny_project: Callable[..., Project],
) -> None:
    """The chain holds: θ_{t-1} − τ is θ_t, whatever the step began with. What is told is the worse of both requests."""
    project = tiny_project("r001", "r002", method={**QUICK, "start": "origin"})
    two_steps(project)
    evaluate_step(project, plan_second(project))
    tau = TaskVector.load(project.step("r002").task_vector)
    left = load_model(project.step("r001").model)
    tau.apply_(left, -1.0)
    made = read(project.step("r002"))
    assert all(torch.allclose(p.float(), made[name], atol=1e-6) for name, p in left.named_parameters())
    sets = read_json(project.step("r002").evaluation)["sets"]
    told = read_json(project.step("r002").unlearning)["rounds"][-1]
    for key, metric in (("p", "probability"), ("exact_memorization", "exact_memorization")):
        assert told[key] == pytest.approx(max(sets["forget"][metric], sets["earlier/r001"][metric]), abs=1e-6)


def test_forgotten_anew_an_erased_request_is_left_as_its_model_left_it(
    tiny_project: Callable[..., Project], given: list[tuple[Task, Weights]]
) -> None:
    project = tiny_project("r001", "r002", method={**QUICK, "start": "origin"})
    make_step(project, "r001", previous="base", earlier=())
    erase(project, "r001")
    unlearn_step(project, plan_second(project))
    task, begun = given[-1]
    assert ids(task.forget) == encoded(project, "r002") and list(task.requests) == [len(task.forget)]
    assert same(begun, read(project.step("r001")))


def test_any_method_of_steps_can_forget_anew(tiny_project: Callable[..., Project]) -> None:
    """After the second step both requests are at the targets, from a base model that knows both."""
    method = {"name": "gradient_difference", "lr": 3e-3, "steps": 200, "start": "origin"}
    project = tiny_project("r001", "r002", method=method)
    two_steps(project)
    evaluate_step(project, plan_second(project))
    sets = read_json(project.step("r002").evaluation)["sets"]
    targets = load_settings(project.step("r002").params).targets
    assert {name: sets[name]["probability"] <= targets.p for name in ("forget", "earlier/r001")} == {
        "forget": True, "earlier/r001": True,
    }  # fmt: skip
