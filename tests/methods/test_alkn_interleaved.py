"""ALKN interleaved: it forgets, keeps, rests, and holds off an adversary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from alkn_cases import interleaved_of
from method_cases import CPU, NEVER, STOP, forgetting_of, p_of, task_of
from randomness import seeded
from scipy.special import expit

from alkn.core.alternatives import alternatives
from alkn.core.background import BackgroundModel
from alkn.core.damage import damaged
from alkn.core.descent import Pace, descend
from alkn.core.generation import greedy
from alkn.core.level import Level, Sureness
from alkn.core.scoring import Batch, Scores, answer_logits, collate, score
from alkn.core.unlearning import Forgetting, Outcome, StopRule, Task
from alkn.errors import InputError
from alkn.methods.alkn import OVERTIME, _level, alkn
from alkn.methods.alkn_params import AlknParams


def test_interleaved_meets_the_target_and_keeps_the_retain_set(memorised: Any, full_forward: Any) -> None:
    """Both numbers, by full forwards; what it says of the last step is what the model is."""
    task = task_of(memorised)
    outcome = alkn(task, interleaved_of())
    assert outcome.reached and STOP.met(forgetting_of(task.model, memorised.forget, full_forward))
    assert p_of(task.model, memorised.retain) > 0.9
    last = outcome.history[-1]
    now = Forgetting.of(score(task.model, memorised.forget))
    assert (last["p"], last["exact_memorization"]) == (now.p, now.exact_memorization)
    assert [row["round"] for row in outcome.history] == list(range(0, int(last["round"]) + 1, 5))
    assert last["round"] >= 60 and outcome.state == {}


def test_interleaved_reports_a_target_out_of_reach(memorised: Any) -> None:
    """All steps are taken; each passes two forget records, six retain and six written ones, all finite."""
    task = task_of(memorised, stop=NEVER)
    outcome = alkn(task, interleaved_of(steps=20))
    assert not outcome.reached and [row["round"] for row in outcome.history] == [0, 5, 10, 15, 20]
    assert 0 < outcome.passes - 20 * (2 + 6 + 6) <= 12
    assert all(bool(torch.isfinite(w).all()) for w in task.weights().values())


def test_interleaved_measures_the_model_that_it_leaves(memorised: Any) -> None:
    """Where the last step is no multiple of ``check_every``: both the verdict and the last row are of that model."""
    task = task_of(memorised, stop=NEVER)
    outcome = alkn(task, interleaved_of(steps=17))
    assert outcome.history[-1]["p"] == Forgetting.of(score(task.model, memorised.forget)).p


@pytest.mark.parametrize(("every", "batch_size", "taken"), [(3, 6, 2), (4, 6, 2), (1, 4, 4), (2, 2, 2), (50, 6, 1)])
def test_an_epoch_takes_at_least_as_long_as_a_measurement(
    every: int, batch_size: int, taken: int, memorised: Any
) -> None:
    """Six records that are known by heart: with three steps between measurements, two of them a step."""
    for loss in ("soft_labels", "level"):
        task = task_of(memorised, stop=NEVER)
        bare = {"retain_batch": 0, "rehearsal": 0, "lr": 1e-9, "steps": 12, "forget_loss": loss}
        assert alkn(task, interleaved_of(**bare, check_every=every, batch_size=batch_size)).passes == 12 * taken


def test_a_record_of_a_small_request_pulls_as_hard_as_any(memorised: Any) -> None:
    """Two of six records a step, where a batch could hold six: a third of the weight of a batch."""
    left = []
    for batch_size, weight in ((6, 0.75), (2, 0.25), (2, 0.75)):
        task = task_of(memorised, stop=NEVER)
        alkn(task, interleaved_of(steps=6, check_every=3, batch_size=batch_size, forget_weight=weight))
        left.append(torch.cat([w.flatten() for w in task.weights().values()]))
    assert torch.equal(left[0], left[1]) and not torch.equal(left[0], left[2])


def test_interleaved_without_rehearsal(memorised: Any) -> None:
    """Then nothing is written, and only retain records keep."""
    task = task_of(memorised, stop=NEVER)
    assert alkn(task, interleaved_of(steps=20, rehearsal=0)).passes == 20 * (2 + 6)


def test_interleaved_without_retain_records(memorised: Any) -> None:
    """No-retain mode: nothing is kept and nothing is drawn on; asking for either names the keys."""
    task = Task(model=memorised.model(), forget=memorised.forget, retain=[], stop=STOP, seed=0)
    outcome = alkn(task, interleaved_of(rehearsal=0, retain_batch=0, alternatives=8, hidden_weight=20.0))
    assert outcome.reached and outcome.passes == 2 * outcome.history[-1]["round"]
    task = Task(model=memorised.model(), forget=memorised.forget, retain=[], stop=STOP, seed=0)
    outcome = alkn(task, interleaved_of(rehearsal=0, retain_batch=0, forget_loss="soft_labels"))
    pushed = [row for row in outcome.history[:-1] if not STOP.met(Forgetting(row["p"], row["exact_memorization"]))]
    assert outcome.reached and 0 < outcome.passes <= 2 * 5 * len(pushed), "two a step, less those that rest"
    with pytest.raises(InputError, match="method.retain_batch, method.rehearsal: there is no retain record"):
        alkn(Task(model=memorised.model(), forget=memorised.forget, retain=[], stop=STOP, seed=0), interleaved_of())


def test_interleaved_leaves_tokens_that_anybody_would_guess(memorised: Any) -> None:
    """Where the level is that of what the model was trained on, the records stay as likely; far below, all are gone."""
    likely: dict[float, Scores] = {}
    for shift in (1e3, -10.0):
        task = task_of(memorised, stop=NEVER)
        alkn(task, interleaved_of(steps=120, background_shift=shift, background_step=0, damage=0.0))
        likely[shift] = score(task.model, memorised.forget)
    assert float(likely[-10.0].probability.mean()) < 1e-3
    level = _level(task_of(memorised, stop=NEVER), None, interleaved_of(background_shift=1e3, background_step=0))
    guessed = torch.cat(likely[1e3].token_log_probs).double()
    assert abs(float((guessed - torch.log(-torch.expm1(guessed))).median() - level.odds[0][0])) < 1.5


def test_damage_brings_to_the_level_behind_other_words_too(memorised: Any) -> None:
    """Mean distance of the log-odds from the level, behind damaged answers: less than half of what it is without damage
    in the training."""
    batch = damaged(collate(memorised.forget * 20, range(120), device=CPU), 0.6, seeded(3))
    off = []
    bare = {"background_shift": 3.5, "background_step": 0, "retain_batch": 0, "rehearsal": 0}
    for share in (0.0, 0.6):
        task, p = task_of(memorised, stop=NEVER), interleaved_of(damage=share, steps=300, decay_steps=300, **bare)
        level = _level(task, None, p)
        alkn(task, p)
        with torch.no_grad():
            said = answer_logits(task.model, batch).double().softmax(-1).gather(1, batch.targets[:, None])
        off.append(float((torch.logit(said)[:, 0] - torch.cat(level.odds * 20)).abs().mean()))
    assert off[1] < 0.5 * off[0]


@pytest.mark.parametrize(
    ("given", "each_step"),
    [
        ({}, [6, 2]),
        ({"forget_loss": "soft_labels"}, [6, 2]),
        ({"preset": "resistant"}, [6, 2, 5]),
        ({"damage": 0.0}, []),
    ],
)
def test_what_is_damaged(
    given: dict[str, Any], each_step: list[int], memorised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each step the written records, the forgotten ones, and those that the adversary does not have."""
    seen: list[tuple[int, float]] = []

    def watched(batch: Batch, share: float, generator: torch.Generator) -> Batch:
        seen.append((len(batch.records), share))
        return damaged(batch, share, generator)

    monkeypatch.setattr("alkn.core.damage.damaged", watched)
    alkn(task_of(memorised, stop=NEVER), interleaved_of(**{"damage": 0.3, "steps": 4, "lr": 1e-9} | given))
    assert seen == [(count, 0.3) for count in each_step] * 4


def test_resistant_pays_for_an_adversary(memorised: Any) -> None:
    """Without keeping parts: two forget records a step, one that he has, five that he has not."""
    plain, held = (
        alkn(
            task_of(memorised, stop=NEVER),
            AlknParams(preset="resistant", steps=7, rehearsal=0, retain_batch=0, resist_weight=weight),
        )
        for weight in (0.0, 0.3)
    )
    assert (plain.passes, held.passes) == (7 * 2, 7 * (2 + 1 + 5))
    assert plain.history[-1] != held.history[-1]


@pytest.mark.parametrize("by", [0.0, 0.2])
def test_a_level_that_would_miss_the_target_is_lowered_before_the_training(by: float, memorised: Any) -> None:
    """From the model's own mean log-odds everywhere, in steps of 0.2, to the first that is at the target of P .01."""
    p = interleaved_of(background_shift=1e3, background_step=by)
    odds = torch.cat(_level(task_of(memorised), None, p).odds)
    assert float(odds.max() - odds.min()) < 1e-5
    assert (expit(float(odds[0])) <= STOP.p) == (by > 0)
    assert expit(float(odds[0]) + 0.2) > STOP.p


def test_a_level_at_the_target_is_left_alone(memorised: Any) -> None:
    """With a target that anything meets: the level of the background, as sure as the model."""
    task = task_of(memorised, stop=StopRule(1.0, 1.0))
    found = _level(task, None, interleaved_of())
    background = BackgroundModel([], vocab_size=300)
    sureness = Sureness.of(task.model, memorised.retain, background)
    assert found.scale == sureness.scale
    torch.testing.assert_close(found.odds, Level(background, memorised.forget, sureness, shift=2.2, gap=0.75).odds)


def test_expectations_above_the_target_are_lowered(memorised: Any) -> None:
    """A level at which everything stays known: lowered, the records end forgotten; else not."""
    high = {"background_shift": 1e3, "steps": 120}
    reached = {by: alkn(task_of(memorised), interleaved_of(**high, background_step=by)).reached for by in (0.0, 0.7)}
    assert reached == {0.0: False, 0.7: True}


def test_the_level_is_lowered_at_measurements_from_a_third_of_the_schedule_on(
    memorised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By .1 where exact memorization is missed, and not before step 40 of 120, nor where the target is met."""
    given: dict[str, Any] = {}

    def watched(task: Task, pace: Pace, **more: Any) -> Outcome:
        given.update(more)
        return descend(task, pace, **more)

    def kept(*arguments: Any) -> Level:
        given["level"] = _level(*arguments)
        return given["level"]

    monkeypatch.setattr("alkn.methods.alkn.descend", watched)
    monkeypatch.setattr("alkn.methods.alkn._level", kept)
    alkn(task_of(memorised, stop=STOP), interleaved_of(steps=1, decay_steps=120, background_step=0.1))

    def after(step: int, now: Forgetting) -> float:
        before = torch.cat(given["level"].odds).clone()
        given["on_measure"](step, now)
        return float((before - torch.cat(given["level"].odds)).mean())

    missed, met = Forgetting(0.9, 0.9), Forgetting(0.0, 0.0)
    assert [after(*one) for one in ((39, missed), (40, missed), (45, met), (45, missed))] == pytest.approx(
        [0.0, 0.1, 0.0, 0.1], abs=1e-5
    )


def test_what_the_keeping_parts_hold_on_to_is_forgotten_in_overtime(
    memorised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no weight the target is not met in 400 steps; it is where both grow after the schedule."""
    p = interleaved_of(forget_weight=0.002, decay_steps=20, steps=400)
    assert alkn(task_of(memorised), p).reached
    monkeypatch.setattr("alkn.methods.alkn.OVERTIME", 1.0)
    assert not alkn(task_of(memorised), p).reached


@pytest.mark.parametrize(("forget_loss", "expected"), [("level", OVERTIME), ("soft_labels", 1.0)])
def test_the_rate_grows_in_overtime_beside_the_weight(
    forget_loss: str, expected: float, memorised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft labels have no weight that grows, and their rate stays."""
    paces: list[Pace] = []

    def watched(task: Task, pace: Pace, **more: Any) -> Outcome:
        paces.append(pace)
        return descend(task, pace, **more)

    monkeypatch.setattr("alkn.methods.alkn.descend", watched)
    alkn(task_of(memorised, stop=NEVER), interleaved_of(steps=1, forget_loss=forget_loss))
    (pace,) = paces
    assert pace.overtime == expected and pace.rate(60) == pytest.approx(2e-3 * 0.1 * expected)


def test_alternatives_are_what_is_said_instead(memorised: Any) -> None:
    """Forgotten either way; with the key each question is answered with the answer of the nearest kept one."""
    config: Any = memorised.trained.config
    wanted = alternatives(memorised.forget, memorised.retain, vocab_size=config.vocab_size)
    prompts = [example.tokens[: example.answer_start] for example in memorised.forget]
    said = {}
    for given in ({}, {"alternatives": 48, "alternative_weight": 8.0}):
        task = task_of(memorised)
        outcome = alkn(task, interleaved_of(**given))
        assert outcome.reached and p_of(task.model, memorised.retain) > 0.9
        answers = greedy(task.model, prompts, eos=int(memorised.retain[0].tokens[-1]), max_new_tokens=8)
        said[len(given)] = sum(
            one is not None and one.tokens[one.answer_start : -1].tolist() == answer
            for one, answer in zip(wanted, answers, strict=True)
        )
    assert said[2] == sum(one is not None for one in wanted) > len(prompts) / 2 > said[0], said


def test_alternatives_of_a_small_request_are_few_and_weigh_little(memorised: Any) -> None:
    """A fifth of them, of 16, is their part of a full batch, in number and in weight; so of earlier ones."""
    task = task_of(memorised, stop=NEVER, earlier=memorised.second)
    config: Any = task.model.config
    few = 0
    for asked in (task.forget, task.earlier):
        there = sum(x is not None for x in alternatives(asked, task.retain, vocab_size=config.vocab_size))
        few += math.ceil(32 * math.ceil(there / 5) / 16)
    p = interleaved_of(steps=20, rehearsal=0, alternatives=32, lr=1e-9, replay=1, teacher="parent")
    assert few >= 4 and alkn(task, p).passes == 20 * (2 + 6 + few + 1)
    moved = []
    for batch_size, weight, count in ((16, 0.4, 48), (8, 0.2, 24), (8, 0.4, 24)):
        task = task_of(memorised, stop=NEVER)
        given = {"batch_size": batch_size, "forget_weight": batch_size / 16, "steps": 6}
        alkn(task, interleaved_of(**given, alternatives=count, alternative_weight=weight))
        moved.append(torch.cat([w.flatten() for w in task.weights().values()]))
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
