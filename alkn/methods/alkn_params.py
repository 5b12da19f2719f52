"""Settings of ALKN and its presets, and the parts that its procedures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alkn.core.gradient_mask import Estimator, PenaltyForm, Sign, accumulate_, overlap_penalty
from alkn.core.scoring import Scores
from alkn.core.soft_labels import SoftLabelForm, entropic_weights
from alkn.core.training import Hyperparameters
from alkn.core.unlearning import Task
from alkn.registry import Params

PAPER = "ALKN, ICML 2025, PMLR 267, pp. 68094-68117"

REFERENCE: dict[str, Any] = {
    "procedure": "once", "lr": 2e-5, "epochs": 5, "batch_size": 64, "weight_decay": 0.01, "clip": 1.0,
    "warmup_epochs": 1, "label_form": "reference", "label_scale": 1.5, "label_midpoint": 0.8,
    "criterion": "m", "sign": "paper", "retain_gradient": "paired", "share": 0.8, "share_end": 0.4,
    "schedule": "fifths", "reuse_thresholds": True, "overlap": "product_std", "overlap_factor": 0.5,
    "protection": "tensor", "scale": 1.0, "rehearsal": 0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "rounds": {
        "procedure": "rounds", "steps": 30, "lr": 5e-4, "epochs": 2, "batch_size": 32, "label_form": "reference",
        "label_scale": 10.0, "label_midpoint": 0.8, "rehearsal": 0,
    },
    "reference": REFERENCE,
    "derived": {**REFERENCE, "sign": "derived", "scale": None},
    "paper": {
        "procedure": "once", "lr": 3e-5, "epochs": 5, "batch_size": 32, "weight_decay": 0.01, "clip": None,
        "label_form": "paper", "label_scale": 10.0, "label_midpoint": 1.0, "criterion": "m", "sign": "paper",
        "strength": 0.8, "retain_gradient": "full", "share": 1.0, "share_end": 0.3, "schedule": "linear",
        "scope": "model", "estimator": "trimmed_linear", "mask_first": False, "overlap": "gradient_std",
        "protection": "coordinate", "scale": 0.8, "rehearsal": 0,
    },
}  # fmt: skip


class AlknParams(Params):
    """Settings of ALKN; ``preset`` fills in what is not given.

    Attributes:
        preset: which of the five; its values are defaults that any key beside it overrides.
        procedure: ``interleaved``: every step negates a one-step task vector and repairs at once;
            ``rounds``: fine-tune, localise, negate, again; ``once``: one fine-tuning with masked gradients,
            one negation.
        steps: most steps, or most rounds.
        decay_steps: interleaved: the rate falls linearly to ``lr_floor`` of it over so many steps, and
            so many steps are always taken; the forget term rests while the target is met.
        lr_floor: see ``decay_steps``.
        check_every: interleaved: steps between two measurements of the forget set.
        lr, epochs, batch_size, weight_decay, clip, warmup_epochs: of the steps, or of the fine-tuning.
            ``warmup_epochs`` (once) 0: constant rate; else linear up over so many epochs, then down to zero.
        soft_labels: weight the tokens (ESL); off: all weights one (not for ``interleaved``).
        label_form, label_scale, label_midpoint: see :func:`alkn.core.soft_labels.entropic_weights`.
        criterion: what ranks the coordinates: ``m``, the accumulated products; ``exact``,
            (θ_ft − θ) · G_r; ``random`` and ``magnitude`` are ablations. ``once`` takes ``m``;
            ``interleaved`` localises nothing: the keeping gradient is in every step.
        sign, strength: see :func:`alkn.core.gradient_mask.accumulate_`.
        retain_gradient: ``sample`` of ``retain_sample`` records, drawn with replacement each round;
            ``full`` mean over D_r; ``paired``: one random retain record for each forget record of a batch.
        share: share of coordinates that may move (at the start, where a schedule changes it).
        share_end: where the schedule of ``once`` goes.
        schedule: ``constant``, ``linear`` over the training, or ``fifths``: stepwise, each fifth.
        reuse_thresholds: later requests keep the thresholds that the first one ended with.
        scope, estimator: one percentile a tensor or over the model, and how it is found.
        mask_first: m moves before the mask is applied (the authors' code), or after it (the paper).
        overlap, overlap_factor: penalty μ on coordinates in M; ``none``: M is not kept.
        protection, protection_rate: rate × ``protection_rate`` on M, a coordinate or a tensor at a time (APM).
        scale: λ of ``once``; ``null``: calibrated, the smallest that meets the target.
        scale_max, bisections: the search for λ in a round; no bisection: always ``scale_max``.
        rehearsal: prompts that θ_{t-1} answers in its own words, to be kept like the retain records; 0: none.
        rehearsal_batch, retain_batch: records of each kind in a step of ``interleaved``.
        repair_steps, repair_lr, repair_batch: rounds: after each negation, steps that distil θ_{t-1} on
            retain and rehearsal records (KL), rate falling linearly to zero; 0 steps: no repair.
    """

    preset: Literal["interleaved", "rounds", "derived", "paper", "reference"] = "interleaved"
    procedure: Literal["interleaved", "rounds", "once"] = "interleaved"
    steps: int = Field(400, ge=1)
    decay_steps: int = Field(120, ge=1)
    lr_floor: float = Field(0.1, ge=0, le=1)
    check_every: int = Field(5, ge=1)
    lr: float = Field(2e-4, gt=0)
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)
    warmup_epochs: int = Field(0, ge=0)
    soft_labels: bool = True
    label_form: SoftLabelForm = "log_odds"
    label_scale: float = Field(1.0, gt=0)
    label_midpoint: float = Field(0.076, gt=0, le=1)
    criterion: Literal["m", "exact", "random", "magnitude"] = "exact"
    sign: Sign = "derived"
    strength: float = Field(1.0, gt=0)
    retain_gradient: Literal["sample", "full", "paired"] = "sample"
    retain_sample: int = Field(320, ge=1)
    share: float = Field(0.1, ge=0, le=1)
    share_end: float = Field(0.1, ge=0, le=1)
    schedule: Literal["constant", "linear", "fifths"] = "constant"
    reuse_thresholds: bool = False
    scope: Literal["tensor", "model"] = "tensor"
    estimator: Estimator = "sampled"
    mask_first: bool = True
    overlap: PenaltyForm | Literal["none"] = "none"
    overlap_factor: float = Field(1.0, ge=0)
    protection: Literal["none", "coordinate", "tensor"] = "none"
    protection_rate: float = Field(0.1, ge=0, le=1)
    scale: float | None = Field(None, gt=0)
    scale_max: float = Field(2.0, gt=0)
    bisections: int = Field(5, ge=0)
    rehearsal: int = Field(1200, ge=0)
    rehearsal_batch: int = Field(20, ge=1)
    retain_batch: int = Field(12, ge=1)
    repair_steps: int = Field(0, ge=0)
    repair_lr: float = Field(2e-4, gt=0)
    repair_batch: int = Field(32, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {**PRESETS.get(str(given.get("preset", "interleaved")), {}), **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> AlknParams:
        if self.procedure == "once" and self.criterion != "m":
            raise ValueError("procedure 'once' masks gradients by criterion 'm'")
        if self.procedure == "rounds" and self.retain_gradient == "paired":
            raise ValueError("procedure 'rounds' takes retain_gradient 'sample' or 'full'")
        if self.procedure == "interleaved" and (self.label_form != "log_odds" or not self.soft_labels):
            raise ValueError("procedure 'interleaved' takes soft labels of form 'log_odds'")
        if self.label_form == "log_odds" and self.label_midpoint == 1:
            raise ValueError("label_form 'log_odds' takes a label_midpoint below 1")
        return self

    def hyperparameters(self) -> Hyperparameters:
        """The part that the training loop reads."""
        return Hyperparameters(
            lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, weight_decay=self.weight_decay, clip=self.clip
        )


def label_weights(scores: Scores, p: AlknParams) -> list[Tensor] | None:
    """The soft label of every answer token from the scores at θ_{t-1}; ``None`` where they are off."""
    if not p.soft_labels:
        return None
    return [
        entropic_weights(probs, form=p.label_form, scale=p.label_scale, midpoint=p.label_midpoint)
        for probs in scores.token_probs
    ]


def move_m(
    task: Task, p: AlknParams, m: dict[str, Tensor], g_r: dict[str, Tensor], previous: dict[str, Tensor] | None
) -> None:
    """Accumulate the model's present gradients into m, with the penalty on M where it is on."""
    for name, parameter in task.model.named_parameters():
        if parameter.grad is None:
            continue
        penalty: Tensor | float = 0.0
        if p.overlap != "none" and previous is not None:
            penalty = overlap_penalty(parameter.grad, g_r[name], form=p.overlap, factor=p.overlap_factor)
        accumulate_(
            m[name], parameter.grad, g_r[name], sign=p.sign, strength=p.strength,
            previous=None if previous is None else previous[name], penalty=penalty,
        )  # fmt: skip


def previous_mask(task: Task, p: AlknParams) -> dict[str, Tensor] | None:
    """M from the last accepted step, all false before the first; ``None`` where it is not used."""
    if p.overlap == "none" and p.protection == "none":
        return None
    return {
        name: task.state[f"mask.{name}"].to(w.device)
        if f"mask.{name}" in task.state
        else torch.zeros(w.shape, dtype=torch.bool, device=w.device)
        for name, w in task.weights().items()
    }


def mask_state(mask: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """M as tensors of the step's state."""
    return {} if mask is None else {f"mask.{name}": t.cpu() for name, t in mask.items()}
