"""SKU: its records, its loss and its negation by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from baseline_cases import Finished, call
from method_cases import CPU, NEVER, changes, p_of, task_of
from randomness import seeded
from scipy.special import log_softmax
from torch import nn

from alkn.core.scoring import Example, collate
from alkn.errors import InputError
from alkn.methods.sku import Acquisition, SkuParams


def test_mismatched_records(memorised: Any) -> None:
    """Each record's prompt with another one's answer, never its own; a step draws what it draws."""
    task = task_of(memorised)
    acquisition = Acquisition(task, SkuParams(answers=40))
    found = acquisition.mismatched((4, 0))
    assert len(found) == 80
    answers = [tuple(e.tokens[e.answer_start :].tolist()) for e in memorised.forget]
    for number, example in enumerate(found):
        record = (4, 0)[number // 40]
        prompt = memorised.forget[record].tokens[: memorised.forget[record].answer_start]
        assert torch.equal(example.tokens[: example.answer_start], prompt)
    for record, part in ((4, found[:40]), (0, found[40:])):
        drawn = {answers.index(tuple(e.tokens[e.answer_start :].tolist())) for e in part}
        assert drawn == set(range(6)) - {record}
    again = acquisition.mismatched((4, 0))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, again, strict=True))


def test_a_mismatched_record_fits_into_the_context(memorised: Any) -> None:
    """A long prompt and a long answer of two records that each fit."""
    long_prompt = Example(torch.arange(1, 64), 62)
    long_answer = Example(torch.arange(100, 163), 1)
    task = task_of(memorised, forget=[long_prompt, long_answer])
    (example,) = Acquisition(task, SkuParams(answers=1)).mismatched((0,))
    assert example.tokens.tolist() == [*range(1, 63), 101, 102] and example.answer_start == 62


def test_the_loss_of_the_acquisition_by_hand(memorised: Any, make_model: Any, full_forward: Any) -> None:
    """0.5 · CE(forget) + 2 · CE(mismatched) − 3 · KL(θ_{t-1} ‖ θ) on retain records, with numpy's logarithms."""
    task = task_of(memorised)
    params = SkuParams(guided_weight=0.5, random_weight=2.0, preservation_weight=3.0, answers=2, retain_batch=4)
    acquisition = Acquisition(task, params)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(p.numel())), alpha=0.05)
    shuffled = acquisition.mismatched((1, 2, 5))
    picks = torch.randint(12, (4,), generator=task.generator("preservation", 0)).tolist()

    def nll(model: nn.Module, records: Sequence[Example]) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([full_forward(model, e)[0] for e in records]).double().numpy()

    def log_pi(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            rows = torch.cat([full_forward(model, memorised.retain[i])[1] for i in picks]).double().numpy()
        return np.asarray(log_softmax(rows, axis=-1))

    before, now = log_pi(memorised.trained), log_pi(task.model)
    divergence = (np.exp(before) * (before - now)).sum(-1).mean()
    forget = nll(task.model, [memorised.forget[i] for i in (1, 2, 5)]).mean()
    expected = 0.5 * forget + 2.0 * nll(task.model, shuffled).mean() - 3.0 * divergence
    found = acquisition(task.model, collate(memorised.forget, (1, 2, 5), device=CPU))
    assert divergence > 0.01 and found.item() == pytest.approx(expected, rel=1e-4)
    assert acquisition.passes == 3 + 6 + 4


def test_sku_subtracts_what_it_learnt(memorised: Any) -> None:
    """A fixed λ of 2 is the vector of λ = 1 doubled, from the same θ_{t-1}; and the calibrated one is the smallest."""
    taken = {}
    for scale in (1.0, 2.0):
        task = task_of(memorised, stop=NEVER)
        outcome = call("sku", task, scale=scale, epochs=3)
        assert outcome.history[1]["scale"] == scale
        taken[scale] = changes(task, memorised)
    for name, change in taken[1.0].items():
        torch.testing.assert_close(taken[2.0][name], 2 * change, rtol=1e-3, atol=1e-6)
    assert p_of(memorised.trained, memorised.forget) > 0.9


def test_raising_the_divergence_keeps_more_of_the_retain_set(memorised: Any, finished: Finished) -> None:
    """At equal forgetting: with the third part the vector holds, negated, what the retain records need."""
    without_it = task_of(memorised)
    assert call("sku", without_it, preservation_weight=0.0).reached
    kept = p_of(finished("sku")[0].model, memorised.retain)
    assert kept > 1.2 * p_of(without_it.model, memorised.retain)


def test_one_record_has_no_other_answer(memorised: Any) -> None:
    task = task_of(memorised, forget=memorised.forget[:1])
    with pytest.raises(InputError, match=r"method\.random_weight: .*0 switches the disassociation off"):
        call("sku", task)
    assert call("sku", task, random_weight=0.0).reached
