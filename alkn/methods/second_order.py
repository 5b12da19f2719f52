"""SOUL: an unlearning objective descended by a second-order optimizer (SO-GD, SO-NPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from alkn.core.descent import Pace, descend, retain_term
from alkn.core.distributed import refuse_split
from alkn.core.scoring import Example, collate
from alkn.core.sophia import Sophia, gauss_newton_bartlett, hutchinson
from alkn.core.training import Loss, answer_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import DescentParams
from alkn.methods.forget_loss import ForgetLoss, forget_loss
from alkn.registry import register_method


class SecondOrderParams(DescentParams):
    """Settings of the baseline; ``lr`` is also the largest change of a weight in a step.

    Attributes:
        loss: the forget part: ``gradient_difference`` or ``npo``.
        npo_beta: β of NPO.
        retain_weight: factor on the retain loss.
        estimator: of the curvature: ``gauss_newton`` (Sophia-G) of the cross-entropy, or ``hutchinson``
            (Sophia-H) of the objective itself.
        curvature_every: steps between two estimates.
        momentum: share of the gradients' average that a step leaves, below 1.
        curvature_momentum: share of the curvature's average that an estimate leaves, below 1.
        gamma: factor on the curvature; the smaller, the more coordinates are clipped.
    """

    loss: ForgetLoss = "gradient_difference"
    npo_beta: float = Field(0.1, gt=0)
    retain_weight: float = Field(1.0, ge=0)
    estimator: Literal["gauss_newton", "hutchinson"] = "gauss_newton"
    curvature_every: int = Field(10, ge=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    curvature_momentum: float = Field(0.95, ge=0, lt=1)
    gamma: float = Field(0.04, gt=0)


@register_method("second_order", params=SecondOrderParams, source="Jia et al. 2024, SOUL; Liu et al. 2024, Sophia")
def second_order(task: Task, params: SecondOrderParams) -> Outcome:
    """The objective of ``loss`` + retain_weight · CE(retain), descended by Sophia."""
    refuse_split(task.model, "method: second_order")
    pace, loss, likelihood = params.pace(), forget_loss(task, params.loss, beta=params.npo_beta), answer_loss()
    curvature = Curvature(task, params, pace, loss)
    keep = retain_term(task, likelihood, pace, weight=params.retain_weight)
    # The hook makes no use of the gradients it is shown: it comes at the right moment, once a step.
    outcome = descend(task, pace, forget=loss, keep=keep, optimizer=curvature.optimizer, before_step=curvature)
    return dataclasses.replace(outcome, passes=outcome.passes + curvature.passes)


class Curvature:
    """Makes the optimizer and brings its curvature up to date, on records of its own.

    The curvature is that of the forget records' loss plus ``retain_weight`` times that of the
    retain records' cross-entropy.

    Args:
        task: the request.
        params: estimator, pace of the estimates, constants of the optimizer.
        pace: batches.
        loss: the forget part of the objective.

    Attributes:
        passes: record passes spent so far.
    """

    def __init__(self, task: Task, params: SecondOrderParams, pace: Pace, loss: Loss) -> None:
        self._task, self._params, self._pace, self._loss = task, params, pace, loss
        self._trained: list[nn.Parameter] = []
        self._sophia: Sophia | None = None
        self.passes = 0

    def optimizer(self, trained: list[nn.Parameter]) -> Sophia:
        """Sophia over these parameters, whose curvature this keeps up to date."""
        p = self._params
        self._trained = trained
        self._sophia = Sophia(
            trained,
            lr=p.lr,
            betas=(p.momentum, p.curvature_momentum),
            gamma=p.gamma,
            weight_decay=p.weight_decay,
        )
        return self._sophia

    def __call__(self, step: int) -> None:
        """Every ``curvature_every`` steps, from the first on: a new estimate."""
        if self._sophia is None or step % self._params.curvature_every:
            return
        total = self._estimate(self._task.forget, self._pace.batch_size, step, self._loss)
        if self._pace.retain_batch and self._params.retain_weight:
            kept = self._estimate(self._task.retain, self._pace.retain_batch, step, answer_loss())
            torch._foreach_add_(total, kept, alpha=self._params.retain_weight)
        self._sophia.update_curvature(total)

    def _estimate(self, examples: Sequence[Example], count: int, step: int, loss: Loss) -> list[Tensor]:
        generator = self._task.generator("curvature", step, "forget" if examples is self._task.forget else "retain")
        picks = torch.randint(len(examples), (count,), generator=generator).tolist()
        batch = collate(examples, picks, device=self._trained[0].device)
        self.passes += count
        model = self._task.model
        with self._task.autocast():
            if self._params.estimator == "hutchinson":
                return hutchinson(lambda: loss(model, batch), self._trained, generator=generator)
            return gauss_newton_bartlett(model, batch, self._trained, generator=generator)
