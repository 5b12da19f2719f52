"""Gradient difference: climb the forget loss, descend the retain loss."""

from __future__ import annotations

from pydantic import Field

from alkn.core.descent import descend, retain_term
from alkn.core.sequence_losses import ascent_loss
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class GradientDifferenceParams(DescentParams):
    """Settings of the baseline.

    Attributes:
        retain_weight: factor on the retain loss.
    """

    retain_weight: float = Field(1.0, ge=0)


@register_method(
    "gradient_difference", params=GradientDifferenceParams, source="Liu, Liu and Stone 2022; TOFU (Maini et al. 2024)"
)
def gradient_difference(task: Task, params: GradientDifferenceParams) -> Outcome:
    """L = −CE(forget) + retain_weight · CE(retain)."""
    pace = params.pace()
    return descend(
        task,
        pace,
        forget=ascent_loss(),
        keep=retain_term(task, answer_loss(), pace, weight=params.retain_weight),
    )
