"""DPO: prefer a refusal to the record's answer, more than the parent does."""

from __future__ import annotations

import dataclasses

from pydantic import Field
from torch import Tensor, nn

from alkn.core.descent import descend, retain_term
from alkn.core.refused import refused_examples
from alkn.core.scoring import Batch, collate
from alkn.core.sequence_losses import answer_log_probs, preference_loss, reference_log_probs
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class DpoParams(DescentParams):
    """Settings of the baseline; β is TOFU's and the NPO paper's.

    Attributes:
        beta: β, inverse temperature.
        retain_weight: factor on the retain loss.
    """

    beta: float = Field(0.1, gt=0)
    retain_weight: float = Field(1.0, ge=0)


@register_method("dpo", params=DpoParams, source="Rafailov et al. 2023; as unlearning, TOFU and Zhang et al. 2024")
def dpo(task: Task, params: DpoParams) -> Outcome:
    """L = −(2/β) · mean log σ(β · (log ratio of the refusal − log ratio of the answer)) + retain_weight · CE(retain).

    A log ratio is log(π_θ / π_{t-1}) of a whole answer after the record's prompt.
    """
    pace = params.pace()
    loss = RefusalPreference(task, beta=params.beta)
    keep = retain_term(task, answer_loss(), pace, weight=params.retain_weight)
    outcome = descend(task, pace, forget=loss, keep=keep)
    return dataclasses.replace(outcome, passes=outcome.passes + loss.passes)


class RefusalPreference:
    """DPO's loss on a batch of forget records, refusals preferred.

    Args:
        task: the request; its model is the reference as it is now.
        beta: inverse temperature.

    Attributes:
        passes: record passes spent on the refusals, beside those on the records themselves.
    """

    def __init__(self, task: Task, *, beta: float) -> None:
        self._preferred, self._beta = refused_examples(task), beta
        self._before = reference_log_probs(task, self._preferred) - reference_log_probs(task, task.forget)
        self.passes = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss, 0-d."""
        records = list(batch.records)
        refusals = collate(self._preferred, records, device=batch.input_ids.device)
        self.passes += len(records)
        now = answer_log_probs(model, refusals) - answer_log_probs(model, batch)
        return preference_loss(now - self._before[records], beta=self._beta)
