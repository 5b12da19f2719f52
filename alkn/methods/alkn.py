"""ALKN: a task vector, trained with soft labels and localised by a learned mask, is subtracted.

Four presets (docs/METHOD.md): ``rounds`` negates in small rounds and is the default; ``derived``,
``paper`` and ``reference`` negate once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from alkn.core.calibration import calibrated_scale, smallest_scale
from alkn.core.gradient_mask import (
    Estimator,
    PenaltyForm,
    Sign,
    accumulate_,
    overlap_penalty,
    threshold,
    top_share_mask,
    top_share_masks,
)
from alkn.core.scoring import Batch, Scores, mean_gradient
from alkn.core.soft_labels import SoftLabelForm, entropic_weights
from alkn.core.training import Hyperparameters, answer_loss, fine_tune, linear_warmup, steps_of
from alkn.core.unlearning import Outcome, Task
from alkn.registry import Params, register_method

PAPER = "ALKN, ICML 2025, PMLR 267, pp. 68094-68117"

REFERENCE: dict[str, Any] = {
    "rounds": 1, "lr": 2e-5, "epochs": 5, "batch_size": 64, "weight_decay": 0.01, "clip": 1.0,
    "warmup_epochs": 1, "label_form": "reference", "label_scale": 1.5, "label_midpoint": 0.8,
    "criterion": "m", "sign": "paper", "retain_gradient": "paired", "share": 0.8, "share_end": 0.4,
    "schedule": "fifths", "reuse_thresholds": True, "overlap": "product_std", "overlap_factor": 0.5,
    "protection": "tensor", "scale": 1.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "rounds": {},
    "reference": REFERENCE,
    "derived": {**REFERENCE, "sign": "derived", "scale": None},
    "paper": {
        "rounds": 1, "lr": 3e-5, "epochs": 5, "batch_size": 32, "weight_decay": 0.01, "clip": None,
        "label_form": "paper", "label_scale": 10.0, "label_midpoint": 1.0, "criterion": "m", "sign": "paper",
        "strength": 0.8, "retain_gradient": "full", "share": 1.0, "share_end": 0.3, "schedule": "linear",
        "scope": "model", "estimator": "trimmed_linear", "mask_first": False, "overlap": "gradient_std",
        "protection": "coordinate", "scale": 0.8,
    },
}  # fmt: skip


class AlknParams(Params):
    """Settings of ALKN; ``preset`` fills in what is not given.

    Attributes:
        preset: which of the four; its values are defaults that any key beside it overrides.
        rounds: most rounds; 1 negates once, with the mask applied to each gradient in training.
        lr, epochs, batch_size, weight_decay, clip, warmup_epochs: the fine-tuning of a round.
            ``warmup_epochs`` 0: constant rate; else linear up over so many epochs, then down to zero.
        soft_labels: weight the tokens (ESL); off: plain cross-entropy.
        label_form, label_scale, label_midpoint: see :func:`alkn.core.soft_labels.entropic_weights`.
        criterion: what ranks the coordinates: ``m``, the accumulated products; ``exact``,
            (θ_ft − θ) · G_r; ``random`` and ``magnitude`` are ablations. Single negation takes ``m``.
        sign, strength: see :func:`alkn.core.gradient_mask.accumulate_`.
        retain_gradient: ``sample`` of ``retain_sample`` records, drawn with replacement each round;
            ``full`` mean over D_r; ``paired``: one random retain record for each forget record of a batch.
        share: share of coordinates that may move (at the start, where a schedule changes it).
        share_end: where the schedule of the single negation goes.
        schedule: ``constant``, ``linear`` over the training, or ``fifths``: stepwise, each fifth.
        reuse_thresholds: later requests keep the thresholds that the first one ended with.
        scope, estimator: one percentile a tensor or over the model, and how it is found.
        mask_first: m moves before the mask is applied (the authors' code), or after it (the paper).
        overlap, overlap_factor: penalty μ on coordinates in M; ``none``: M is not kept.
        protection, protection_rate: rate × ``protection_rate`` on M, a coordinate or a tensor at a time (APM).
        scale: λ of the single negation; ``null``: calibrated, the smallest that meets the target.
        scale_max, bisections: the search for λ.
    """

    preset: Literal["rounds", "derived", "paper", "reference"] = "rounds"
    rounds: int = Field(30, ge=1)
    lr: float = Field(5e-4, gt=0)
    epochs: int = Field(2, ge=1)
    batch_size: int = Field(32, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)
    warmup_epochs: int = Field(0, ge=0)
    soft_labels: bool = True
    label_form: SoftLabelForm = "reference"
    label_scale: float = Field(10.0, gt=0)
    label_midpoint: float = Field(0.8, ge=0, le=1)
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {**PRESETS.get(str(given.get("preset", "rounds")), {}), **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> AlknParams:
        if self.rounds == 1 and self.criterion != "m":
            raise ValueError("a single negation (rounds: 1) masks gradients by criterion 'm'")
        if self.rounds > 1 and self.retain_gradient == "paired":
            raise ValueError("rounds take retain_gradient 'sample' or 'full'")
        return self

    def hyperparameters(self) -> Hyperparameters:
        """The part that the training loop reads."""
        return Hyperparameters(
            lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, weight_decay=self.weight_decay, clip=self.clip
        )


@register_method("alkn", params=AlknParams, source=PAPER)
def alkn(task: Task, params: AlknParams) -> Outcome:
    """Unlearn by localised knowledge negation; see :class:`AlknParams` and docs/METHOD.md."""
    return _in_rounds(task, params) if params.rounds > 1 else _at_once(task, params)


def _label_weights(scores: Scores, p: AlknParams) -> list[Tensor] | None:
    if not p.soft_labels:
        return None
    return [
        entropic_weights(probs, form=p.label_form, scale=p.label_scale, midpoint=p.label_midpoint)
        for probs in scores.token_probs
    ]


def _retain_gradient(task: Task, p: AlknParams, *names: object) -> tuple[dict[str, Tensor], int]:
    if p.retain_gradient == "full" or p.retain_sample >= len(task.retain):
        picks: Sequence[int] = range(len(task.retain))
    else:
        generator = task.generator("retain", *names)
        picks = torch.randint(len(task.retain), (p.retain_sample,), generator=generator).tolist()
    return mean_gradient(task.model, task.retain, picks), len(picks)


def _in_rounds(task: Task, p: AlknParams) -> Outcome:
    """θ ← θ − λ·τ in small rounds until the stop rule is met."""
    now, scores = task.measure()
    history, passes = [now.row(0)], 0
    previous = _previous_mask(task, p)
    for number in range(1, p.rounds + 1):
        if task.stop.met(now):
            break
        task.progress("rounds", number - 1, p.rounds)
        theta = task.copy_weights()
        g_r, cost = _retain_gradient(task, p, number)
        m = _train_round(task, p, number, scores, g_r, previous)
        passes += cost + p.epochs * len(task.forget)
        tau = {name: w - theta[name] for name, w in task.weights().items()}
        mask = _round_mask(task, p, number, theta, tau, g_r, m)
        for name in tau:
            tau[name].mul_(mask[name])
        if previous is not None:
            previous = {name: previous[name] | mask[name] for name in mask}
        scale = _smallest_lambda(task, theta, tau, p)
        task.set_weights(theta, tau, scale)
        now, scores = task.measure()
        history.append(now.row(number, scale=scale))
    task.progress("rounds", p.rounds, p.rounds)
    return Outcome(task.stop.met(now), history, _state(previous), passes)


def _train_round(
    task: Task, p: AlknParams, number: int, scores: Scores, g_r: dict[str, Tensor], previous: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Fine-tune the model on the forget set; with criterion ``m``, return m."""
    m = {name: torch.zeros_like(g) for name, g in g_r.items()} if p.criterion == "m" else None

    def move_m(_: int, __: Batch) -> None:
        if m is not None:
            _accumulate(task, p, m, g_r, previous)

    fine_tune(
        task.model,
        task.forget,
        p.hyperparameters(),
        loss=answer_loss(_label_weights(scores, p)),
        generator=task.generator("order", number),
        before_step=move_m,
        autocast=task.autocast,
        label=f"round {number}",
    )
    return m


def _round_mask(
    task: Task,
    p: AlknParams,
    number: int,
    theta: dict[str, Tensor],
    step: dict[str, Tensor],
    g_r: dict[str, Tensor],
    m: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The share of coordinates whose removal promises the retain set most."""
    if m is not None:
        ranking = m
    elif p.criterion == "exact":
        ranking = {name: step[name] * g_r[name] for name in step}
    elif p.criterion == "magnitude":
        ranking = {name: step[name].abs() for name in step}
    else:
        generator = task.generator("random mask", number)
        ranking = {n: torch.rand(t.shape, generator=generator).to(theta[n].device) for n, t in step.items()}
    return _masks(ranking, p, p.share, task.generator("percentile", number))


def _masks(m: dict[str, Tensor], p: AlknParams, share: float, generator: torch.Generator) -> dict[str, Tensor]:
    if p.scope == "model":
        return dict(top_share_masks(m, share, estimator=p.estimator, generator=generator))
    return {n: top_share_mask(t, share, estimator=p.estimator, generator=generator) for n, t in m.items()}


def _accumulate(
    task: Task, p: AlknParams, m: dict[str, Tensor], g_r: dict[str, Tensor], previous: dict[str, Tensor] | None
) -> None:
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


def _smallest_lambda(task: Task, theta: dict[str, Tensor], tau: dict[str, Tensor], p: AlknParams) -> float:
    """λ_max, or the smallest λ that meets the target if λ_max does."""

    def meets(scale: float) -> bool:
        task.set_weights(theta, tau, scale)
        return task.stop.met(task.measure()[0])

    return smallest_scale(meets, high=p.scale_max, bisections=p.bisections) or p.scale_max


def _at_once(task: Task, p: AlknParams) -> Outcome:
    """One fine-tuning whose gradients are masked as it goes, then one negation."""
    before, scores = task.measure()
    training = _MaskedTraining(task, p)
    theta = task.copy_weights()
    hp = p.hyperparameters()
    total = steps_of(len(task.forget), hp)

    def schedule(optimizer: Optimizer) -> LambdaLR:
        return linear_warmup(optimizer, warmup=total * p.warmup_epochs // p.epochs, total=total)

    fine_tune(
        task.model,
        task.forget,
        hp,
        loss=answer_loss(_label_weights(scores, p)),
        generator=task.generator("order"),
        scheduler=schedule if p.warmup_epochs else None,
        groups=training.groups(),
        before_step=training.before_step,
        after_step=training.after_step,
        autocast=task.autocast,
        progress=task.progress,
        label="task vector",
    )
    tau = {name: w - theta[name] for name, w in task.weights().items()}
    scale = p.scale if p.scale is not None else calibrated_scale(task, theta, tau)
    task.set_weights(theta, tau, scale)
    now, _ = task.measure()
    passes = p.epochs * len(task.forget) + training.passes
    return Outcome(task.stop.met(now), [before.row(0), now.row(1, scale=scale)], training.state(), passes)


class _MaskedTraining:
    """The moving parts of a single negation: m, its thresholds, M and the protected rates."""

    def __init__(self, task: Task, p: AlknParams) -> None:
        self.task, self.p = task, p
        self.steps = steps_of(len(task.forget), p.hyperparameters())
        self.m = {name: torch.zeros_like(w) for name, w in task.weights().items()}
        self.previous = _previous_mask(task, p)
        self.eta: dict[str, Tensor] = {
            name: task.state[f"eta.{name}"].to(w.device)
            for name, w in task.weights().items()
            if p.reuse_thresholds and f"eta.{name}" in task.state
        }
        self.reused = bool(self.eta)
        self.generator = task.generator("percentile")
        self.pairs = task.generator("pairs")
        self.passes = 0
        self.g_r: dict[str, Tensor] | None = None
        if p.retain_gradient != "paired":
            self.g_r, self.passes = _retain_gradient(task, p)
        self.old: dict[str, Tensor] = {}
        self.fifth = -1

    def groups(self) -> list[dict[str, object]] | None:
        """AdamW's groups: the half of the tensors in which M is densest gets the protected rate."""
        if self.p.protection != "tensor" or self.previous is None or not any(t.any() for t in self.previous.values()):
            return None
        density = {name: float(t.float().mean()) for name, t in self.previous.items()}
        dense = set(sorted(density, key=lambda n: (-density[n], n))[: len(density) // 2])
        named = [(n, q) for n, q in self.task.model.named_parameters() if q.requires_grad]
        return [
            {"params": [q for n, q in named if n in dense], "lr": self.p.lr * self.p.protection_rate},
            {"params": [q for n, q in named if n not in dense], "lr": self.p.lr},
        ]

    def before_step(self, step: int, batch: Batch) -> None:
        """Move m and mask the gradient, in the order of the preset."""
        g_r = self.g_r if self.g_r is not None else self._paired(batch)
        if self.p.mask_first:
            _accumulate(self.task, self.p, self.m, g_r, self.previous)
            self._find_thresholds(step)
        raw = {} if self.p.mask_first else self._gradients()
        for name, parameter in self.task.model.named_parameters():
            if parameter.grad is not None and name in self.eta:
                parameter.grad = parameter.grad * (self.m[name] >= self.eta[name])
        if self.p.protection == "coordinate" and self.previous is not None:
            self.old = self.task.copy_weights()
        if not self.p.mask_first:
            masked = self._swap_gradients(raw)
            _accumulate(self.task, self.p, self.m, g_r, self.previous)
            self._swap_gradients(masked)
            self._find_thresholds(step)

    def after_step(self, _: int) -> None:
        """APM a coordinate at a time: on M only ``protection_rate`` of the update stays."""
        if self.old and self.previous is not None:
            for name, w in self.task.weights().items():
                kept = torch.where(self.previous[name], self.p.protection_rate, 1.0)
                w.copy_(self.old[name] + (w - self.old[name]) * kept)

    def state(self) -> dict[str, Tensor]:
        """M ∪ 1[m ≥ η], and the thresholds where later requests reuse them."""
        out: dict[str, Tensor] = {}
        if self.previous is not None:
            mask = {n: t >= self.eta[n] for n, t in self.m.items()}
            out |= _state({n: self.previous[n] | mask[n] for n in mask})
        if self.p.reuse_thresholds:
            out |= {f"eta.{name}": eta.cpu() for name, eta in self.eta.items()}
        return out

    def _share(self, step: int) -> float:
        done = (step + 1) / self.steps
        if self.p.schedule == "linear":
            return self.p.share + (self.p.share_end - self.p.share) * done
        if self.p.schedule == "fifths":
            return self.p.share + (self.p.share_end - self.p.share) * (math.floor(step * 5 / self.steps) / 5)
        return self.p.share

    def _find_thresholds(self, step: int) -> None:
        if self.reused:
            return
        if self.p.schedule == "fifths":
            fifth = math.floor(step * 5 / self.steps)
            if fifth == self.fifth:
                return
            self.fifth = fifth
        share = self._share(step)
        if self.p.scope == "model":
            flat = torch.cat([t.reshape(-1) for t in self.m.values()])
            eta = threshold(flat, share, estimator=self.p.estimator, generator=self.generator)
            self.eta = dict.fromkeys(self.m, eta)
        else:
            self.eta = {
                n: threshold(t, share, estimator=self.p.estimator, generator=self.generator) for n, t in self.m.items()
            }

    def _paired(self, batch: Batch) -> dict[str, Tensor]:
        """The gradient on one random retain record for each forget record; the forget gradient is kept."""
        raw = self._gradients()
        picks = torch.randint(len(self.task.retain), (len(batch.records),), generator=self.pairs).tolist()
        g_r = mean_gradient(self.task.model, self.task.retain, picks)
        self.passes += len(picks)
        self._swap_gradients(raw)
        return g_r

    def _gradients(self) -> dict[str, Tensor]:
        return {n: q.grad for n, q in self.task.model.named_parameters() if q.grad is not None}

    def _swap_gradients(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        old = self._gradients()
        for name, parameter in self.task.model.named_parameters():
            parameter.grad = new.get(name)
        return old


def _previous_mask(task: Task, p: AlknParams) -> dict[str, Tensor] | None:
    """M from the last accepted step, all false before the first; ``None`` where it is not used."""
    if p.overlap == "none" and p.protection == "none":
        return None
    return {
        name: task.state[f"mask.{name}"].to(w.device)
        if f"mask.{name}" in task.state
        else torch.zeros(w.shape, dtype=torch.bool, device=w.device)
        for name, w in task.weights().items()
    }


def _state(mask: dict[str, Tensor] | None) -> dict[str, Tensor]:
    return {} if mask is None else {f"mask.{name}": t.cpu() for name, t in mask.items()}
