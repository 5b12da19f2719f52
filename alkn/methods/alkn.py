"""ALKN: a task vector, trained with soft labels and localised by a learned mask, is subtracted.

Five presets (docs/METHOD.md): ``interleaved``, the default, negates and repairs in every step,
``rounds`` in small rounds; ``derived``, ``paper`` and ``reference`` negate once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from alkn.core.calibration import smallest_scale
from alkn.core.gradient_mask import (
    top_share_mask,
    top_share_masks,
)
from alkn.core.rehearsal import Keeper
from alkn.core.scoring import Batch, Scores, collate, endless_batches
from alkn.core.training import (
    answer_loss,
    fine_tune,
    suppression_loss,
)
from alkn.core.unlearning import Outcome, Task
from alkn.errors import TrainingDiverged
from alkn.methods.alkn_once import at_once
from alkn.methods.alkn_params import PAPER, AlknParams, label_weights, mask_state, move_m, previous_mask
from alkn.registry import register_method


@register_method("alkn", params=AlknParams, source=PAPER)
def alkn(task: Task, params: AlknParams) -> Outcome:
    """Unlearn by localised knowledge negation; see :class:`AlknParams` and docs/METHOD.md."""
    procedures = {"interleaved": _interleaved, "rounds": _in_rounds, "once": at_once}
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


def _in_rounds(task: Task, p: AlknParams) -> Outcome:
    """θ ← θ − λ·τ in small rounds, each repaired, until the stop rule is met."""
    now, scores = task.measure()
    history, passes = [now.row(0)], 0
    previous = used = previous_mask(task, p)
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
    return Outcome(task.stop.met(now), history, mask_state(used), passes + (keeper.passes if keeper else 0))


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

    def on_gradient(_: int, __: Batch) -> None:
        if m is not None:
            move_m(task, p, m, g_r, previous)

    fine_tune(
        task.model,
        task.forget,
        p.hyperparameters(),
        loss=answer_loss(label_weights(scores, p)),
        generator=task.generator("order", number),
        before_step=on_gradient,
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


def _smallest_lambda(task: Task, theta: dict[str, Tensor], tau: dict[str, Tensor], p: AlknParams) -> float:
    """λ_max, or the smallest λ that meets the target if λ_max does."""

    def meets(scale: float) -> bool:
        task.set_weights(theta, tau, scale)
        return task.stop.met(task.measure()[0])

    return smallest_scale(meets, high=p.scale_max, bisections=p.bisections) or p.scale_max
