"""ALKN: a task vector, trained with soft labels and localised by a learned mask, is subtracted.

Four presets (docs/METHOD.md): ``rounds`` negates in small rounds and is the default; ``derived``,
``paper`` and ``reference`` negate once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
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
from alkn.core.rehearsal import Keeper
from alkn.core.scoring import Batch, Scores, collate, endless_batches, mean_gradient
from alkn.core.soft_labels import SoftLabelForm, entropic_weights
from alkn.core.training import (
    Hyperparameters,
    answer_loss,
    fine_tune,
    linear_warmup,
    steps_of,
    suppression_loss,
)
from alkn.core.unlearning import Outcome, Task
from alkn.errors import TrainingDiverged
from alkn.registry import Params, register_method

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


@register_method("alkn", params=AlknParams, source=PAPER)
def alkn(task: Task, params: AlknParams) -> Outcome:
    """Unlearn by localised knowledge negation; see :class:`AlknParams` and docs/METHOD.md."""
    procedures = {"interleaved": _interleaved, "rounds": _in_rounds, "once": _at_once}
    return procedures[params.procedure](task, params)


def _interleaved(task: Task, p: AlknParams) -> Outcome:
    """Every step negates one step of the forget task vector and repairs, in one AdamW update.

    The forget part is the gradient of the soft-label weighted log-odds with its sign turned and its
    weights taken at the current model; the repair is the retain cross-entropy and the distillation
    of θ_{t-1} on records in its own words.
    """
    now = task.measure_stored()
    history, passes, step = [now.row(0)], 0, 0
    if task.stop.met(now):
        return Outcome(True, history, {}, 0)
    keeper = Keeper(task, rehearsal=p.rehearsal)
    forget_loss = suppression_loss(scale=p.label_scale, midpoint=p.label_midpoint)
    parameters = [q for q in task.model.parameters() if q.requires_grad]
    optimizer = AdamW(parameters, lr=p.lr, weight_decay=p.weight_decay, foreach=True)
    batches = endless_batches(len(task.forget), p.batch_size, task.generator("order"))
    device = parameters[0].device
    met = False
    task.model.eval()
    while step < p.steps:
        task.progress("steps", step, max(p.decay_steps, step))
        loss = keeper.loss(step, retain=p.retain_batch, written=p.rehearsal_batch)
        if not math.isfinite(float(loss.detach())):
            raise TrainingDiverged(f"step {step + 1}: the keeping loss is {float(loss.detach())}")
        loss.backward()
        if not met:
            records = next(batches)
            with task.autocast():
                loss = forget_loss(task.model, collate(task.forget, records, device=device))
            loss.backward()
            passes += len(records)
        if p.clip is not None:
            clip_grad_norm_(parameters, p.clip)
        optimizer.param_groups[0]["lr"] = p.lr * max(p.lr_floor, 1 - step / p.decay_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % p.check_every == 0 or step == p.steps:
            now = task.measure_stored()
            met = task.stop.met(now)
            history.append(now.row(step))
            if met and step >= p.decay_steps:
                break
    task.round_weights()
    task.progress("steps", step, step)
    return Outcome(met, history, {}, passes + keeper.passes)


def _label_weights(scores: Scores, p: AlknParams) -> list[Tensor] | None:
    if not p.soft_labels:
        return None
    return [
        entropic_weights(probs, form=p.label_form, scale=p.label_scale, midpoint=p.label_midpoint)
        for probs in scores.token_probs
    ]


def _in_rounds(task: Task, p: AlknParams) -> Outcome:
    """θ ← θ − λ·τ in small rounds, each repaired, until the stop rule is met."""
    now, scores = task.measure()
    history, passes = [now.row(0)], 0
    previous = used = _previous_mask(task, p)
    keeper = None if task.stop.met(now) else _keeper(task, p)
    for number in range(1, p.steps + 1):
        if keeper is None or task.stop.met(now):
            break
        task.progress("rounds", number - 1, p.steps)
        theta = task.copy_weights()
        g_r = keeper.gradient(number)
        m = _train_round(task, p, number, scores, g_r, previous)
        tau = {name: w - theta[name] for name, w in task.weights().items()}
        mask = _round_mask(task, p, number, theta, tau, g_r, m)
        for name in tau:
            tau[name].mul_(mask[name])
        if used is not None:
            used = {name: used[name] | mask[name] for name in mask}
        scale = _smallest_lambda(task, theta, tau, p)
        task.set_weights(theta, tau, scale)
        keeper.repair(number)
        now, scores = task.measure()
        passes += p.epochs * len(task.forget)
        history.append(now.row(number, scale=scale))
    task.progress("rounds", p.steps, p.steps)
    return Outcome(task.stop.met(now), history, _state(used), passes + (keeper.passes if keeper else 0))


def _keeper(task: Task, p: AlknParams) -> Keeper:
    return Keeper(
        task,
        sample=None if p.retain_gradient == "full" else p.retain_sample,
        rehearsal=p.rehearsal,
        steps=p.repair_steps,
        batch_size=p.repair_batch,
        lr=p.repair_lr,
    )


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
            picks = list(range(len(task.retain)))
            if p.retain_gradient == "sample":
                picks = torch.randint(len(task.retain), (p.retain_sample,), generator=task.generator("retain")).tolist()
            self.g_r, self.passes = mean_gradient(task.model, task.retain, picks), len(picks)
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
            out |= {f"eta.{name}": eta.cpu().clone() for name, eta in self.eta.items()}
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
