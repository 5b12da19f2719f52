"""ALKN in rounds: one by hand, what moves, what is kept, where it ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from alkn_cases import rounds_of
from method_cases import NEVER, STOP, changes, p_of, task_of
from scipy.special import expit

from alkn.core.scoring import mean_gradient, score
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.core.unlearning import Forgetting, StopRule
from alkn.methods.alkn import alkn


def test_one_round_by_hand(memorised: Any) -> None:
    """The pseudo-code of METHOD.md, put together from the core's functions with numpy's order statistics."""
    params = rounds_of(bisections=0)
    stop = StopRule(p=0.99, exact_memorization=1.0)
    task = task_of(memorised, stop=stop)
    model, theta = memorised.model(), task.copy_weights()
    picks = torch.randint(12, (9,), generator=task.generator("retain", 1)).tolist()
    g_r = mean_gradient(model, memorised.retain, picks)
    labels = [
        torch.tensor(np.minimum(1, expit(10 * (p.numpy() - 0.8)) - expit(-8))).float()
        for p in score(model, memorised.forget).token_probs
    ]
    fine_tune(
        model,
        memorised.forget,
        Hyperparameters(lr=5e-3, epochs=2, batch_size=32, clip=1.0),
        loss=answer_loss(labels),
        generator=task.generator("order", 1),
    )
    outcome = alkn(task, params)
    assert outcome.reached and [row["scale"] for row in outcome.history[1:]] == [2.0]
    assert outcome.passes == 9 + 2 * 6
    for name, p in model.named_parameters():
        tau = (p.detach() - theta[name]).numpy()
        ranking = (tau * g_r[name].numpy()).reshape(-1)
        eta = np.sort(ranking)[::-1][max(1, round(0.1 * ranking.size)) - 1]
        kept = np.where(ranking.reshape(tau.shape) >= eta, tau, 0)
        expected = theta[name].numpy() - 2 * kept
        np.testing.assert_allclose(task.weights()[name].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["exact", "m", "random", "magnitude"])
@pytest.mark.parametrize("share", [0.1, 0.02])
def test_a_round_moves_only_its_share(criterion: str, share: float, memorised: Any) -> None:
    """At most the share of each tensor differs from the start, and over the model something does."""
    start = p_of(memorised.trained, memorised.forget)
    task = task_of(memorised, stop=StopRule(p=start - 1e-9, exact_memorization=1.0))
    params = rounds_of(criterion=criterion, share=share, bisections=0)
    outcome = alkn(task, params)
    assert outcome.reached and len(outcome.history) == 2
    moved = {name: int(change.count_nonzero()) for name, change in changes(task, memorised).items()}
    for name, w in task.weights().items():
        assert moved[name] <= max(1, round(share * w.numel())), name
    assert sum(moved.values()) > 0.2 * share * 30_240


def test_exact_criterion_lowers_the_retain_loss_by_the_first_order_amount(memorised: Any) -> None:
    """Removing τ where τ · G_r is largest changes CE(D_r) by −λ · Σ τ · G_r, for a small λ; random masks do not."""
    start = p_of(memorised.trained, memorised.forget)
    fell = {}
    for criterion in ("exact", "random"):
        task = task_of(memorised, stop=StopRule(p=start - 1e-9, exact_memorization=1.0))
        before = float(score(task.model, memorised.retain).nll.mean())
        g_r = mean_gradient(task.model, memorised.retain, range(12))
        params = rounds_of(lr=1e-3, retain_gradient="full", scale_max=0.2, bisections=0, criterion=criterion)
        outcome = alkn(task, params)
        assert outcome.history[1]["scale"] == 0.2 and len(outcome.history) == 2
        predicted = sum(float((c * g_r[n]).sum()) for n, c in changes(task, memorised).items())
        fell[criterion] = float(score(task.model, memorised.retain).nll.mean()) - before
        assert fell[criterion] == pytest.approx(predicted, rel=0.15)
    assert fell["exact"] < 0 and fell["exact"] < 3 * fell["random"]


@pytest.mark.parametrize("criterion", ["exact", "m"])
def test_rounds_forget_and_keep_more_than_a_random_mask(criterion: str, memorised: Any, full_forward: Any) -> None:
    """Both targets are met, by a count of its own too; the retain set stays, with a random mask it does not."""
    task, random = task_of(memorised), task_of(memorised)
    outcome = alkn(task, rounds_of(criterion=criterion))
    beaten = alkn(random, rounds_of(criterion="random"))
    assert outcome.reached and beaten.reached
    with torch.no_grad():
        answers = [(e, *full_forward(task.model, e)) for e in memorised.forget]
    assert np.mean([math.exp(-nll.mean()) for _, nll, _ in answers]) <= STOP.p
    hits = [(logits.argmax(-1) == e.tokens[e.answer_start :]).float().mean() for e, _, logits in answers]
    assert np.mean(hits) <= STOP.exact_memorization
    assert p_of(task.model, memorised.retain) > 0.98
    assert p_of(random.model, memorised.retain) < 0.9


def test_repaired_rounds(memorised: Any) -> None:
    """Ten distilling steps of eight after each round, on retain and written records, still meet both targets."""
    task = task_of(memorised)
    outcome = alkn(task, rounds_of(rehearsal=16, repair_steps=10, repair_batch=8))
    assert outcome.reached and STOP.met(Forgetting.of(score(task.model, memorised.forget)))
    assert p_of(task.model, memorised.retain) > 0.9
    # Each round: two epochs of six records, nine for G_r and the repair; once: the records that were written.
    written = outcome.passes - (len(outcome.history) - 1) * (2 * 6 + 9 + 10 * 8)
    assert 0 < written <= 16


def test_a_sample_as_large_as_the_retain_set_is_the_retain_set(memorised: Any) -> None:
    """Drawing with replacement would only leave records out: the weights are those of ``full``, bit for bit."""
    runs = []
    for values in ({"retain_sample": 12}, {"retain_sample": 320}, {"retain_gradient": "full"}, {"retain_sample": 11}):
        task = task_of(memorised, stop=NEVER)
        outcome = alkn(task, rounds_of(steps=2, **values))
        runs.append((outcome.passes, task.copy_weights()))
    assert [passes for passes, _ in runs] == [2 * (12 + 12)] * 3 + [2 * (11 + 12)]
    same = [all(torch.equal(w, runs[0][1][n]) for n, w in weights.items()) for _, weights in runs]
    assert same == [True, True, True, False]


def test_history_of_rounds(memorised: Any) -> None:
    """Row 0 is the start, each later one a round, the last what the model is; λ is the smallest of its grid."""
    task = task_of(memorised)
    outcome = alkn(task, rounds_of())
    rows = outcome.history
    assert [row["round"] for row in rows] == list(range(len(rows)))
    assert set(rows[0]) == {"round", "p", "exact_memorization"} and set(rows[1]) == set(rows[0]) | {"scale"}
    assert rows[0]["p"] == p_of(memorised.trained, memorised.forget)
    now = Forgetting.of(score(task.model, memorised.forget))
    assert (rows[-1]["p"], rows[-1]["exact_memorization"]) == (now.p, now.exact_memorization)
    assert [row["scale"] for row in rows[1:-1]] == [2.0] * (len(rows) - 2)
    assert rows[-1]["scale"] in [2.0 * i / 32 for i in range(1, 33)]
    assert not any(STOP.met(Forgetting(row["p"], row["exact_memorization"])) for row in rows[:-1])
    assert outcome.passes == (len(rows) - 1) * (9 + 2 * 6)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_target_out_of_reach_is_reported(memorised: Any) -> None:
    """All rounds are used up, and the model is still made of finite numbers."""
    task = task_of(memorised, stop=NEVER)
    outcome = alkn(task, rounds_of(steps=3))
    assert not outcome.reached and len(outcome.history) == 4
    assert all(bool(torch.isfinite(w).all()) for w in task.weights().values())
