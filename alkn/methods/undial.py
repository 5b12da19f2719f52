"""UNDIAL: distil the parent with the answer's own tokens turned down."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from alkn.core.descent import descend, retain_term
from alkn.core.scoring import Batch, answer_logits
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class UndialParams(DescentParams):
    """Settings of the baseline; strength and weight are OpenUnlearning's.

    Attributes:
        strength: what is taken off the target token's logit in the teacher.
        retain_weight: factor on the retain loss; 0, as in the paper, for none.
    """

    strength: float = Field(10.0, gt=0)
    retain_weight: float = Field(0.0, ge=0)


@register_method("undial", params=UndialParams, source="Dong et al. 2024, UNDIAL")
def undial(task: Task, params: UndialParams) -> Outcome:
    """L = cross-entropy against softmax(logits of θ_{t-1} − strength at the target) + retain_weight · CE(retain).

    The teacher does not move, so a target token's log-odds end ``strength`` below those of θ_{t-1} and
    no lower: a stop rule below that level is met only with a larger strength.
    """
    teacher = task.teacher()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            before = answer_logits(teacher, batch)
        return lowered_loss(answer_logits(model, batch), before, batch.targets, strength=params.strength)

    pace = params.pace()
    return descend(task, pace, forget=loss, keep=retain_term(task, answer_loss(), pace, weight=params.retain_weight))


def lowered_loss(logits: Tensor, teacher: Tensor, targets: Tensor, *, strength: float) -> Tensor:
    """Mean over answer tokens of the cross-entropy against the lowered teacher, 0-d, in nats.

    Args:
        logits: the student's, ``[labels, vocab]``.
        teacher: the teacher's, ``[labels, vocab]``, without a graph.
        targets: the tokens to lower, ``[labels]``, int64.
        strength: by how much.
    """
    wide, index = teacher.float(), targets.unsqueeze(1)
    lowered = wide.scatter(1, index, wide.gather(1, index) - strength)
    return nn.functional.cross_entropy(logits.float(), torch.softmax(lowered, dim=-1))
