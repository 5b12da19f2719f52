"""KL minimization: climb the forget loss, stay close to the parent on retain records."""

from __future__ import annotations

from pydantic import Field

from alkn.core.descent import descend, divergence_term
from alkn.core.sequence_losses import ascent_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class KlMinimizationParams(DescentParams):
    """Settings of the baseline.

    Attributes:
        retain_weight: factor on the divergence; TOFU's is 1.
    """

    retain_weight: float = Field(1.0, ge=0)


@register_method("kl_minimization", params=KlMinimizationParams, source="TOFU (Maini et al. 2024), KL minimization")
def kl_minimization(task: Task, params: KlMinimizationParams) -> Outcome:
    """L = −CE(forget) + retain_weight · KL(θ_{t-1} ‖ θ) on retain records.

    The direction is that of TOFU's code, ``kl_div(log θ, log θ_{t-1})``: the parent's distribution is
    the weight, so what it finds likely must stay likely. θ_{t-1} stands where TOFU has the model before
    any unlearning: in a chain of requests, what earlier ones took must not come back.
    """
    pace = params.pace()
    keep = divergence_term(task, pace, weight=params.retain_weight)
    return descend(task, pace, forget=ascent_loss(), keep=keep)
