"""IDK: learn to answer the forget records' prompts with a refusal."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from alkn.core.descent import descend, retain_term
from alkn.core.refused import refused_examples
from alkn.core.scoring import Batch, collate
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class IdkParams(DescentParams):
    """Settings of the baseline.

    Attributes:
        retain_weight: factor on the retain loss.
    """

    retain_weight: float = Field(1.0, ge=0)


@register_method("idk", params=IdkParams, source="TOFU (Maini et al. 2024), preference optimization")
def idk(task: Task, params: IdkParams) -> Outcome:
    """L = CE(refusals after the forget prompts) + retain_weight · CE(retain).

    Nothing here speaks of the record's answer: it gets improbable only so far as the refusal crowds it
    out, at its first tokens above all, so the stop rule may stay out of reach.
    """
    refused, likelihood = refused_examples(task), answer_loss()

    def refusal(model: nn.Module, batch: Batch) -> Tensor:
        return likelihood(model, collate(refused, batch.records, device=batch.input_ids.device))

    pace = params.pace()
    return descend(task, pace, forget=refusal, keep=retain_term(task, likelihood, pace, weight=params.retain_weight))
