"""ALKN: a task vector, trained with soft labels and localised by a learned mask, is subtracted.

Six presets (docs/METHOD.md): ``interleaved``, the default, and ``resistant`` negate and repair in every step,
``rounds`` in small rounds; ``derived``, ``paper`` and ``reference`` negate once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from alkn.core.adversary import Resistance
from alkn.core.alternatives import AlternativeTerm
from alkn.core.background import BackgroundModel
from alkn.core.calibration import smallest_scale
from alkn.core.damage import through_damage
from alkn.core.descent import Keep, Pace, Together, descend
from alkn.core.gradient_mask import RetainGradient, retain_gain, top_share_mask, top_share_masks
from alkn.core.level import Level, Sureness
from alkn.core.limits import vocabulary_of
from alkn.core.rehearsal import Keeper
from alkn.core.scoring import Batch, Scores
from alkn.core.training import Weighted, answer_loss, fine_tune, level_loss, suppression_loss
from alkn.core.unlearning import Forgetting, Outcome, Task
from alkn.methods.alkn_once import at_once
from alkn.methods.alkn_params import (
    PAPER,
    AlknParams,
    empty_m,
    label_weights,
    mask_state,
    move_m,
    previous_mask,
    stored_gradient,
)
from alkn.registry import register_method

OVERTIME = 1.1
"""Factor on rate and forget weight at each measurement that misses the target when the schedule of a level is over.

Weight alone would ruin the rest where little is learned in a step any more: the balance shifts, and nothing else does.
"""


@register_method("alkn", params=AlknParams, source=PAPER)
def alkn(task: Task, params: AlknParams) -> Outcome:
    """Unlearn by localised knowledge negation; see :class:`AlknParams` and docs/METHOD.md."""
    procedures = {"interleaved": _interleaved, "rounds": _in_rounds, "once": at_once}
    return procedures[params.procedure](task, params)


def _interleaved(task: Task, p: AlknParams) -> Outcome:
    """Every step negates one step of the forget task vector and repairs, in one AdamW update.

    The repair is the retain cross-entropy and the distillation of a teacher on records in its own words: of the model
    before all requests whose records are replayed; both hold its hidden states as well. Forgotten questions are trained
    with right answers of the nearest kept records. The forget part is a loss on the log-odds of the answer tokens: each
    is brought to the level of a model that never saw the record, or soft labels push down what is known and rest while
    the target is met. What is forgotten and what the teacher says is asked for behind damaged answers too. An adversary
    who relearns may be held off in the same update.
    """
    before, _ = task.measure_stored()
    if task.stop.met(before):
        return Outcome(True, [before.row(0)], {}, 0)
    keep = None
    if p.retain_batch or p.rehearsal:
        task.require_retain("method.retain_batch, method.rehearsal", "expected 0 for both")
        keep = Keeper(
            task, rehearsal=p.rehearsal, retain_batch=p.retain_batch, rehearsal_batch=p.rehearsal_batch,
            temperature=p.rehearsal_temperature, teacher=p.teacher,
            exponent=p.retain_exponent, damage=p.damage, hidden=p.hidden_weight,
        )  # fmt: skip
    pushes = p.forget_loss == "soft_labels"
    pace = p.pace() if pushes else dataclasses.replace(p.pace(), overtime=OVERTIME)
    level = None
    if not pushes or p.resist_weight:
        level = _level(task, keep, p)
        to_level = level_loss(level.odds, scale=level.scale, reach=p.level_reach)
    resist = None
    if p.resist_weight:
        his = through_damage(to_level, p.damage, task.generator("damage", "resist"))
        resist = Resistance(his, p.resist_weight, p.resist_lr, p.resist_steps, p.resist_share, p.resist_earlier)
    forget = suppression_loss(scale=p.label_scale, midpoint=p.label_midpoint) if pushes else to_level
    forget = Weighted(through_damage(forget, p.damage, task.generator("damage")), p.forget_weight)

    def lower(step: int, now: Forgetting) -> None:
        if level is None or 3 * step < p.decay_steps:
            return
        level.lower(now, task.stop, by=p.background_step)
        forget.weight = p.forget_weight * pace.growth(step)

    lowering = None if pushes else lower
    # In every step and with all the weight, the few records of a small request take what resembles them along.
    return descend(
        task, pace, forget=forget, keep=_with_alternatives(task, keep, p, pace), on_measure=lowering, rest=pushes,
        resist=resist, replay=p.replay, portion=pace.portion(len(task.forget)),
    )  # fmt: skip


def _with_alternatives(task: Task, keep: Keeper | None, p: AlknParams, pace: Pace) -> Keep | None:
    """What keeps, and beside it what shall be said instead, where there is such a thing."""
    if keep is None or not p.alternatives:
        return keep
    instead = AlternativeTerm(
        task, batch_size=p.alternatives, weight=p.alternative_weight,
        share=lambda records: pace.portion(records) / pace.batch_size,
    )  # fmt: skip
    return Together(keep, instead) if instead else keep


def _level(task: Task, keep: Keeper | None, p: AlknParams) -> Level:
    """The level of this and the earlier requests' records, lowered until who says just that meets the target.

    Of answers that are built alike it would guess too much.
    """
    background = BackgroundModel(keep.pool if keep else [], vocab_size=vocabulary_of(task.model))
    sureness = Sureness.of(keep.teacher if keep else task.model, task.retain or task.forget, background)
    records = [*task.forget, *task.earlier]
    level = Level(background, records, sureness, shift=p.background_shift, gap=p.background_gap)
    while p.background_step and level.lower(level.said(), task.stop, by=p.background_step):
        pass
    return level


def _in_rounds(task: Task, p: AlknParams) -> Outcome:
    """θ ← θ − λ·τ in small rounds, each repaired, until the stop rule is met."""
    now, scores = task.measure()
    history, passes = [now.row(0)], 0
    previous = previous_mask(task, p)
    used = None if previous is None else {name: t.clone() for name, t in previous.items()}
    keeper = None if task.stop.met(now) else _keeper(task, p)
    g_r: dict[str, RetainGradient] = {}
    for number in range(1, p.steps + 1):
        if keeper is None or task.stop.met(now):
            break
        task.progress("rounds", number - 1, p.steps)
        if p.ranks_by_gradient and (number - 1) % p.retain_every == 0:
            sampling = task.generator("ternary", number)
            g_r = stored_gradient(keeper.gradient(number), p, generator=sampling, old=g_r or None, group=task.shards)
        scale, now, scores = _round(task, p, number, scores, g_r, previous, used)
        if p.repair_steps:
            keeper.repair(number)
            now, scores = task.measure()
        passes += p.epochs * len(task.forget)
        history.append(now.row(number, scale=scale))
    task.progress("rounds", p.steps, p.steps)
    return Outcome(task.stop.met(now), history, mask_state(task, used), passes + (keeper.passes if keeper else 0))


def _keeper(task: Task, p: AlknParams) -> Keeper:
    if p.ranks_by_gradient or p.rehearsal or p.repair_steps:
        keys = "method.criterion, method.rehearsal, method.repair_steps"
        task.require_retain(keys, "'random' or 'magnitude', 0 and 0 need none")
    return Keeper(
        task,
        sample=p.sample_size(len(task.forget)),
        gradient_batch=p.batch_size,
        rehearsal=p.rehearsal,
        steps=p.repair_steps,
        batch_size=p.repair_batch,
        lr=p.repair_lr,
        temperature=p.rehearsal_temperature,
    )


def _round(
    task: Task,
    p: AlknParams,
    number: int,
    scores: Scores,
    g_r: Mapping[str, RetainGradient],
    previous: dict[str, Tensor] | None,
    used: dict[str, Tensor] | None,
) -> tuple[float, Forgetting, Scores]:
    """Fine-tune, localise, negate; λ and what was measured there. θ, τ and m are gone when it returns."""
    theta = task.copy_weights()
    m = _train_round(task, p, number, scores, g_r, previous)
    tau = {name: w - theta[name] for name, w in task.weights().items()}
    _localise_(tau, task, p, number, g_r, m, used)
    return _negate(task, theta, tau, p)


def _train_round(
    task: Task,
    p: AlknParams,
    number: int,
    scores: Scores,
    g_r: Mapping[str, RetainGradient],
    previous: dict[str, Tensor] | None,
) -> dict[str, Tensor] | None:
    """Fine-tune the model on the forget set; with criterion ``m``, return m."""
    m = empty_m(task, p) if p.criterion == "m" else None

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


def _localise_(
    tau: dict[str, Tensor],
    task: Task,
    p: AlknParams,
    number: int,
    g_r: Mapping[str, RetainGradient],
    m: dict[str, Tensor] | None,
    used: dict[str, Tensor] | None,
) -> None:
    """Keep of τ the share of coordinates whose removal promises the retain set most, and add them to M.

    A tensor at a time where the percentile is a tensor's: rankings and masks of the others need no room then.
    """
    chance = task.generator("random mask", number)
    percentile = task.generator("percentile", number)

    def ranking(name: str) -> Tensor:
        if m is not None:
            return m[name]
        if p.criterion == "exact":
            return retain_gain(tau[name], g_r[name])
        if p.criterion == "magnitude":
            return tau[name].abs()
        return task.random(name, chance)

    whole: Mapping[str, Tensor] = {}
    shards = task.shards
    if p.scope == "model":
        everything = {name: ranking(name) for name in tau}
        whole = top_share_masks(everything, p.share, estimator=p.estimator, generator=percentile, group=shards)
    for name, change in tau.items():
        mask = (
            whole[name]
            if p.scope == "model"
            else top_share_mask(ranking(name), p.share, estimator=p.estimator, generator=percentile, group=shards)
        )
        if used is not None:
            used[name] |= mask
        change.mul_(mask)


def _negate(
    task: Task, theta: dict[str, Tensor], tau: dict[str, Tensor], p: AlknParams
) -> tuple[float, Forgetting, Scores]:
    """θ ← θ − λ·τ with λ_max, or the smallest λ that meets the target if λ_max does; λ and what was measured there."""
    measured: dict[float, tuple[Forgetting, Scores]] = {}

    def meets(scale: float) -> bool:
        task.set_weights(theta, tau, scale)
        measured[scale] = task.measure()
        return task.stop.met(measured[scale][0])

    scale = smallest_scale(meets, high=p.scale_max, bisections=p.bisections) or p.scale_max
    task.set_weights(theta, tau, scale)
    return scale, *measured[scale]
