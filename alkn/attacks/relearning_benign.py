"""Benign relearning: does training on related text, none of it forgotten, bring forgotten records back?"""

from __future__ import annotations

from pydantic import Field
from torch import Generator

from alkn.attacks.budgets import Rising
from alkn.core.attack import Curve, Target, numbered
from alkn.core.relearning import points_of_training
from alkn.errors import InputError
from alkn.registry import Params, register_attack


class RelearningBenignParams(Params):
    """Budget of the attack.

    Attributes:
        text: what is trained on: ``retain``, ``utility``, ``holdout``, or a file of records or of plain text.
        steps: optimizer steps after which the forgotten records are measured.
        lr: AdamW's learning rate, constant, without weight decay.
        batch_size: records a step.
        seed: order of the batches.
    """

    text: str = Field("retain", min_length=1)
    steps: Rising = (0, 5, 10, 20, 40)
    lr: float = Field(5e-4, gt=0)
    batch_size: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)


@register_attack(
    "relearning_benign", params=RelearningBenignParams, source="Hu et al. 2024, Jogging the Memory of Unlearned LLMs"
)
def relearning_benign(target: Target, params: RelearningBenignParams) -> Curve:
    """P and exact memorization of all forgotten records, by steps of fine-tuning on other text.

    Whatever reads token for token like a forgotten record is left out of that text.
    """
    owners, records = numbered(target.forgotten)
    gone = {tuple(record.tokens.tolist()) for record in records}
    related = target.related(params.text)
    shown = [example for example in related if tuple(example.tokens.tolist()) not in gone]
    if not shown:
        raise InputError("attacks.relearning_benign.text: there is no text to train on")
    points = points_of_training(
        target.model, shown, records, owners, steps=params.steps, lr=params.lr, batch_size=params.batch_size,
        generator=Generator().manual_seed(params.seed), progress=target.progress, label="relearning_benign",
    )  # fmt: skip
    budget = {
        "lr": params.lr, "batch_size": min(params.batch_size, len(shown)), "taught": len(shown),
        "left_out": len(related) - len(shown), "measured": len(records),
    }  # fmt: skip
    return Curve("steps", tuple(points), budget)
