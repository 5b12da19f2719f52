"""Truth ratio of each record: how probable wrong answers of the same form are beside the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from alkn.core.probe import RecordSet
from alkn.core.scoring import score

Mean = Literal["geometric", "arithmetic"]
Form = Literal["ratio", "bounded"]


@dataclass(frozen=True)
class TruthRatios:
    """Truth ratios of one set under one model.

    Attributes:
        per_record: record number -> truth ratio.
        left_out: record number -> why it has none.
    """

    per_record: Mapping[int, float]
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        """The ratios in the records' order."""
        return list(self.per_record.values())


def ratio_of_nll(right: Tensor, wrong: Sequence[Tensor], *, mean: Mean = "geometric", form: Form = "ratio") -> Tensor:
    """Truth ratios from mean token NLLs, ``[records]``, float64.

    Args:
        right: NLL of the (paraphrased) right answer, mean over its tokens, ``[records]``, nats.
        wrong: a record each: NLL of every wrong answer, ``[wrong answers]``, nats.
        mean: over the wrong answers' probabilities. ``geometric``, the mean of their NLLs, is what TOFU's forget
            quality and OpenUnlearning compute; ``arithmetic`` is the paper's formula, and what TOFU's aggregation
            of its truth-ratio score computes.
        form: ``ratio`` is R = P(wrong) / P(right) in (0, ∞); ``bounded`` is P(right) / (P(right) + P(wrong))
            = 1 / (1 + R) in (0, 1), OpenUnlearning's ``prob_mean``.

    Source: TOFU (Maini et al. 2024), equation 1.
    """
    if mean == "geometric":
        log_wrong = torch.stack([-nll.double().mean() for nll in wrong])
    else:
        log_wrong = torch.stack([torch.logsumexp(-nll.double(), 0) - torch.tensor(nll.numel()).log() for nll in wrong])
    log_ratio = log_wrong + right.double()
    return torch.exp(log_ratio) if form == "ratio" else torch.sigmoid(-log_ratio)


def truth_ratios(
    model: nn.Module, records: RecordSet, *, mean: Mean = "geometric", form: Form = "ratio"
) -> TruthRatios:
    """The truth ratio of every record that has a paraphrased right answer and wrong answers.

    Args:
        model: a causal language model on its device.
        records: encoded with the model's own tokenizer.
        mean: see :func:`ratio_of_nll`.
        form: see :func:`ratio_of_nll`.
    """
    right, wrong, numbers = [], [], []
    left_out: dict[int, str] = {}
    for number, paraphrase, others in zip(records.ids, records.paraphrases, records.wrong, strict=True):
        if paraphrase is None:
            left_out[number] = "no paraphrased_answer"
        elif not others:
            left_out[number] = "no perturbed_answer"
        else:
            numbers.append(number)
            right.append(paraphrase)
            wrong.append(others)
    if not numbers:
        return TruthRatios({}, left_out)
    right_nll = score(model, right).nll
    wrong_nll = score(model, [example for group in wrong for example in group]).nll
    ratios = ratio_of_nll(right_nll, wrong_nll.split([len(group) for group in wrong]), mean=mean, form=form)
    return TruthRatios(dict(zip(numbers, ratios.tolist(), strict=True)), left_out)
