"""The loop that methods share: which records a step pushes, and by how much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alkn.core.descent import Pace, descend
from alkn.core.scoring import Batch, collate, score
from alkn.core.training import answer_loss
from alkn.core.unlearning import StopRule, Task

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


@pytest.mark.parametrize(("every", "batch_size", "taken"), [(3, 6, 2), (4, 6, 2), (1, 4, 4), (2, 2, 2), (50, 6, 1)])
def test_an_epoch_takes_at_least_as_long_as_a_measurement(
    every: int, batch_size: int, taken: int, memorised: Any
) -> None:
    """Six records that are known by heart: with three steps between measurements, two of them a step."""
    task = Task(memorised.model(), memorised.forget[:6], memorised.retain, StopRule(0.01, 0.1), seed=0)
    seen: list[tuple[int, ...]] = []

    def forget(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(tuple(batch.records))
        return 0.0 * ascent(model, batch)

    pace = replace(PACE, lr=1e-9, steps=12, check_every=every, batch_size=batch_size)
    descend(task, pace, forget=forget, keep=None, rest=True)
    assert [len(records) for records in seen] == [taken] * 12
    assert sorted(record for records in seen for record in records) == sorted([*range(6)] * 2 * taken)
