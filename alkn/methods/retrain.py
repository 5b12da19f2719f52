"""Training without the forget set: the ceiling that every method is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from alkn.core.distributed import refuse_split
from alkn.core.scoring import Example, score
from alkn.core.training import Hyperparameters, answer_loss, cosine, fine_tune, steps_of
from alkn.core.unlearning import Outcome, Task, seed_of
from alkn.errors import InputError
from alkn.registry import Params, register_method

SLACK = 0.005
"""How far below the base model on the retain records a model trained anew may end, in P, without ``until``."""


class RetrainParams(Params):
    """Settings of the ceiling; the defaults are those of a base model's training, with twice the epochs.

    Fewer records make fewer steps an epoch, and the base model's level has to be reached.

    Attributes:
        until: training ends after the epoch in which mean P on the retain records reaches this;
            ``null``: the base model's, less 0.005.
        epochs: most passes; the learning rate is planned over all of them.
        lr, batch_size, weight_decay: AdamW's.
        warmup: optimizer steps in which the rate rises linearly.
        floor: share of the rate that the cosine ends at.
    """

    until: float | None = Field(None, ge=0, le=1)
    epochs: int = Field(60, ge=1)
    lr: float = Field(3e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(50, ge=0)
    floor: float = Field(0.05, ge=0, le=1)


@register_method("retrain", params=RetrainParams, source="training without the records: exact unlearning")
def retrain(task: Task, params: RetrainParams) -> Outcome:
    """θ_t = a fresh model of the same architecture, trained on retain + rest to the base model's level.

    It is not θ_{t-1}'s: what each request may lack of it would add up over a chain.
    ``reached`` means that level: nothing has to be forgotten here, so the stop rule is not what ends it.
    """
    refuse_split(task.model, "method: retrain")
    if not task.retain:
        raise InputError("method: retrain trains to the level of the retain records, and there are none")
    before, _ = task.measure()
    level = _mean_p(task.teacher("origin"), task) - SLACK if params.until is None else params.until
    examples = without(task.forget, [*task.retain, *task.rest])
    fresh = fresh_model(task)
    hp = Hyperparameters(
        lr=params.lr, epochs=params.epochs, batch_size=params.batch_size, weight_decay=params.weight_decay,
        betas=(0.9, 0.95), clip=1.0,
    )  # fmt: skip
    total = steps_of(len(examples), hp)
    reached: list[float] = []

    def level_is_reached() -> bool:
        reached.append(_mean_p(fresh, task))
        return reached[-1] >= level

    losses = fine_tune(
        fresh,
        examples,
        hp,
        loss=answer_loss(),
        generator=task.generator("order"),
        scheduler=lambda optimizer: cosine(optimizer, warmup=params.warmup, total=total, floor=params.floor),
        until=level_is_reached,
        autocast=task.autocast,
        progress=task.progress,
        label="retrain",
    )
    task.model.load_state_dict(fresh.state_dict())
    task.round_weights()
    now, _ = task.measure()
    history = [before.row(0), now.row(1, retain_p=_mean_p(task.model, task), epochs=len(reached), steps=len(losses))]
    return Outcome(reached[-1] >= level, history, {}, len(reached) * len(examples))


def fresh_model(task: Task) -> nn.Module:
    """A model of the task's architecture with weights drawn from the task's seed, in float32 on its device."""
    old: Any = task.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(task.seed, "retrain"))
        made: nn.Module = type(old)(old.config)
    return made.float().to(next(task.model.parameters()).device)


def without(forget: Sequence[Example], examples: Sequence[Example]) -> list[Example]:
    """The examples that are not, token for token, one of the forget records."""
    gone = {tuple(example.tokens.tolist()) for example in forget}
    return [example for example in examples if tuple(example.tokens.tolist()) not in gone]


def _mean_p(model: nn.Module, task: Task) -> float:
    return float(score(model, task.retain).probability.mean())
