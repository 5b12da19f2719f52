"""SKU: learn the forget records and what surrounds them, then subtract all that was learnt."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from alkn.core.calibration import calibrated_scale
from alkn.core.limits import context_of
from alkn.core.scoring import Batch, Example, collate
from alkn.core.training import Hyperparameters, answer_loss, distillation_loss, fine_tune, linear_warmup, steps_of
from alkn.core.unlearning import Outcome, Task
from alkn.errors import InputError
from alkn.registry import Params, register_method


class SkuParams(Params):
    """Settings of the baseline.

    Attributes:
        lr, epochs, batch_size: the acquisition on the forget set, AdamW without decay, the rate falling
            linearly to zero.
        guided_weight: factor on the cross-entropy of the forget records (guided distortion).
        random_weight: factor on that of forget prompts with other records' answers (random disassociation).
        answers: such answers a forget record.
        preservation_weight: factor on the divergence from θ_{t-1} on retain records, which is *raised*
            (preservation divergence), so that subtracting the vector restores them.
        retain_batch: retain records a step; 0: no preservation divergence.
        scale: λ; ``null``: calibrated, the smallest that meets the target.
    """

    lr: float = Field(5e-4, gt=0)
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(16, ge=1)
    guided_weight: float = Field(0.5, ge=0)
    random_weight: float = Field(1.0, ge=0)
    answers: int = Field(5, ge=1)
    preservation_weight: float = Field(1.0, ge=0)
    retain_batch: int = Field(16, ge=0)
    scale: float | None = Field(None, gt=0)


@register_method("sku", params=SkuParams, source="Liu et al. 2024, Towards safer LLMs through machine unlearning")
def sku(task: Task, params: SkuParams) -> Outcome:
    """θ ← θ − λ(θ_acquired − θ)."""
    before, _ = task.measure()
    if task.stop.met(before):
        return Outcome(True, [before.row(0)], {}, 0)
    theta = task.copy_weights()
    hp = Hyperparameters(lr=params.lr, epochs=params.epochs, batch_size=params.batch_size, clip=1.0)
    acquisition = Acquisition(task, params)
    fine_tune(
        task.model,
        task.forget,
        hp,
        loss=acquisition,
        generator=task.generator("order"),
        scheduler=lambda optimizer: linear_warmup(optimizer, warmup=0, total=steps_of(len(task.forget), hp)),
        autocast=task.autocast,
        progress=task.progress,
        label="acquisition",
    )
    tau = {name: weights - theta[name] for name, weights in task.weights().items()}
    scale = params.scale if params.scale is not None else calibrated_scale(task, theta, tau)
    task.set_weights(theta, tau, scale)
    now, _ = task.measure()
    return Outcome(task.stop.met(now), [before.row(0), now.row(1, scale=scale)], {}, acquisition.passes)


class Acquisition:
    """The loss of a step: guided distortion + random disassociation − preservation divergence.

    Args:
        task: the request; its model is θ_{t-1} now.
        params: weights and batches.

    Attributes:
        passes: record passes spent so far.

    Raises:
        InputError: if a part has no records to work on.
    """

    def __init__(self, task: Task, params: SkuParams) -> None:
        self._task, self._params, self._step = task, params, 0
        self._likelihood = answer_loss()
        if params.random_weight and len(task.forget) < 2:
            raise InputError(
                "method.random_weight: one forget record alone has no other's answer; 0 switches the disassociation off"
            )
        preserves = params.retain_batch > 0 and params.preservation_weight > 0
        if preserves:
            task.require_retain("method.retain_batch", "0 switches the divergence off")
        teacher = task.teacher() if preserves else None
        self._divergence = distillation_loss(teacher) if teacher is not None else None
        self.passes = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted sum, 0-d, in nats."""
        p, device = self._params, batch.input_ids.device
        total = p.guided_weight * self._likelihood(model, batch)
        self.passes += len(batch.records)
        if p.random_weight:
            others = self.mismatched(batch.records)
            shuffled = collate(others, range(len(others)), device=device)
            total = total + p.random_weight * self._likelihood(model, shuffled)
            self.passes += len(others)
        if self._divergence is not None:
            generator = self._task.generator("preservation", self._step)
            picks = torch.randint(len(self._task.retain), (p.retain_batch,), generator=generator).tolist()
            normal = collate(self._task.retain, picks, device=device)
            total = total - p.preservation_weight * self._divergence(model, normal)
            self.passes += len(picks)
        self._step += 1
        return total

    def mismatched(self, records: tuple[int, ...]) -> list[Example]:
        """``answers`` examples a record: its prompt with the answer of another record, drawn at random."""
        forget, generator = self._task.forget, self._task.generator("disassociation", self._step)
        context = context_of(self._task.model)
        drawn = torch.randint(len(forget) - 1, (len(records), self._params.answers), generator=generator).tolist()
        out = []
        for record, others in zip(records, drawn, strict=True):
            prompt = forget[record].tokens[: forget[record].answer_start]
            for other in others:
                foreign = forget[other + (other >= record)]
                tokens = torch.cat([prompt, foreign.tokens[foreign.answer_start :]])[:context]
                out.append(Example(tokens, prompt.numel()))
        return out
