"""WGA: gradient ascent, each token weighted by how likely the model finds it."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from alkn.core.descent import descend, retain_term
from alkn.core.sequence_losses import ascent_loss
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class WgaParams(DescentParams):
    """Settings of the baseline; α and the weight are OpenUnlearning's.

    Attributes:
        alpha: α, power of the token's probability; 0: plain gradient ascent.
        retain_weight: factor on the retain loss.
    """

    alpha: float = Field(1.0, ge=0)
    retain_weight: float = Field(1.0, ge=0)


@register_method("wga", params=WgaParams, source="Wang et al. 2025, Rethinking LLM unlearning objectives")
def wga(task: Task, params: WgaParams) -> Outcome:
    """L = −mean over tokens of π^α · (−log π), π^α without the graph, + retain_weight · CE(retain)."""

    def weight(probs: Tensor) -> Tensor:
        return probs**params.alpha

    pace = params.pace()
    keep = retain_term(task, answer_loss(), pace, weight=params.retain_weight)
    return descend(task, pace, forget=ascent_loss(weight), keep=keep)
