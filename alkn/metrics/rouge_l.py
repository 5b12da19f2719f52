"""ROUGE-L recall of what the model says when asked."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.probe import NOT_WRITTEN, Probe
from alkn.registry import Params, register_metric


@register_metric("rouge_l", source="Lin 2004; TOFU (Maini et al. 2024), section 2.2.1")
def rouge_l(probe: Probe, params: Params) -> Measured:
    """Longest common subsequence of words / words of the right answer, greedy answers, stemmed; in [0, 1]."""
    answers = probe.generations
    if answers is None:
        return Measured.missing(NOT_WRITTEN)
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import, and only generated answers need it

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(probe.records.references, answers, strict=True)
    return Measured.mean(
        probe.records.ids, [scorer.score(reference, answer)["rougeL"].recall for reference, answer in pairs]
    )
