"""Verbatim memorization: does the model go on as the text does?"""

from __future__ import annotations

from pydantic import Field

from alkn.core.measured import Measured
from alkn.core.probe import NOT_WRITTEN, Probe
from alkn.registry import Params, register_metric


class VerbMemParams(Params):
    """How much of the text is given and how much of what follows is compared.

    Attributes:
        given: tokens of the answer (of plain text: of the chunk) that are given; at most half of it.
        max_new_tokens: longest continuation that is compared.
    """

    given: int = Field(32, ge=0)
    max_new_tokens: int = Field(128, ge=1)


@register_metric("verbmem", params=VerbMemParams, source="MUSE (Shi et al. 2024), section 3.1 (C1) and its code")
def verbmem(probe: Probe, params: VerbMemParams) -> Measured:
    """ROUGE-L F1 of the greedy continuation against the true one of at most as many tokens, unstemmed; in [0, 1]."""
    if not probe.writes:
        return Measured.missing(NOT_WRITTEN)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    cuts = [e.answer_start + min(params.given, (e.answer_length - 1) // 2) for e in probe.records.examples]
    pairs = list(zip(probe.records.examples, cuts, strict=True))
    truths = [probe.decode(e.tokens[cut:].tolist()[: params.max_new_tokens]) for e, cut in pairs]
    found = probe.write([e.tokens[:cut] for e, cut in pairs], max_new_tokens=params.max_new_tokens)
    return Measured.mean(
        probe.records.ids,
        [scorer.score(truth, probe.decode(ids))["rougeL"].fmeasure for truth, ids in zip(truths, found, strict=True)],
    )
