"""Gibberish: is what the model says instead still language?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from alkn.core.background import BackgroundModel
from alkn.core.limits import vocabulary_of
from alkn.core.measured import Measured
from alkn.core.probe import NOT_WRITTEN
from alkn.core.view import View
from alkn.registry import Params, register_metric


@register_metric("gibberish", source="own", scope="model")
def gibberish(view: View, params: Params) -> Measured:
    """Mean −log of a bigram model of the retain answers, over each greedy answer on the forget set, nats a token, ≥ 0.

    The bigram model knows which words follow which and no facts. The part ``right`` is the same of the right answers:
    language of this kind is near it, gibberish far above it. Answers of no token are left out; ``repetition_empty``
    counts them.
    """
    probe = view.probes.get("forget")
    if probe is None:
        return Measured.missing("there is no forget set")
    if probe.written is None:
        return Measured.missing(NOT_WRITTEN)
    kept = [e for name, one in view.probes.items() if name.startswith("retain/") for e in one.records.examples]
    if not kept:
        return Measured.missing("there is no retain set to learn the background from")
    background = BackgroundModel(kept, vocab_size=vocabulary_of(probe.model))
    examples = probe.records.examples
    ids = probe.records.ids
    told = [
        (number, surprise(background, int(e.tokens[e.answer_start - 1]), answer))
        for number, e, answer in zip(ids, examples, probe.written, strict=True)
        if answer
    ]
    if not told:
        return Measured.missing("every answer is empty")
    right = [
        surprise(background, int(e.tokens[e.answer_start - 1]), e.tokens[e.answer_start : -1].tolist())
        for e in examples
    ]
    return Measured.mean([number for number, _ in told], [value for _, value in told]).with_parts(
        right=Measured.mean(ids, right)
    )


def surprise(background: BackgroundModel, before: int, tokens: Sequence[int]) -> float:
    """Mean −log P of each token after the one before it; 0 of no token."""
    previous = [before, *tokens[:-1]]
    losses = [-math.log(background.probability(v, w)) for v, w in zip(previous, tokens, strict=True)]
    return math.fsum(losses) / len(losses) if losses else 0.0
