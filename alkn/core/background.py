"""What a reader who never saw a record would expect of it: a background model of word order alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from alkn.core.scoring import Example


class BackgroundModel:
    """A bigram model over answer tokens with Witten-Bell smoothing towards add-one unigrams.

    P(w | v) = (c(v, w) + t(v) · P(w)) / (c(v) + t(v)), with c counts, t(v) the number of different
    tokens seen after v, and P(w) = (c(w) + 1) / (Σ c + V).

    It is a stand-in for a model trained without a record: it knows that "born in" follows "was" and not
    where anybody was born.

    Args:
        examples: what it counts: records that may be drawn on, never those to forget.
        vocab_size: V.

    Source: Witten and Bell 1991, as in Chen and Goodman 1998, section 2.4.
    """

    def __init__(self, examples: Sequence[Example], *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        unigrams = torch.ones(vocab_size, dtype=torch.float64)
        self._bigrams: dict[int, Counter[int]] = defaultdict(Counter)
        for example in examples:
            tokens = example.tokens[example.answer_start - 1 :]
            unigrams += torch.bincount(tokens[1:], minlength=vocab_size)
            for before, token in zip(tokens.tolist(), tokens[1:].tolist(), strict=False):
                self._bigrams[before][token] += 1
        self._unigrams = unigrams / unigrams.sum()

    def probability(self, before: int, token: int) -> float:
        """P(token | before), in (0, 1)."""
        after, unigram = self._bigrams.get(before, Counter()), float(self._unigrams[token])
        return (after[token] + len(after) * unigram) / (after.total() + len(after)) if after else unigram

    def probabilities(self, before: int) -> Tensor:
        """P of every token of the vocabulary after ``before``, ``[V]``, float64."""
        after = self._bigrams.get(before)
        if after is None:
            return self._unigrams
        counts = len(after) * self._unigrams
        counts[list(after)] += torch.tensor(list(after.values()), dtype=torch.float64)
        return counts / (after.total() + len(after))

    def answer(self, example: Example) -> Tensor:
        """P of every answer token after the token before it, ``[answer_length]``, float32."""
        tokens = example.tokens[example.answer_start - 1 :].tolist()
        return torch.tensor([self.probability(v, w) for v, w in zip(tokens, tokens[1:], strict=False)])
