"""Membership scores next to scikit-learn, numpy, and every token's distribution computed one record at a time."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from alkn.core.privacy import (
    auc,
    gradient_norms,
    lowest_share,
    separation,
    standardized_log_probs,
    zlib_score,
)
from alkn.core.scoring import score


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("members", "others"), [(1, 1), (5, 3), (40, 70)])
def test_auc_against_scikit_learn(members: int, others: int, ties: bool) -> None:
    generator = np.random.default_rng(members + others)
    a, b = generator.normal(0.5, 1, members), generator.normal(0, 1, others)
    if ties:
        a, b = a.round(), b.round()
    expected = roc_auc_score([1] * members + [0] * others, np.concatenate([a, b]))
    assert auc(a.tolist(), b.tolist()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("members", "others", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0], [1.0, 2.0], 0.0),
        ([1.0, 1.0], [1.0], 0.5),
        ([1.0, 3.0], [2.0, 1.0], 0.625),
    ],
)
def test_auc_by_hand(members: list[float], others: list[float], expected: float) -> None:
    """The last: 1 < 2 loses, 1 = 1 is half, 3 wins twice: 2.5 of 4."""
    assert auc(members, others) == expected


def test_the_interval_is_the_plain_bootstraps() -> None:
    """The same draws, sample by sample through scikit-learn; blocks of few members give the same."""
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.7, 1, 12).round(1), generator.normal(0, 1, 9).round(1)
    found = separation(dict(enumerate(a.tolist())), dict(enumerate(b.tolist())), samples=200, confidence=0.9, seed=5)
    draws = torch.Generator().manual_seed(5)
    rows = torch.randint(12, (200, 12), generator=draws).numpy()
    columns = torch.randint(9, (200, 9), generator=draws).numpy()
    labels = [1] * 12 + [0] * 9
    values = [roc_auc_score(labels, np.concatenate([a[i], b[j]])) for i, j in zip(rows, columns, strict=True)]
    assert found.low == pytest.approx(np.quantile(values, 0.05), abs=1e-12)
    assert found.high == pytest.approx(np.quantile(values, 0.95), abs=1e-12)
    assert found.auc == pytest.approx(roc_auc_score(labels, np.concatenate([a, b])), abs=1e-12)


def test_the_interval_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ({i: float((i * 7 + k) % 11) for i in range(20)} for k in (3, 0))
    whole = separation(a, b)
    monkeypatch.setattr("alkn.core.privacy.BLOCK", 60)
    assert separation(a, b) == whole


def test_the_interval_holds_the_truth() -> None:
    """In 200 draws of 30 and 40 normal scores, the nominal 90 % interval holds Φ(1/√2) about that often."""
    truth = 0.5 * (1 + math.erf(1 / 2))
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        a, b = generator.normal(1, 1, 30), generator.normal(0, 1, 40)
        found = separation(dict(enumerate(a)), dict(enumerate(b)), samples=300, confidence=0.9)
        held += found.low <= truth <= found.high
    assert 0.82 <= held / 200 <= 0.97


@pytest.mark.parametrize(("share", "expected"), [(0.2, -5.0), (0.4, -4.5), (0.59, -4.5), (1.0, -3.0), (0.01, -5.0)])
def test_lowest_share_by_hand(share: float, expected: float) -> None:
    """Of five tokens: int(5 · share) of them, at least one."""
    assert lowest_share(torch.tensor([-1.0, -5.0, -3.0, -2.0, -4.0]), share) == expected


def test_zlib_score_by_hand() -> None:
    text = "the same the same the same the same"
    logs = torch.tensor([-1.0, -0.5, -2.5])
    assert zlib_score(logs, text) == pytest.approx(-4.0 / len(zlib.compress(text.encode("utf-8"))), rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_standardized_log_probs_token_by_token(make_model: Any, make_examples: Any, kind: str) -> None:
    """Mean and deviation of log π over the whole vocabulary, for one token of one record after another, in float64."""
    model, examples = make_model(kind, std=0.5), make_examples(7, seed=1)
    found = standardized_log_probs(model, examples, max_tokens=40)
    for example, values in zip(examples, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=example.tokens[None]).logits[0].double()
        for i, position in enumerate(range(example.answer_start, example.tokens.numel())):
            p = np.exp(logits[position - 1].numpy() - np.logaddexp.reduce(logits[position - 1].numpy()))
            logs = np.log(p)
            mean = float((p * logs).sum())
            deviation = math.sqrt(float((p * (logs - mean) ** 2).sum()))
            expected = (logs[int(example.tokens[position])] - mean) / deviation
            assert float(values[i]) == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_log_probs_beside_probabilities(make_model: Any, make_examples: Any) -> None:
    """log π does not end where π does: π of an answer may be too small for single precision."""
    model, examples = make_model("llama", std=0.3), make_examples(5)
    scores = score(model, examples)
    for logs, probs, nll in zip(scores.token_log_probs, scores.token_probs, scores.nll, strict=True):
        assert torch.allclose(logs.exp(), probs) and float(-logs.double().mean()) == float(nll)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(300)
    extreme = score(model, examples)
    assert min(float(logs.min()) for logs in extreme.token_log_probs) < -110
    assert all(bool(torch.isfinite(logs).all()) for logs in extreme.token_log_probs)


def test_gradient_norms_against_autograd(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    model, examples = make_model("llama", std=0.3), make_examples(3)
    found = gradient_norms(model, examples)
    for example, value in zip(examples, found.tolist(), strict=True):
        gradients = torch.autograd.grad(full_forward(model, example)[0].mean(), list(model.parameters()))
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
        assert value == pytest.approx(-norm, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
