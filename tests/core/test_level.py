"""The level: how sure a model is, against full forwards and sums over the vocabulary; the odds and their lowering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, logit

from alkn.core.background import BackgroundModel
from alkn.core.level import SAMPLE, Level, Sureness
from alkn.core.unlearning import Forgetting, StopRule

V = 300
TARGET = StopRule(0.01, 0.1)


def test_sureness_against_numpy(memorised: Any, full_forward: Any) -> None:
    """Word by word: the log-odds of every word at every place, weighted by how often it stands in the answers."""
    background = BackgroundModel(memorised.retain, vocab_size=V)
    model, examples = memorised.model(), memorised.retain
    answers = [w for e in examples for w in e.tokens[e.answer_start :].tolist()]
    share = np.bincount(answers, minlength=V) / len(answers)
    own, drawn, expected = [], [], []
    for example in examples:
        with torch.no_grad():
            log_p = log_softmax(full_forward(model, example)[1].double().numpy(), axis=1)
        odds = log_p - np.log(-np.expm1(log_p))
        for place, word in enumerate(example.tokens[example.answer_start :].tolist()):
            before = int(example.tokens[example.answer_start + place - 1])
            own.append(odds[place, word])
            drawn.append(sum(share[w] * odds[place, w] for w in range(V)))
            expected.append(sum(share[w] * logit(background.probability(before, w)) for w in range(V)))
    found = Sureness.of(model, examples, background)
    assert found.scale == pytest.approx(np.mean(drawn) / np.mean(expected), rel=1e-3) and found.scale > 1
    assert found.highest == pytest.approx(np.mean(own), rel=1e-3) and found.highest > 0


def test_sureness_of_a_model_that_says_what_the_background_says(make_model: Any, make_examples: Any) -> None:
    """Where both expect every word alike κ is 1, and no word is surer than 1 of V."""
    model, examples = make_model("llama"), make_examples(4)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = Sureness.of(model, examples, BackgroundModel([], vocab_size=V))
    assert (found.scale, found.highest) == pytest.approx((1.0, float(logit(1 / V))), rel=1e-5)


def test_sureness_reads_no_more_than_it_needs(make_model: Any, make_examples: Any) -> None:
    """Of a large set every so many-th record."""
    model, few = make_model("llama", std=0.5), make_examples(3)
    background = BackgroundModel(few, vocab_size=V)
    many = [few[0], few[1]] * SAMPLE
    assert Sureness.of(model, many, background) == Sureness.of(model, [few[0]] * SAMPLE, background)


def test_odds_are_the_backgrounds_spread_by_the_scale(memorised: Any) -> None:
    """κ · (logit P + shift), and never surer than the model is of what it was trained on."""
    background = BackgroundModel(memorised.retain, vocab_size=V)
    level = Level(background, memorised.forget, Sureness(3.0, 1.5), shift=2.0)
    for odds, example in zip(level.odds, memorised.forget, strict=True):
        tokens = example.tokens[example.answer_start - 1 :].tolist()
        expected = [3 * (logit(background.probability(v, w)) + 2) for v, w in zip(tokens, tokens[1:], strict=False)]
        assert odds.tolist() == pytest.approx(np.minimum(expected, 1.5), abs=1e-4)


def test_what_is_below_even_odds_lies_lower_by_the_gap(memorised: Any) -> None:
    """κ · gap lower, and what lies above stays."""
    background, sureness = BackgroundModel(memorised.retain, vocab_size=V), Sureness(3.0, 1.5)
    plain, lower = (Level(background, memorised.forget, sureness, shift=5.0, gap=gap) for gap in (0.0, 0.7))
    before, after = torch.cat(plain.odds), torch.cat(lower.odds)
    assert 0 < int((before < 0).sum()) < len(before)
    torch.testing.assert_close(after, torch.where(before < 0, before - 2.1, before))


def test_what_the_level_says(memorised: Any) -> None:
    """Log-odds of −2 everywhere: P is their probability, and nothing is the first choice."""
    level = Level(
        BackgroundModel([], vocab_size=V), memorised.forget, Sureness(1e-9, 5.0), shift=-2e9
    )  # fmt: skip
    assert level.said().p == pytest.approx(expit(-2.0), rel=1e-4) and level.said().exact_memorization == 0


@pytest.mark.parametrize(
    ("now", "change"),
    [
        (Forgetting(0.01, 0.1), (0.0, 0.0)),
        (Forgetting(0.02, 0.1), (0.0, -0.3)),
        (Forgetting(0.001, 0.2), (-0.3, -0.3)),
        (Forgetting(0.02, 0.2), (-0.3, -0.3)),
    ],
)
def test_lowering(now: Forgetting, change: tuple[float, float], memorised: Any) -> None:
    """At the target nothing; P missed: what is negative; exact memorization missed: everything."""
    background = BackgroundModel(memorised.retain, vocab_size=V)
    level = Level(background, memorised.forget, Sureness(2.0, 4.0), shift=4.0)
    before = torch.cat(level.odds)
    assert before.min() < 0 < before.max()
    assert level.lower(now, TARGET, by=0.3) == (change != (0.0, 0.0))
    expected = torch.where(before < 0, before + change[1], before + change[0])
    torch.testing.assert_close(torch.cat(level.odds), expected)


def test_records_that_are_guessed_whole_do_not_hold_the_level_above_the_target(memorised: Any) -> None:
    """One of 20 answers that anybody guesses: exact memorization .05 is met, P .048 is not, and lowering ends."""
    target, examples = StopRule(0.008, 0.104), (list(memorised.forget) * 4)[:20]
    level = Level(BackgroundModel([], vocab_size=V), examples, Sureness(1.0, 5.0), shift=0.0)
    level.odds = [torch.full((9,), 3.0 if i == 0 else -4.0) for i in range(20)]
    lowered = 0
    while level.lower(level.said(), target, by=0.1):
        lowered += 1
        assert lowered < 1000, "it ends"
    said = level.said()
    assert lowered > 0 and said.p <= target.p and said.exact_memorization <= target.exact_memorization
    assert bool((level.odds[0] < 0.0).all())
    # Where nothing is guessed whole, what lies below even odds pays alone.
    lone = Level(BackgroundModel([], vocab_size=V), examples, Sureness(1.0, 5.0), shift=0.0)
    lone.odds = [torch.tensor([-1.0, 2.0]) for _ in examples]
    lone.lower(Forgetting(0.02, 0.1), target, by=0.1)
    assert lone.odds[0].tolist() == pytest.approx([-1.1, 2.0])
