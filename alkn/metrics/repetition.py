"""Repetition: does the model say the same again and again?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pydantic import Field

from alkn.core.measured import Measured
from alkn.core.probe import NOT_WRITTEN, Probe
from alkn.registry import Params, register_metric


class RepetitionParams(Params):
    """``n``: words, or tokens, a group."""

    n: int = Field(4, ge=1)


@register_metric(
    "repetition", params=RepetitionParams, source="Welleck et al. 2020, section 6.1; distinct: Li et al. 2016"
)
def repetition(probe: Probe, params: RepetitionParams) -> Measured:
    """Share of an answer's groups of n words that it has said before, in [0, 1]; of greedy answers.

    Parts: ``tokens``, the same of groups of n tokens, for who is stuck in a syllable says a single long word;
    ``distinct``, the different single words of all answers over all their words; and ``empty``, the share of answers
    without a word. An answer of fewer than n words repeats nothing.
    """
    answers, written = probe.generations, probe.written
    if answers is None or written is None:
        return Measured.missing(NOT_WRITTEN)
    words = [answer.lower().split() for answer in answers]
    said = [word for answer in words for word in answer]
    distinct = Measured(len(set(said)) / len(said)) if said else Measured.missing("the model says nothing on this set")
    empty = Measured.mean(probe.records.ids, [float(not answer) for answer in words])
    tokens = Measured.mean(probe.records.ids, [repeated(answer, params.n) for answer in written])
    return Measured.mean(probe.records.ids, [repeated(answer, params.n) for answer in words]).with_parts(
        tokens=tokens, distinct=distinct, empty=empty
    )


def repeated(words: Sequence[Hashable], n: int) -> float:
    """1 − (different groups of n words) / (all of them)."""
    groups = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0
