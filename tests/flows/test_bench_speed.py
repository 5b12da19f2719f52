"""What ``make bench-speed`` compares: the slow loop's result, the records' lengths, the count of bytes. No times."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alkn.core.scoring import mean_gradient, score
from alkn.core.soft_labels import entropic_weights
from alkn.core.training import Hyperparameters
from alkn.core.unlearning import StopRule, Task
from flows.bench_memory import peak_of
from flows.bench_reference import dense_loss, full_logits, padded, padded_job, retain_gradient, token_weights
from flows.bench_speed import ANSWER_TOKENS, PROMPT_TOKENS, our_job, records

HP = Hyperparameters(lr=1e-3, epochs=2, batch_size=4, clip=1.0)


def task_of(memorised: Any) -> Task:
    return Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.0, 0.0), seed=0)


def test_the_slow_loop_has_the_same_result(memorised: Any) -> None:
    """Preparation and four steps, padded to 20: weights equal up to rounding, and away from the start."""
    ours, slow = task_of(memorised), task_of(memorised)
    our_job(ours, HP, 10.0)
    padded_job(slow, HP, k=10.0, length=20)
    start = task_of(memorised).weights()
    moved = max(float((w - start[n]).abs().max()) for n, w in ours.weights().items())
    differences = torch.cat([(w - slow.weights()[n]).abs().reshape(-1) for n, w in ours.weights().items()])
    assert moved > 1e-3
    # AdamW divides by the root of its second moment: an entry whose gradient is all rounding may go elsewhere.
    assert float(differences.quantile(0.99)) < 1e-2 * moved


def test_the_slow_parts_have_the_same_values(memorised: Any) -> None:
    """Soft labels at labelled positions, G_r, and the loss by hand."""
    model = memorised.model()
    dense = token_weights(model, memorised.forget, HP, 10.0, 20)
    for i, probs in enumerate(score(model, memorised.forget).token_probs):
        start = memorised.forget[i].answer_start - 1
        expected = entropic_weights(probs, form="reference", scale=10.0, midpoint=0.8)
        torch.testing.assert_close(dense[i, start : start + probs.numel()], expected, rtol=1e-4, atol=1e-5)
    fast = mean_gradient(model, memorised.retain, range(12))
    for name, g in retain_gradient(model, memorised.retain, HP, 20).items():
        torch.testing.assert_close(g, fast[name], rtol=1e-3, atol=1e-6)
    ids, labels, seen = padded(memorised.forget, range(6), 20)
    logits = 0.1 * full_logits(model, ids, seen).detach()  # flat, so that no loss is lost in rounding
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    wanted = labels[:, 1:] != -100
    by_hand = float((nll * dense)[wanted].double().sum()) / int(wanted.sum())
    assert float(dense_loss(logits, labels, dense)) == pytest.approx(by_hand, rel=1e-4)


def test_records_have_the_lengths_of_tofu() -> None:
    """Means of the 400 forget records: 85.0 tokens, 55.8 of them the answer."""
    drawn = records(4000, 2048, seed=0)
    answers = np.array([e.answer_length for e in drawn])
    whole = np.array([e.tokens.numel() for e in drawn])
    assert answers.min() >= ANSWER_TOKENS[0] and answers.max() <= ANSWER_TOKENS[-1]
    assert (whole - answers).min() >= PROMPT_TOKENS[0]
    assert answers.mean() == pytest.approx(55.8, abs=1.5) and whole.mean() == pytest.approx(85.0, abs=2.0)
    again = records(4000, 2048, seed=0)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(drawn, again, strict=True))


def test_peak_by_hand() -> None:
    """1,000 and 500 floats, the first freed before 600 more: 6,000 bytes at the most."""
    outside = torch.zeros(10_000)

    def work() -> None:
        a = torch.zeros(1000)
        b = torch.zeros(500)
        del a
        c = torch.zeros(600)
        assert b.numel() + c.numel() == 1100 and copy.copy(outside) is not None

    assert peak_of(work) == 6000
