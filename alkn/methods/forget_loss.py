"""The forget part of an objective, chosen by name, for methods that change how an objective is descended."""

from __future__ import annotations

from typing import Literal

from alkn.core.sequence_losses import ascent_loss, negative_preference_loss, reference_log_probs
from alkn.core.training import Loss
from alkn.core.unlearning import Task

ForgetLoss = Literal["gradient_difference", "npo"]


def forget_loss(task: Task, name: ForgetLoss, *, beta: float) -> Loss:
    """The loss that forgets when it is descended.

    Args:
        task: the request; its model is θ_{t-1} now, the reference of NPO.
        name: ``gradient_difference``: −CE; ``npo``: negative preference optimization a token, as in SOUL.
        beta: of NPO.
    """
    if name == "npo":
        return negative_preference_loss(reference_log_probs(task, task.forget), beta=beta, per_token=True)
    return ascent_loss()
