"""Relearning: does a little training on a few of the forgotten records bring the others back?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import Generator, nn

from alkn.attacks.budgets import Rising
from alkn.core.attack import Curve, Target, numbered
from alkn.core.relearning import points_of_training
from alkn.core.scoring import Example, Progress, no_progress
from alkn.errors import InputError
from alkn.registry import Params, register_attack

STEPS = (0, 5, 10, 20, 40)


class RelearningParams(Params):
    """Budget of the attack.

    Attributes:
        share: part of the forgotten records that the attacker has, every 1/share-th by position.
        steps: optimizer steps after which the other records are measured.
        lr: AdamW's learning rate, constant, without weight decay.
        batch_size: records a step.
        seed: order of the batches.
    """

    share: float = Field(0.1, gt=0, lt=1)
    steps: Rising = STEPS
    lr: float = Field(5e-4, gt=0)
    batch_size: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)


@register_attack("relearning", params=RelearningParams, source="Hu et al. 2024; Lynch et al. 2024; docs/METHOD.md")
def relearning(target: Target, params: RelearningParams) -> Curve:
    """P and exact memorization of the records that the attacker does not have, by steps of fine-tuning."""
    return relearn_requests(
        target.model,
        target.forgotten,
        share=params.share,
        steps=params.steps,
        lr=params.lr,
        batch_size=params.batch_size,
        generator=Generator().manual_seed(params.seed),
        progress=target.progress,
    )


def relearn_requests(
    model: nn.Module,
    forgotten: Mapping[str, Sequence[Example]],
    *,
    share: float = 0.1,
    steps: Sequence[int] = STEPS,
    lr: float = 5e-4,
    batch_size: int = 16,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> Curve:
    """Fine-tune a float32 copy of ``model`` on some forgotten records and measure the others.

    Args:
        model: a causal language model on its device; unchanged afterwards.
        forgotten: request id -> encoded records. Positions count through all requests in this order.
        share: part of them that is trained on, in (0, 1).
        steps: rising numbers of optimizer steps at which the rest is measured; at 0 it is the given model.
        lr: AdamW's constant learning rate.
        batch_size: records a step, each once before any comes again.
        generator: order of the batches; ``None``: seed 0.
        progress: told about every step.

    Raises:
        InputError: if there is no record that is not trained on.
        TrainingDiverged: when a loss is not finite.

    Source: docs/METHOD.md, "Depth".
    """
    owners, records = numbered(forgotten)
    taught = set(evenly(len(records), share))
    shown = [record for i, record in enumerate(records) if i in taught]
    held = [i for i in range(len(records)) if i not in taught]
    if not held:
        raise InputError("relearning: no record is left to measure on; give more records or a smaller share")
    rest, owners = [records[i] for i in held], [owners[i] for i in held]
    size = min(batch_size, len(shown))
    points = points_of_training(
        model, shown, rest, owners, steps=steps, lr=lr, batch_size=size,
        generator=generator or Generator().manual_seed(0), progress=progress,
    )  # fmt: skip
    return Curve(
        unit="steps",
        points=tuple(points),
        budget={"share": share, "lr": lr, "batch_size": size, "taught": len(shown), "measured": len(rest)},
        missing={name: "the attacker has all its records" for name in forgotten if name not in owners},
    )


def evenly(count: int, share: float) -> list[int]:
    """Every ``1/share``-th of ``count`` positions, from 0 on."""
    return [at for at in (round(j / share) for j in range(count)) if at < count]
