"""WAGLE: unlearn only the weights that matter to the forget records and little to the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import BoolTensor, Tensor

from alkn.core.descent import descend, retain_term
from alkn.core.distributed import refuse_split, whole_batches
from alkn.core.gradient_mask import top_share_masks
from alkn.core.scoring import bucketed, collate, mean_gradient
from alkn.core.sophia import gauss_newton_bartlett
from alkn.core.training import Loss, adamw, answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.methods.forget_loss import ForgetLoss, forget_loss
from alkn.registry import register_method

LEAST_CURVATURE = 1e-12


class WagleParams(DescentParams):
    """Settings of the baseline.

    Attributes:
        loss: the forget part: ``npo`` or ``gradient_difference``.
        npo_beta: β of NPO.
        retain_weight: factor on the retain loss.
        share: share of the model's weights that are unlearned.
        attribution_sample: retain records that the score is computed from, drawn without replacement.
        curvature: γ, the retain loss's Hessian taken as γ times the identity; ``null``: the mean of its
            Gauss-Newton diagonal at θ_{t-1}.
    """

    loss: ForgetLoss = "npo"
    npo_beta: float = Field(0.1, gt=0)
    retain_weight: float = Field(1.0, ge=0)
    share: float = Field(0.8, gt=0, le=1)
    attribution_sample: int = Field(320, ge=1)
    curvature: float | None = Field(None, gt=0)


@register_method("wagle", params=WagleParams, source="Jia et al. 2024, WAGLE")
def wagle(task: Task, params: WagleParams) -> Outcome:
    """Descend the objective of ``loss`` + retain_weight · CE(retain) on the weights that score highest."""
    refuse_split(task.model, "method: wagle")
    before, _ = task.measure_stored()
    if task.stop.met(before):
        return Outcome(True, [before.row(0)], {}, 0)
    pace = params.pace()
    loss = forget_loss(task, params.loss, beta=params.npo_beta)
    keep = retain_term(task, answer_loss(), pace, weight=params.retain_weight)
    mask, passes = attribution_mask(task, params, loss)
    named = {name: p for name, p in task.model.named_parameters() if name in mask}

    @torch.no_grad()
    def restrict(step: int) -> None:
        for name, p in named.items():
            if p.grad is not None:
                p.grad.mul_(mask[name])
            if pace.weight_decay:
                # AdamW's own decay would move the weights that are to stay.
                p.sub_(p * mask[name], alpha=pace.rate(step) * pace.weight_decay)

    outcome = descend(
        task,
        pace,
        forget=loss,
        keep=keep,
        optimizer=lambda trained: adamw(trained, device=trained[0].device, lr=pace.lr),
        before_step=restrict,
    )
    return dataclasses.replace(outcome, passes=outcome.passes + passes)


def attribution_mask(task: Task, params: WagleParams, loss: Loss) -> tuple[dict[str, BoolTensor], int]:
    """The weights to unlearn, and the record passes that finding them took.

    Without a retain term (``retain_batch`` or ``retain_weight`` 0) the retain records have no say in the score either.

    Args:
        task: the request; its model is θ_{t-1}.
        params: share and curvature.
        loss: the forget part of the objective.
    """
    passes, count = len(task.forget), min(params.attribution_sample, len(task.retain))
    forget = forget_gradient(task, loss)
    retain, gamma = None, 1.0
    if params.retain_batch and params.retain_weight:
        picks = torch.randperm(len(task.retain), generator=task.generator("attribution"))[:count].tolist()
        retain, passes = mean_gradient(task.model, task.retain, picks, autocast=task.autocast), passes + count
        if params.curvature is None:
            gamma, passes = mean_curvature(task, picks, batch_size=params.batch_size), passes + count
        else:
            gamma = params.curvature
    scores = attribution(task.weights(), forget, retain, gamma=gamma)
    generator = task.generator("percentile")
    return top_share_masks(scores, params.share, estimator="exact", generator=generator), passes


def forget_gradient(task: Task, loss: Loss, *, max_tokens: int = 8192) -> dict[str, Tensor]:
    """The gradient of a loss over all forget records, each batch counted by its records; ``grad`` stays empty."""
    task.model.eval()
    named = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    device = next(iter(named.values())).device
    for records in bucketed([e.tokens.numel() for e in task.forget], max_tokens=max_tokens):
        with task.autocast(), whole_batches():
            value = loss(task.model, collate(task.forget, records, device=device))
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
        torch._foreach_add_(list(total.values()), found, alpha=len(records) / len(task.forget))
    return total


def attribution(
    weights: Mapping[str, Tensor], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor] | None, *, gamma: float
) -> dict[str, Tensor]:
    """The score of every weight, |θ · ∇L_f − ∇L_r · ∇L_f / γ|.

    It is the first-order change of the forget loss when the weight is set to zero and the others
    answer by keeping the retain loss least.

    Args:
        weights: θ by name.
        forget: gradient of the forget loss; its sign and scale do not matter.
        retain: gradient of the retain loss; ``None``: without the second term.
        gamma: the retain loss's Hessian is taken as this times the identity.

    Source: WAGLE, section 4, with the absolute value of the authors' code.
    """
    return {
        name: ((theta if retain is None else theta - retain[name] / gamma) * forget[name]).abs()
        for name, theta in weights.items()
    }


def mean_curvature(task: Task, picks: list[int], *, batch_size: int) -> float:
    """The mean over all weights of the Gauss-Newton diagonal of the retain loss, at least 1e-12."""
    device = next(task.model.parameters()).device
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    generator, total, batches = task.generator("curvature"), 0.0, 0
    for start in range(0, len(picks), batch_size):
        batch = collate(task.retain, picks[start : start + batch_size], device=device)
        with task.autocast():
            estimate = gauss_newton_bartlett(task.model, batch, parameters, generator=generator)
        total, batches = total + sum(float(h.sum()) for h in estimate), batches + 1
    return max(LEAST_CURVATURE, total / batches / sum(p.numel() for p in parameters))
