"""Plain task arithmetic: fine-tune on the forget set and subtract the whole vector, nothing localised."""

from __future__ import annotations

from pydantic import Field

from alkn.core.calibration import calibrated_scale
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.core.unlearning import Outcome, Task
from alkn.registry import Params, register_method


class TaskVectorParams(Params):
    """Settings of the baseline.

    Attributes:
        lr, epochs, batch_size: the fine-tuning on the forget set, AdamW without decay.
        scale: λ; ``null``: calibrated, the smallest that meets the target.
    """

    lr: float = Field(5e-4, gt=0)
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(32, ge=1)
    scale: float | None = Field(None, gt=0)


@register_method(
    "task_vector", params=TaskVectorParams, source="Ilharco et al. 2023, Editing models with task arithmetic"
)
def task_vector(task: Task, params: TaskVectorParams) -> Outcome:
    """θ ← θ − λ(θ_ft − θ), with θ_ft fine-tuned on the forget records by plain cross-entropy."""
    before, _ = task.measure()
    if task.stop.met(before):
        return Outcome(True, [before.row(0)], {}, 0)
    theta = task.copy_weights()
    hp = Hyperparameters(lr=params.lr, epochs=params.epochs, batch_size=params.batch_size, clip=1.0)
    fine_tune(
        task.model,
        task.forget,
        hp,
        loss=answer_loss(),
        generator=task.generator("order"),
        autocast=task.autocast,
        progress=task.progress,
        label="task vector",
    )
    tau = {name: weights - theta[name] for name, weights in task.weights().items()}
    scale = params.scale if params.scale is not None else calibrated_scale(task, theta, tau)
    task.set_weights(theta, tau, scale)
    now, _ = task.measure()
    history = [before.row(0), now.row(1, scale=scale)]
    return Outcome(task.stop.met(now), history, {}, params.epochs * len(task.forget))
