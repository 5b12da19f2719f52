"""Settings of ALKN and its presets, and the parts that its procedures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Generator, Tensor

from alkn.core.gradient_mask import (
    Estimator,
    PenaltyForm,
    RetainGradient,
    Sign,
    accumulate_all_,
    overlap_penalty,
    threshold,
)
from alkn.core.scoring import Scores
from alkn.core.soft_labels import SoftLabelForm, entropic_weights
from alkn.core.ternary import Ternary
from alkn.core.training import Hyperparameters
from alkn.core.unlearning import Task, Teacher
from alkn.errors import WrongKeys
from alkn.methods.descent_params import DescentParams

PAPER = "ALKN, ICML 2025, PMLR 267, pp. 68094-68117"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

REFERENCE: dict[str, Any] = {
    "procedure": "once", "lr": 2e-5, "epochs": 5, "batch_size": 64, "weight_decay": 0.01, "clip": 1.0,
    "warmup_epochs": 1, "label_form": "reference", "label_scale": 1.5, "label_midpoint": 0.8,
    "criterion": "m", "sign": "paper", "retain_gradient": "paired", "share": 0.8, "share_end": 0.4,
    "schedule": "fifths", "reuse_thresholds": True, "estimator": "trimmed_linear", "overlap": "product_std",
    "overlap_factor": 0.5, "protection": "tensor", "scale": 1.0, "rehearsal": 0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "resistant": {
        "steps": 360, "decay_steps": 240, "forget_weight": 0.25, "level_reach": 1.0, "background_gap": 0.0,
        "damage": 0.4, "alternative_weight": 0.25, "rehearsal": 8000, "rehearsal_batch": 40, "resist_weight": 0.4,
        "resist_earlier": 1.0, "retain_exponent": 0.0, "retain_batch": 12,
    },
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


READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "decay_steps", "lr_floor", "check_every", "retain_batch", "rehearsal_batch", "forget_loss",
            "level_reach", "forget_weight", "alternatives", "alternative_weight", "background_shift",
            "background_gap", "background_step", "damage", "resist_weight", "resist_lr", "resist_steps",
            "resist_share", "resist_earlier", "replay", "teacher", "retain_exponent", "hidden_weight",
        ),
        ("interleaved",),
    ),
    **dict.fromkeys(
        (
            "retain_every", "retain_momentum", "scale_max", "bisections", "repair_steps", "repair_lr", "repair_batch",
        ),
        ("rounds",),
    ),
    **dict.fromkeys(
        (
            "warmup_epochs", "share_end", "schedule", "reuse_thresholds", "mask_first", "masked",
            "protection", "protection_rate", "scale",
        ),
        ("once",),
    ),
    **dict.fromkeys(("steps", "rehearsal", "rehearsal_temperature"), ("interleaved", "rounds")),
    **dict.fromkeys(
        (
            "epochs", "soft_labels", "label_form", "criterion", "sign", "strength",
            "retain_gradient", "retain_sample", "gradient_dtype", "ternary_share", "ternary_gain", "share", "scope",
            "estimator", "overlap", "overlap_factor",
        ),
        ("rounds", "once"),
    ),
}  # fmt: skip
"""Key -> the procedures that read it, where not all do."""


class AlknParams(DescentParams):
    """Settings of ALKN; ``preset`` fills in what is not given.

    Attributes:
        preset: which of the six; its values are defaults that any key beside it overrides.
        procedure: ``interleaved``: every step negates a one-step task vector and repairs at once;
            ``rounds``: fine-tune, localise, negate, again; ``once``: one fine-tuning with masked gradients,
            one negation.
        lr, steps, decay_steps, lr_floor, check_every, batch_size, retain_batch, weight_decay, clip: see
            :class:`alkn.core.descent.Pace`; ``rounds`` and ``once`` have no schedule of steps, and
            there ``steps`` counts rounds and rate, batch, decay and norm are the fine-tuning's.
        epochs, warmup_epochs: of the fine-tuning.
            ``warmup_epochs`` (once) 0: constant rate; else linear up over so many epochs, then down to zero.
        soft_labels: weight the tokens (ESL); off: all weights one (not for ``interleaved``).
        label_form, label_scale, label_midpoint: see :func:`alkn.core.soft_labels.entropic_weights`.
        criterion: what ranks the coordinates: ``m``, the accumulated products; ``exact``,
            (θ_ft − θ) · G_r, not for ``once``; ``random`` and ``magnitude``, |θ_ft − θ| or in ``once`` the
            accumulated |G_u|, are ablations.
            ``interleaved`` localises nothing: the keeping gradient is in every step.
        sign, strength: see :func:`alkn.core.gradient_mask.accumulate_`.
        retain_gradient: ``sample`` of ``retain_sample`` records, drawn with replacement each round;
            ``full`` mean over D_r; ``paired``: a sample of as many as the request has.
        retain_every: rounds: a new G_r only every so many rounds.
        retain_momentum: rounds: share of the old G_r that stays in a new one; 0: none.
        gradient_dtype: precision that m and G_r are kept in, and a new G_r is averaged in.
        ternary_share: keep G_r in two bits: the signs of this share of each tensor's entries, the largest
            in size (equation 56); ``null``: keep the numbers.
        ternary_gain: a of equation 56.
        share: share of coordinates that may move (at the start, where a schedule changes it).
        share_end: where the schedule of ``once`` goes.
        schedule: ``constant``, ``linear`` over the training, or ``fifths``: stepwise, each fifth.
            The percentile is taken anew in every step of a request that finds thresholds.
        reuse_thresholds: later requests keep the thresholds that the first one ended with.
        scope, estimator: one percentile a tensor or over the model, and how it is found.
        mask_first: m moves before the mask is applied (the authors' code), or after it (the paper).
        masked: what the mask of ``once`` is laid on: the ``gradient``, so that momentum and weight decay still move
            what it covers, or AdamW's ``update`` of each step.
        overlap, overlap_factor: penalty μ on coordinates in M; ``none``: M is not kept.
        protection, protection_rate: rate × ``protection_rate`` on M, a coordinate or a tensor at a time (APM).
        scale: λ of ``once``; ``null``: calibrated, the smallest that meets the target.
        scale_max, bisections: the search for λ in a round; no bisection: always ``scale_max``.
        forget_loss: interleaved: ``soft_labels`` of ``label_scale`` and ``label_midpoint`` push down, see
            :func:`alkn.core.training.suppression_loss`; ``level`` brings each token to a level, see
            :func:`alkn.core.training.level_loss`.
        level_reach: where the pull to the level stops growing, in κ, see there; ``null``: nowhere.
        forget_weight: factor on that loss of a full batch, beside the keeping parts.
        alternatives: interleaved: alternative answers in a step, of the request and as many of earlier ones that are
            replayed, see :func:`alkn.core.alternatives.alternatives`; of a small request fewer. 0: none, nor are
            there any in no-retain mode.
        alternative_weight: factor on the cross-entropy on them.
        background_shift: where the level lies, see :class:`alkn.core.level.Level`.
        background_gap: how much less is expected below even odds, there as well.
        background_step: nats that these log-odds are lowered by at each measurement that misses the
            target, from a third of ``decay_steps`` on: all if exact memorization does, else the negative ones.
        damage: interleaved: share of the tokens that answers are predicted from that are replaced, in half of the
            records that are forgotten (also at an adversary's weights) or distilled, see
            :func:`alkn.core.damage.damaged`; 0: none.
        resist_weight, resist_lr, resist_steps, resist_share: interleaved: the adversary who relearns, and how much is
            done about him, see :class:`alkn.core.adversary.Resistance`; the loss at his weights is the one of
            ``level``. Weight 0: there is none.
        resist_earlier: factor on that loss for the records of earlier requests, which are replayed.
        retain_exponent: interleaved: domains of the retain records are drawn by their numbers of records to this power;
            1: each record as often as any other, 0: each domain.
        replay: interleaved: records of earlier requests in a step, of those that are above the target by themselves,
            see :class:`alkn.core.descent.Replay`; 0: none, and no earlier request's records are read.
        teacher: interleaved: whose words are kept: those of ``parent``, θ_{t-1}, or of ``origin``, the model before
            every request that is replayed, which does not wear off from request to request, and knows what they made
            it forget: it needs ``replay``.
        rehearsal: prompts that the teacher answers in its own words, to be kept like the retain records; 0: none.
        rehearsal_batch: written records in a step of ``interleaved``, beside ``retain_batch`` retain records.
        rehearsal_temperature: T at which the teacher is distilled, in these steps and in a repair.
        hidden_weight: interleaved: factor on the distance of hidden states to the teacher's, on all records that are
            kept, see :func:`alkn.core.training.state_distance`; 0: only what is said is kept.
        repair_steps, repair_lr, repair_batch: rounds: after each negation, steps that distil θ_{t-1} on
            retain and rehearsal records (KL), rate falling linearly to zero; 0 steps: no repair.
    """

    later: ClassVar = ("masked",)
    preset: Literal["interleaved", "resistant", "rounds", "derived", "paper", "reference"] = "interleaved"
    procedure: Literal["interleaved", "rounds", "once"] = "interleaved"
    decay_steps: int = Field(120, ge=1)
    lr: float = Field(5e-4, gt=0)
    epochs: int = Field(1, ge=1)
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
    retain_every: int = Field(1, ge=1)
    retain_momentum: float = Field(0.0, ge=0, lt=1)
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    ternary_share: float | None = Field(None, gt=0, le=1)
    ternary_gain: float = Field(100.0, gt=1)
    share: float = Field(0.1, ge=0, le=1)
    share_end: float = Field(0.1, ge=0, le=1)
    schedule: Literal["constant", "linear", "fifths"] = "constant"
    reuse_thresholds: bool = False
    scope: Literal["tensor", "model"] = "tensor"
    estimator: Estimator = "sampled"
    mask_first: bool = True
    masked: Literal["gradient", "update"] = "gradient"
    overlap: PenaltyForm | Literal["none"] = "none"
    overlap_factor: float = Field(1.0, ge=0)
    protection: Literal["none", "coordinate", "tensor"] = "none"
    protection_rate: float = Field(0.1, ge=0, le=1)
    scale: float | None = Field(None, gt=0)
    scale_max: float = Field(2.0, gt=0)
    bisections: int = Field(5, ge=0)
    forget_loss: Literal["soft_labels", "level"] = "level"
    level_reach: float | None = Field(None, gt=0)
    forget_weight: float = Field(0.3, gt=0)
    alternatives: int = Field(8, ge=0)
    alternative_weight: float = Field(0.6, gt=0)
    background_shift: float = 2.2
    background_gap: float = Field(0.75, ge=0)
    background_step: float = Field(0.1, ge=0)
    damage: float = Field(0.9, ge=0, lt=1)
    resist_weight: float = Field(0.0, ge=0)
    resist_lr: float = Field(1e-3, gt=0)
    resist_steps: int = Field(20, ge=1)
    resist_share: float = Field(0.1, gt=0, lt=1)
    resist_earlier: float = Field(0.5, ge=0)
    replay: int = Field(8, ge=0)
    teacher: Teacher = "origin"
    retain_exponent: float = Field(0.5, ge=0, le=1)
    rehearsal: int = Field(1200, ge=0)
    rehearsal_batch: int = Field(16, ge=1)
    rehearsal_temperature: float = Field(1.0, gt=0)
    retain_batch: int = Field(14, ge=0)
    hidden_weight: float = Field(20.0, ge=0)
    repair_steps: int = Field(0, ge=0)
    repair_lr: float = Field(2e-4, gt=0)
    repair_batch: int = Field(32, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = PRESETS.get(str(given.get("preset", "interleaved")), {})
        procedure = given.get("procedure", preset.get("procedure", "interleaved"))
        # A value that holds anyway is let pass.
        unread = [
            (key, f"procedure {procedure!r} does not read it, only {' and '.join(map(repr, READ_BY[key]))}")
            for key, value in given.items()
            if procedure not in READ_BY.get(key, (procedure,))
            and value != preset.get(key, cls.model_fields[key].get_default())
        ]
        if unread:
            raise WrongKeys(unread)
        return {**preset, **given}

    def is_written(self, key: str) -> bool:
        """Whether a dump has the key: what is not read says nothing about a step."""
        return self.procedure in READ_BY.get(key, (self.procedure,)) and super().is_written(key)

    @model_validator(mode="after")
    def _consistent(self) -> AlknParams:
        if self.procedure == "once" and self.criterion == "exact":
            raise ValueError("procedure 'once' masks gradients by criterion 'm', 'random' or 'magnitude'")
        if self.teacher == "origin" and not self.replay:
            raise ValueError("teacher 'origin' says again what was forgotten since: it needs a replay above 0")
        if self.label_form == "log_odds" and self.label_midpoint == 1:
            raise ValueError("label_form 'log_odds' takes a label_midpoint below 1")
        if self.ternary_share is not None and self.retain_momentum > 0:
            raise ValueError("retain_momentum averages gradients: it does not go with ternary_share")
        return self

    @property
    def replays(self) -> bool:
        """Whether the records of earlier requests are read."""
        return self.procedure == "interleaved" and self.replay > 0

    @property
    def ranks_by_gradient(self) -> bool:
        """Whether G_r says which coordinates may move."""
        return self.criterion in ("m", "exact")

    def sample_size(self, forget: int) -> int | None:
        """How many retain records G_r is the mean of, beside a request of so many; ``None``: all."""
        return {"sample": self.retain_sample, "paired": forget, "full": None}[self.retain_gradient]

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


def empty_m(task: Task, p: AlknParams) -> dict[str, Tensor]:
    """The mask variable at the start of its training: zeros."""
    return {
        name: torch.zeros(w.shape, dtype=DTYPES[p.gradient_dtype], device=w.device)
        for name, w in task.weights().items()
    }


def stored_gradient(
    gradient: dict[str, Tensor],
    p: AlknParams,
    *,
    generator: Generator,
    old: Mapping[str, RetainGradient] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, RetainGradient]:
    """G_r as it is kept through a round; ``gradient`` is emptied on the way, so that no tensor is held twice.

    Args:
        gradient: the new G_r in float32.
        p: ``gradient_dtype``, ``ternary_share``, ``ternary_gain``, ``retain_momentum``, ``estimator``.
        generator: randomness of a sampled threshold.
        old: the last G_r, averaged into the new one by ``retain_momentum``.
        group: processes that hold the other parts of ``gradient``; ``None``: it is whole.
    """
    out: dict[str, RetainGradient] = {}
    for name in list(gradient):
        new = gradient.pop(name)
        before = old[name] if old is not None else None
        if p.retain_momentum > 0 and isinstance(before, Tensor):
            new.mul_(1 - p.retain_momentum).add_(before, alpha=p.retain_momentum)
        if p.ternary_share is None:
            out[name] = new.to(DTYPES[p.gradient_dtype])
        else:
            # A line between two quantiles would not keep the share of what is heaped at zero.
            estimator = "sampled" if p.estimator == "trimmed_linear" else p.estimator
            eta = threshold(new.abs(), p.ternary_share, estimator=estimator, generator=generator, group=group)
            out[name] = Ternary.of(new, eta, gain=p.ternary_gain)
    return out


def move_m(
    task: Task,
    p: AlknParams,
    m: Mapping[str, Tensor],
    g_r: Mapping[str, RetainGradient],
    previous: Mapping[str, Tensor] | None,
) -> None:
    """Accumulate the model's present gradients into m, with the penalty on M where it is on."""
    gradients, shards = task.gradients(), task.shards
    used, penalties = None, []
    if p.overlap != "none" and previous is not None:
        used = [previous[name] for name in gradients]
        penalties = [
            overlap_penalty(g, g_r[n], form=p.overlap, factor=p.overlap_factor, group=shards)
            for n, g in gradients.items()
        ]
    accumulate_all_(
        [m[name] for name in gradients],
        list(gradients.values()),
        [g_r[name] for name in gradients],
        sign=p.sign,
        strength=p.strength,
        previous=used,
        penalties=penalties,
    )


def previous_mask(task: Task, p: AlknParams) -> dict[str, Tensor] | None:
    """M from the last accepted step, all false before the first; ``None`` where it is not used."""
    if p.overlap == "none" and p.protection == "none":
        return None
    return {
        name: task.part(task.state[f"mask.{name}"])
        if f"mask.{name}" in task.state
        else torch.zeros(w.shape, dtype=torch.bool, device=w.device)
        for name, w in task.weights().items()
    }


def mask_state(task: Task, mask: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """M as tensors of the step's state."""
    return {} if mask is None else {f"mask.{name}": task.whole(t) for name, t in mask.items()}
