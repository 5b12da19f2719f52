"""The background model: Witten-Bell by hand, a distribution, and nothing of what it was not given."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from alkn.core.background import BackgroundModel
from alkn.core.scoring import Example

V = 6
EXAMPLES = [Example(torch.tensor([0, 1, 2, 3]), 1), Example(torch.tensor([5, 5, 1, 2, 2]), 2)]
"""Answers 1 2 3 after 0, and 1 2 2 after 5: bigrams 01, 12, 23, 51, 12, 22."""


def test_by_hand() -> None:
    """Unigram counts 1: 2, 2: 3, 3: 1 of 6; after 2 come 3 and 2 once each, after 1 twice 2."""
    model = BackgroundModel(EXAMPLES, vocab_size=V)
    unigram = {w: Fraction(c + 1, 6 + V) for w, c in {0: 0, 1: 2, 2: 3, 3: 1, 4: 0, 5: 0}.items()}
    assert model.probability(1, 2) == pytest.approx(float((2 + 1 * unigram[2]) / (2 + 1)))
    assert model.probability(2, 3) == pytest.approx(float((1 + 2 * unigram[3]) / (2 + 2)))
    assert model.probability(2, 4) == pytest.approx(float((0 + 2 * unigram[4]) / (2 + 2)))
    assert model.probability(4, 1) == pytest.approx(float(unigram[1]))
    found = model.answer(EXAMPLES[0])
    assert found.tolist() == pytest.approx([model.probability(0, 1), model.probability(1, 2), model.probability(2, 3)])


def test_it_is_a_distribution() -> None:
    """Also after a token that was never seen, and with no example at all."""
    for model in (BackgroundModel(EXAMPLES, vocab_size=V), BackgroundModel([], vocab_size=V)):
        for before in range(V):
            chances = [model.probability(before, w) for w in range(V)]
            assert sum(chances) == pytest.approx(1.0) and min(chances) > 0
            assert model.probabilities(before).tolist() == pytest.approx(chances)


def test_prompts_are_not_counted() -> None:
    """Only answer tokens, each after the token before it: another prompt with the same end changes nothing."""
    other = [Example(torch.tensor([4, 3, 4, 0, 1, 2, 3]), 4), EXAMPLES[1]]
    one, two = BackgroundModel(EXAMPLES, vocab_size=V), BackgroundModel(other, vocab_size=V)
    assert all(one.probability(v, w) == two.probability(v, w) for v in range(V) for w in range(V))
