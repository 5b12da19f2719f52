"""NPO: negative preference optimization, with a retain loss, a divergence or nothing beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alkn.core.descent import RetainTerm, descend, divergence_term, retain_term
from alkn.core.sequence_losses import negative_preference_loss, reference_log_probs
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class NpoParams(DescentParams):
    """Settings of the baseline; β and the weights are the paper's on TOFU.

    Attributes:
        beta: β, inverse temperature; towards 0 it is gradient ascent on whole answers.
        regularizer: what keeps the rest: cross-entropy on ``retain`` records, ``kl``: KL(θ_{t-1} ‖ θ) on
            them, or ``none``.
        retain_weight: factor on it.
    """

    beta: float = Field(0.1, gt=0)
    regularizer: Literal["retain", "kl", "none"] = "retain"
    retain_weight: float = Field(1.0, ge=0)


@register_method("npo", params=NpoParams, source="Zhang et al. 2024, Negative preference optimization, equation 3")
def npo(task: Task, params: NpoParams) -> Outcome:
    """L = −(2/β) · mean log σ(−β · log(π_θ / π_{t-1})) of whole answers + retain_weight · regularizer."""
    pace = params.pace()
    loss = negative_preference_loss(reference_log_probs(task, task.forget), beta=params.beta)
    keep: RetainTerm | None = None
    if params.regularizer == "retain":
        keep = retain_term(task, answer_loss(), pace, weight=params.retain_weight)
    elif params.regularizer == "kl":
        keep = divergence_term(task, pace, weight=params.retain_weight)
    return descend(task, pace, forget=loss, keep=keep)
