"""Knowledge memorization: does the model answer questions about it?"""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.probe import NOT_WRITTEN, Probe
from alkn.registry import Params, register_metric

STOPS = ("\n\n", "\nQuestion", "Question:")
"""Where a model begins to ask itself the next question, as in MUSE's code."""


@register_metric("knowmem", source="MUSE (Shi et al. 2024), section 3.1 (C2) and its code")
def knowmem(probe: Probe, params: Params) -> Measured:
    """Mean ROUGE-L F1 of the greedy answers, unstemmed, in [0, 1]; part ``recall``: the mean recall.

    Against MUSE's code: no examples are put before the question, and answers are ``evaluation.max_new_tokens`` long.
    """
    answers = probe.generations
    if answers is None:
        return Measured.missing(NOT_WRITTEN)
    if any(example.answer_start == 1 for example in probe.records.examples):
        return Measured.missing("plain text asks no question")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = [
        scorer.score(reference, before_stop(answer))["rougeL"]
        for reference, answer in zip(probe.records.references, answers, strict=True)
    ]
    recall = Measured.mean(probe.records.ids, [one.recall for one in scores])
    return Measured.mean(probe.records.ids, [one.fmeasure for one in scores]).with_parts(recall=recall)


def before_stop(answer: str) -> str:
    """The answer up to the first of :data:`STOPS`."""
    return answer[: min([at for stop in STOPS if (at := answer.find(stop)) >= 0], default=len(answer))]
