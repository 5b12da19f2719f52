"""SatImp: gradient ascent, each token weighted by saturation and importance."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from alkn.core.descent import descend, retain_term
from alkn.core.sequence_losses import ascent_loss
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class SatimpParams(DescentParams):
    """Settings of the baseline; the defaults are OpenUnlearning's.

    Attributes:
        saturation: β1, power of the token's probability: what is forgotten already counts little.
        importance: β2, power of 1 − probability: what everybody would say counts little.
        forget_weight: factor on the forget loss.
        retain_weight: factor on the retain loss.
    """

    saturation: float = Field(5.0, ge=0)
    importance: float = Field(1.0, ge=0)
    forget_weight: float = Field(0.1, gt=0)
    retain_weight: float = Field(1.0, ge=0)


@register_method("satimp", params=SatimpParams, source="Yang et al. 2025, Criteria of loss reweighting, section 5")
def satimp(task: Task, params: SatimpParams) -> Outcome:
    """L = −forget_weight · mean of π^β1 · (1 − π)^β2 · (−log π) + retain_weight · CE(retain).

    The mean is over answer tokens; the weight has no graph.
    """

    def weight(probs: Tensor) -> Tensor:
        return params.forget_weight * probs**params.saturation * (1 - probs) ** params.importance

    pace = params.pace()
    keep = retain_term(task, answer_loss(), pace, weight=params.retain_weight)
    return descend(task, pace, forget=ascent_loss(weight), keep=keep)
