"""The loop that methods share: which records a step pushes, and by how much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alkn.core.descent import EARLIER_EVERY, Pace, Replay, descend
from alkn.core.scoring import Batch, collate, score
from alkn.core.training import answer_loss, suppression_loss
from alkn.core.unlearning import StopRule, Task
from alkn.errors import TrainingDiverged

PACE = Pace(
    lr=0.01, steps=1, decay_steps=1, lr_floor=1.0, check_every=1, batch_size=6, retain_batch=0, weight_decay=0.0,
    clip=None,
)  # fmt: skip


def half_known(memorised: Any, make_examples: Any) -> Task:
    """Four records that the model knows by heart between two that it never saw."""
    strange = make_examples(2, seed=77, prompt=(4, 6), answer=(4, 6))
    forget = [strange[0], *memorised.forget[:4], strange[1]]
    return Task(memorised.model(), forget, memorised.retain, StopRule(0.01, 0.1), seed=0)


def ascent(model: nn.Module, batch: Batch) -> Tensor:
    return -answer_loss()(model, batch)


def test_a_record_at_the_target_is_left_out_and_the_others_weigh_what_they_did(
    memorised: Any, make_examples: Any, full_forward: Any
) -> None:
    """One step of plain gradient descent, against the gradient of the four known records by the plain forward."""
    task = half_known(memorised, make_examples)
    scores = score(task.model, task.forget)
    assert task.stop.met_by(scores).tolist() == [True, False, False, False, False, True]
    other = memorised.model()
    parts = [full_forward(other, example)[0] for example in task.forget[1:5]]
    loss = -torch.cat(parts).sum() / sum(map(len, parts)) * 4 / 6
    wanted = torch.autograd.grad(loss, list(other.parameters()))
    before = {name: w.clone() for name, w in task.weights().items()}

    pace = replace(PACE, lr=1.0)
    outcome = descend(
        task, pace, forget=ascent, keep=None, optimizer=lambda q: torch.optim.SGD(q, lr=1.0), rest=True
    )  # fmt: skip

    assert outcome.passes == 4
    for (name, w), gradient in zip(task.weights().items(), wanted, strict=True):
        torch.testing.assert_close(before[name] - w, gradient, rtol=1e-3, atol=1e-7)
    assert max(float(g.abs().max()) for g in wanted) > 1e-4


@pytest.mark.parametrize("rest", [False, True])
def test_all_records_are_pushed_unless_they_may_rest(rest: bool, memorised: Any, make_examples: Any) -> None:
    task, seen = half_known(memorised, make_examples), set()

    def forget(model: nn.Module, batch: Batch) -> Tensor:
        seen.update(batch.records)
        return ascent(model, batch)

    outcome = descend(task, replace(PACE, lr=1e-5, steps=3, batch_size=2), forget=forget, keep=None, rest=rest)
    assert seen == ({1, 2, 3, 4} if rest else set(range(6)))
    assert outcome.passes == (4 if rest else 6) and not outcome.reached


def test_a_record_whose_knowledge_comes_back_is_pushed_again(memorised: Any, make_examples: Any) -> None:
    """A keeping loss that teaches the strange records: from the next measurement on they are pushed."""
    task, seen = half_known(memorised, make_examples), []

    class Teach:
        passes = 0

        def __call__(self, step: int) -> Tensor:
            batch = collate(task.forget, [0, 5], device=torch.device("cpu"))
            return answer_loss()(task.model, batch)

    def forget(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(set(batch.records))
        return 0.0 * ascent(model, batch)

    descend(task, replace(PACE, lr=5e-3, steps=40), forget=forget, keep=Teach(), rest=True)
    assert seen[0] == {1, 2, 3, 4} and seen[-1] == set(range(6))


def with_earlier(memorised: Any, make_examples: Any, **more: Any) -> Task:
    """Six records to forget; of an earlier request two that the model never saw between four that came back."""
    strange = make_examples(2, seed=77, prompt=(4, 6), answer=(4, 6))
    earlier = [strange[0], *memorised.second[:4], strange[1]]
    given = {"stop": StopRule(0.01, 0.1), "seed": 0} | more
    return Task(memorised.model(), memorised.forget, memorised.retain, earlier=earlier, **given)


def test_of_earlier_requests_is_drawn_what_rose_above_the_target(memorised: Any, make_examples: Any) -> None:
    """Each record at most once a step, by its position after those of the forget set; all four over some steps."""
    task = with_earlier(memorised, make_examples)
    replay = Replay(task, 3)
    drawn = [replay(step) for step in range(20)]
    assert all(len(set(records)) == len(records) == 3 for records in drawn)
    assert {record for records in drawn for record in records} == {7, 8, 9, 10}
    assert drawn == [Replay(task, 3)(step) for step in range(20)]
    assert sorted(Replay(task, 9)(0)) == [7, 8, 9, 10]


def test_the_loss_of_a_replayed_record_is_its_own(memorised: Any, make_examples: Any, full_forward: Any) -> None:
    """One step of plain gradient descent, against the plain forward: six records and four in six places."""
    task, other, seen = with_earlier(memorised, make_examples), memorised.model(), []

    def forget(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(batch.records)
        return ascent(model, batch)

    def mean_nll(examples: Any) -> Tensor:
        return torch.cat([full_forward(other, example)[0] for example in examples]).mean()

    before = {name: w.clone() for name, w in task.weights().items()}
    outcome = descend(
        task, replace(PACE, lr=1.0), forget=forget, keep=None, optimizer=lambda q: torch.optim.SGD(q, lr=1.0), replay=6
    )
    assert outcome.passes == 10 and [len(records) for records in seen] == [6, 4]
    loss = -mean_nll(task.forget) - mean_nll(task.earlier[1:5]) * 4 / 6
    wanted = torch.autograd.grad(loss, list(other.parameters()))
    for (name, w), gradient in zip(task.weights().items(), wanted, strict=True):
        torch.testing.assert_close(before[name] - w, gradient, rtol=1e-3, atol=1e-7)


def test_the_loop_goes_on_until_earlier_requests_are_at_the_target_too(memorised: Any, make_examples: Any) -> None:
    """With a replay both are at the target; without one the earlier request is where it was, and no pass is spent."""
    push, pace = suppression_loss(scale=1.0, midpoint=0.076), replace(PACE, lr=3e-3, steps=200, check_every=2)
    found = {}
    for replay in (0, 6):
        task = with_earlier(memorised, make_examples)
        outcome = descend(task, pace, forget=push, keep=None, rest=True, replay=replay)
        assert outcome.reached
        assert task.stop.met(task.measure_stored()[0])
        found[replay] = task.stop.met(task.measure_stored(task.earlier)[0])
    assert found == {0: False, 6: True}


def test_earlier_requests_are_measured_less_often(memorised: Any, make_examples: Any) -> None:
    """At each fourth measurement until the steps could be over, and then at each; the larger number is told."""
    task = with_earlier(memorised, make_examples, stop=StopRule(0.0, 0.0))
    task.forget = [memorised.forget[0], task.earlier[0], task.earlier[-1]]
    measured, told = [], []

    class Watched(Task):
        def measure(self, records: Any = None) -> Any:
            found = super().measure(records)
            measured.append(("earlier" if records is not None else "forget", found[0]))
            return found

    task.__class__ = Watched
    pace = replace(PACE, lr=1e-9, steps=20, decay_steps=17, check_every=2)
    descend(task, pace, forget=ascent, keep=None, replay=2, on_measure=lambda step, now: told.append(now))
    kinds = "".join(kind[0] for kind, _ in measured)
    assert kinds == "fe" + 2 * ("f" * EARLIER_EVERY + "e") + "fe" * 3, (
        "the last three: where the schedule ends, then every two steps"
    )
    forget, earlier = (next(now for kind, now in measured if kind == name) for name in ("forget", "earlier"))
    assert earlier.p > 1.5 * forget.p and earlier.exact_memorization > forget.exact_memorization
    assert told[0].p == pytest.approx(earlier.p, rel=1e-3)
    assert told[0].exact_memorization == earlier.exact_memorization


def test_what_is_forgotten_already_is_not_replayed_for(memorised: Any, make_examples: Any) -> None:
    """A request that needs no step takes none, whatever the earlier ones say; the gate judges those."""
    task = with_earlier(memorised, make_examples, stop=StopRule(1.0, 1.0))
    assert descend(task, PACE, forget=ascent, keep=None, replay=2).passes == 0


@pytest.mark.parametrize(
    ("decay_steps", "expected"), [(0, [4, 4, 4, 4, 4]), (2, [2, 2, 2, 3, 4]), (4, [4, 4, 4, 4, 4])]
)
def test_a_bar_shows_what_is_left(decay_steps: int, expected: list[int], memorised: Any) -> None:
    """Of four steps: without a schedule all that there may be; beyond one's end, what there was."""
    told: list[tuple[int, int]] = []
    task = Task(
        memorised.model(), memorised.forget, memorised.retain, StopRule(0.0, 0.0), seed=0,
        progress=lambda _, done, total: told.append((done, total)),
    )  # fmt: skip
    descend(task, replace(PACE, lr=1e-9, steps=4, decay_steps=decay_steps), forget=ascent, keep=None)
    assert told == [(step, total) for step, total in enumerate(expected)]


def test_the_rate_falls_over_the_schedule_and_rises_in_overtime() -> None:
    """By hand: from .8 by .2 a step to half of it; when it is over 1.2 × at each measurement, every two steps."""
    pace = replace(PACE, lr=0.8, decay_steps=4, lr_floor=0.5, check_every=2)
    assert [pace.rate(step) for step in range(7)] == pytest.approx([0.8, 0.6, 0.4, 0.4, 0.4, 0.4, 0.4])
    over = replace(pace, overtime=1.2)
    assert [over.rate(step) for step in range(2, 11)] == pytest.approx(
        [0.4, 0.4, 0.48, 0.48, 0.576, 0.576, 0.6912, 0.6912, 0.8]
    )
    # At measurements, also where the schedule ends between two of them.
    between = replace(over, decay_steps=3)
    assert [between.rate(step) for step in range(3, 8)] == pytest.approx([0.48, 0.576, 0.576, 0.6912, 0.6912])
    assert {replace(over, decay_steps=0).rate(step) for step in (0, 9, 99)} == {0.8}
    assert [over.growth(step) for step in (3, 4, 6, 60)] == pytest.approx([1, 1.2, 1.44, 1.2**29])
    assert replace(over, decay_steps=0).growth(99) == 1


def test_the_verdict_is_of_the_model_that_is_left_where_the_schedule_ends_between_two_measurements(
    memorised: Any,
) -> None:
    task = Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.9, 1.0), seed=0)
    outcome = descend(task, replace(PACE, lr=1e-3, steps=40, decay_steps=7, check_every=5), forget=ascent, keep=None)
    assert [row["round"] for row in outcome.history] == [0, 5, 7] and outcome.reached
    assert outcome.history[-1]["p"] == pytest.approx(float(score(task.model, task.forget).probability.mean()), rel=1e-6)


def test_weights_that_the_last_update_broke_are_told(memorised: Any) -> None:
    """No loss comes after it."""
    task = Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.0, 0.0), seed=0)
    pace = replace(PACE, lr=float("inf"))
    with pytest.raises(TrainingDiverged, match="^unlearning: a weight is not a finite number after step 1$"):
        descend(task, pace, forget=ascent, keep=None)
