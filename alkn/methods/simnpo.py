"""SimNPO: NPO without a reference, on the mean log-probability of an answer's tokens."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from alkn.core.descent import descend, retain_term
from alkn.core.scoring import Batch
from alkn.core.sequence_losses import answer_log_probs
from alkn.core.training import answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method


class SimnpoParams(DescentParams):
    """Settings of the baseline; the defaults are the authors' for TOFU's forget10.

    Attributes:
        beta: β, inverse temperature of the mean log-probability.
        gamma: γ, margin; 0 in the authors' runs.
        forget_weight: factor on the forget loss.
        retain_weight: factor on the retain loss.
    """

    beta: float = Field(4.5, gt=0)
    gamma: float = Field(0.0, ge=0)
    forget_weight: float = Field(0.125, gt=0)
    retain_weight: float = Field(1.0, ge=0)


@register_method("simnpo", params=SimnpoParams, source="Fan et al. 2024, Simplicity prevails")
def simnpo(task: Task, params: SimnpoParams) -> Outcome:
    """L = forget_weight · −(2/β) · mean log σ(−β/|y| · log π_θ − γ) + retain_weight · CE(retain)."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        lengths = torch.bincount(batch.rows, minlength=len(batch.records))
        log_probs = answer_log_probs(model, batch)
        return params.forget_weight * simple_loss(log_probs, lengths, beta=params.beta, gamma=params.gamma)

    pace = params.pace()
    return descend(task, pace, forget=loss, keep=retain_term(task, answer_loss(), pace, weight=params.retain_weight))


def simple_loss(log_probs: Tensor, lengths: Tensor, *, beta: float, gamma: float) -> Tensor:
    """−(2/β) · mean log σ(−β · log π / length − γ), 0-d.

    Args:
        log_probs: log π of whole answers in nats, ``[batch]``.
        lengths: their tokens, end of sequence included, ``[batch]``.
        beta: inverse temperature, > 0.
        gamma: margin, ≥ 0.
    """
    return -2.0 / beta * nn.functional.logsigmoid(-beta * log_probs / lengths - gamma).mean()
