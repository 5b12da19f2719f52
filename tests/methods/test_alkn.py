"""ALKN on a tiny model that knows its records: presets, one step by hand, rounds, calibration, state, determinism."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from scipy.special import expit
from torch import Tensor, nn

from alkn.core.calibration import calibrated_scale, smallest_scale
from alkn.core.scoring import Scores, mean_gradient, score
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.core.unlearning import Forgetting, Outcome, StopRule, Task, seed_of
from alkn.errors import InputError
from alkn.methods.alkn import alkn
from alkn.methods.alkn_once import MaskedTraining
from alkn.methods.alkn_params import READ_BY, AlknParams
from alkn.registry import methods

PRESETS = ("interleaved", "resistant", "rounds", "derived", "reference", "paper")
STOP = StopRule(p=0.01, exact_memorization=0.2)
NEVER = StopRule(p=0.0, exact_memorization=0.0)


def rounds_of(**more: Any) -> AlknParams:
    """``rounds`` with a rate for a model of 30,000 parameters and a sample of 9 of its 12 retain records."""
    return AlknParams.model_validate({"preset": "rounds", "lr": 5e-3, "retain_sample": 9} | more)


def interleaved_of(**more: Any) -> AlknParams:
    """``interleaved`` in small: twelve written records, a rate for so small a model, half the steps."""
    small = {"lr": 2e-3, "rehearsal": 12, "rehearsal_batch": 6, "retain_batch": 6, "decay_steps": 60, "steps": 200}
    return AlknParams.model_validate({"preset": "interleaved"} | small | more)


def task_of(memorised: Any, *, stop: StopRule = STOP, seed: int = 0, second: bool = False, **more: Any) -> Task:
    forget = memorised.second if second else memorised.forget
    model = more.pop("model", None) or memorised.model()
    return Task(model=model, forget=forget, retain=memorised.retain, stop=stop, seed=seed, **more)


def changes(task: Task, memorised: Any) -> dict[str, Tensor]:
    start = dict(memorised.trained.named_parameters())
    return {name: w - start[name].detach() for name, w in task.weights().items()}


def p_of(model: nn.Module, records: Any) -> float:
    return float(score(model, records).probability.mean())


# Presets

SETTINGS: dict[str, dict[str, Any]] = {
    "rounds": {
        "procedure": "rounds", "steps": 30, "lr": 5e-4, "epochs": 2,
        "batch_size": 32, "weight_decay": 0.0, "clip": 1.0, "warmup_epochs": 0,
        "soft_labels": True, "label_form": "reference", "label_scale": 10.0, "label_midpoint": 0.8,
        "sign": "derived", "strength": 1.0, "retain_gradient": "sample", "retain_sample": 320, "share": 0.1,
        "scope": "tensor", "estimator": "sampled", "overlap": "none", "scale_max": 2.0, "bisections": 5,
        "rehearsal": 0, "repair_steps": 0,
    },
    "reference": {
        "procedure": "once", "lr": 2e-5, "epochs": 5, "batch_size": 64, "weight_decay": 0.01, "clip": 1.0,
        "warmup_epochs": 1, "soft_labels": True, "label_form": "reference", "label_scale": 1.5,
        "label_midpoint": 0.8, "criterion": "m",
        "sign": "paper", "strength": 1.0, "retain_gradient": "paired", "share": 0.8, "share_end": 0.4,
        "schedule": "fifths", "reuse_thresholds": True, "scope": "tensor", "mask_first": True,
        "overlap": "product_std", "overlap_factor": 0.5, "protection": "tensor", "protection_rate": 0.1, "scale": 1.0,
    },
    "paper": {
        "procedure": "once", "lr": 3e-5, "epochs": 5, "batch_size": 32, "weight_decay": 0.01, "clip": None,
        "soft_labels": True, "label_form": "paper", "label_scale": 10.0, "label_midpoint": 1.0, "criterion": "m",
        "sign": "paper", "strength": 0.8, "retain_gradient": "full", "share": 1.0, "share_end": 0.3,
        "schedule": "linear", "reuse_thresholds": False, "estimator": "trimmed_linear", "mask_first": False,
        "overlap": "gradient_std", "overlap_factor": 1.0, "protection": "coordinate", "protection_rate": 0.1,
        "scale": 0.8,
    },
}  # fmt: skip
SETTINGS["derived"] = {**SETTINGS["reference"], "sign": "derived", "scale": None}


@pytest.mark.parametrize("preset", SETTINGS)
def test_presets_are_those_of_method_md(preset: str) -> None:
    """The values above are written down from docs/METHOD.md, not from the code."""
    params = AlknParams(preset=preset)  # type: ignore[arg-type]
    assert {key: getattr(params, key) for key in SETTINGS[preset]} == SETTINGS[preset]


def test_interleaved_is_the_default_and_the_method_is_registered() -> None:
    assert AlknParams() == AlknParams(preset="interleaved") and AlknParams().procedure == "interleaved"
    assert methods["alkn"].params is AlknParams and methods["alkn"].call is alkn


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_beside_a_preset_override_it(preset: str) -> None:
    """Also with a value that is a default elsewhere, and nothing else changes."""
    plain = AlknParams(preset=preset).model_dump()  # type: ignore[arg-type]
    for key, value in (("lr", 1e-3), ("clip", None), ("share", 0.25), ("scale", 3.0), ("weight_decay", 0.0)):
        if plain["procedure"] not in READ_BY.get(key, (plain["procedure"],)):
            continue
        given = AlknParams.model_validate({"preset": preset, key: value}).model_dump()
        assert given == plain | {key: value}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"procedure": "once", "label_form": "paper"}, "procedure 'once' masks gradients by criterion 'm'"),
        ({"preset": "derived", "criterion": "exact"}, "procedure 'once' masks gradients by criterion 'm'"),
        ({"preset": "rounds", "retain_gradient": "paired"}, "takes retain_gradient 'sample' or 'full'"),
        ({"preset": "reference", "procedure": "rounds"}, "takes retain_gradient 'sample' or 'full'"),
        (
            {"preset": "rounds", "label_form": "log_odds", "label_midpoint": 1},
            "'log_odds' takes a label_midpoint below 1",
        ),
        ({"preset": "round"}, "Input should be 'interleaved', 'resistant', 'rounds'"),
        ({"lrr": 1e-3}, "Extra inputs are not permitted"),
        ({"preset": "rounds", "share": 1.5}, "less than or equal to 1"),
        ({"preset": "paper", "scale": 0}, "greater than 0"),
        ({"clip": 0}, "greater than 0"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"lr": "fast"}, "valid number"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AlknParams.model_validate(values)


def test_a_key_that_the_procedure_does_not_read_is_an_error() -> None:
    """Key and procedure are named; what a preset fills in is nobody's mistake, nor is a value that holds anyway."""
    for procedure in ("interleaved", "rounds", "once"):
        preset = {"interleaved": "interleaved", "rounds": "rounds", "once": "paper"}[procedure]
        defaults = AlknParams(preset=preset).model_dump()  # type: ignore[arg-type]
        for key, value in defaults.items():
            assert AlknParams.model_validate({"preset": preset, key: value}).model_dump() == defaults
            other = not value if isinstance(value, bool) else 0.5 if value is None or isinstance(value, float) else "x"
            with pytest.raises(ValidationError) as error:
                AlknParams.model_validate({"preset": preset, key: other if other != value else 0.25, "lr": -1})
            told = f"{key}: procedure '{procedure}' does not read it, only "
            assert (told in str(error.value)) == (procedure not in READ_BY.get(key, (procedure,))), key
    with pytest.raises(ValidationError) as error:
        AlknParams.model_validate({"share": 0.5, "scale": 1.0})
    (cause,) = (item["ctx"]["error"] for item in error.value.errors())
    assert [key for key, _ in cause.faults] == ["share", "scale"]
    assert cause.faults[0][1].endswith("only 'rounds' and 'once'")


class Watched(AlknParams):
    """Parameters that note which of them are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in AlknParams.model_fields:
            READ.add(name)
        return super().__getattribute__(name)

    def model_dump(self, **more: Any) -> dict[str, Any]:
        READ.update(more["include"])
        return super().model_dump(**more)


READ: set[str] = set()
EVERYTHING: dict[str, list[dict[str, Any]]] = {
    "interleaved": [
        {"steps": 2, "rehearsal": 2, "decay_steps": 1, "check_every": 1},
        {"steps": 5, "rehearsal": 2, "forget_loss": "cross_entropy", "decay_steps": 1, "resist_weight": 0.2},
    ],
    "rounds": [
        {"steps": 2, "criterion": "m", "overlap": "product_std", "repair_steps": 1, "ternary_share": 0.5},
        {"steps": 1, "rehearsal": 2},
    ],
    "once": [{"preset": "paper"}, {"preset": "reference"}, {"preset": "paper", "retain_gradient": "sample",
                                                           "ternary_share": 0.5}],
}  # fmt: skip


@pytest.mark.parametrize("procedure", EVERYTHING)
def test_which_procedure_reads_which_key(procedure: str, memorised: Any) -> None:
    """By watching runs: no key is read that the table denies, and what it grants is read in one of them."""
    read = set()
    for values in EVERYTHING[procedure]:
        short = {"lr": 1e-4} if procedure == "interleaved" else {"lr": 1e-4, "epochs": 1}
        params = Watched.model_validate({"preset": procedure, **short, **values})
        READ.clear()
        alkn(task_of(memorised, stop=NEVER), params)
        read |= READ
    granted = {key for key in AlknParams.model_fields if procedure in READ_BY.get(key, (procedure,))}
    # Shared parts look at these two in passing, where they change nothing of the model.
    assert read - granted <= {"protection", "retain_momentum"}
    assert granted - read == {"preset"}


# One step, by hand


def gradients(model: nn.Module, loss: Tensor) -> dict[str, np.ndarray]:
    names, params = zip(*model.named_parameters(), strict=True)
    return {n: g.numpy() for n, g in zip(names, torch.autograd.grad(loss, params), strict=True)}


@pytest.mark.parametrize("sign", ["derived", "paper"])
def test_one_masked_step_by_numpy(sign: str, memorised: Any, full_forward: Any) -> None:
    """θ_t after one step: soft labels, clip, m, the top 30 % a tensor, AdamW's first step, λ = 2."""
    lr, k, share, scale = 1e-3, 5.0, 0.3, 2.0
    model = memorised.model()
    answers = [full_forward(model, e)[0] for e in memorised.forget]
    weighted = []
    for nll in answers:
        pi = np.exp(-nll.detach().numpy())
        weighted.append(nll * torch.tensor(np.minimum(1, expit(k * (pi - 0.8)) - expit(-0.8 * k))))
    g_u = gradients(model, torch.cat(weighted).sum() / sum(nll.numel() for nll in answers))
    g_r = gradients(model, torch.stack([full_forward(model, e)[0].mean() for e in memorised.retain]).mean())
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in g_u.values()))
    assert norm > 1e-3, "the clip must do something"

    task = task_of(memorised, stop=NEVER)
    params = AlknParams.model_validate(
        {
            "preset": "reference", "sign": sign, "lr": lr, "epochs": 1, "warmup_epochs": 0, "clip": 1e-3,
            "weight_decay": 0.0, "label_scale": k, "retain_gradient": "full", "share": share,
            "schedule": "constant", "estimator": "exact", "overlap": "none", "protection": "none", "scale": scale,
        }
    )  # fmt: skip
    outcome = alkn(task, params)

    direction = -1 if sign == "derived" else 1
    wrong = total = 0
    for name, change in changes(task, memorised).items():
        g = g_u[name] * (1e-3 / norm)
        m = direction * g * g_r[name]
        eta = np.sort(m.reshape(-1))[::-1][max(1, round(share * m.size)) - 1]
        g = np.where(m >= eta, g, 0)
        expected = scale * lr * g / (np.abs(g) + 1e-8)
        wrong += int((np.abs(change.numpy() - expected) > 0.02 * scale * lr).sum())
        total += m.size
    assert total == sum(p.numel() for p in model.parameters())
    # Coordinates at the threshold or with a gradient near AdamW's ε depend on the last bit of a sum.
    assert wrong < 0.002 * total
    assert outcome.passes == 6 + 12


def test_paper_moves_everything_first_and_masks_afterwards(memorised: Any, full_forward: Any) -> None:
    """Algorithm 1 takes its first step unmasked, then m = +λ · G_u · G_r and η cuts the whole model at 30 %."""
    model = memorised.model()
    answers = [full_forward(model, e)[0] for e in memorised.forget]
    weighted = [nll * torch.tensor(expit(10 * (np.exp(-nll.detach().numpy()) - 1))) for nll in answers]
    g_u = gradients(model, torch.cat(weighted).sum() / sum(nll.numel() for nll in answers))
    g_r = gradients(model, torch.stack([full_forward(model, e)[0].mean() for e in memorised.retain]).mean())
    m = {name: 0.8 * g_u[name] * g_r[name] for name in g_u}
    flat = np.sort(np.concatenate([t.reshape(-1) for t in m.values()]))[::-1]
    high, low = (flat[round(part * flat.size) - 1] for part in (0.15, 0.85))
    eta = high + (low - high) * (0.3 - 0.15) / 0.7

    task = task_of(memorised, stop=NEVER)
    outcome = alkn(task, AlknParams(preset="paper", lr=1e-3, epochs=1, weight_decay=0.0))
    for name, change in changes(task, memorised).items():
        assert bool((change != 0)[torch.tensor(np.abs(g_u[name]) > 1e-6)].all()), name
    differ = sum(int((outcome.state[f"mask.{name}"].numpy() != (t >= eta)).sum()) for name, t in m.items())
    assert differ < 0.002 * flat.size
    assert 0.05 < np.mean(flat >= eta) < 0.5


@pytest.mark.parametrize(("preset", "share"), [("reference", 0.2), ("derived", 0.05)])
def test_a_single_negation_moves_only_what_the_mask_allows(preset: str, share: float, memorised: Any) -> None:
    """One step without weight decay: at most the share of each tensor moves, and something does."""
    task = task_of(memorised, stop=NEVER)
    params = {"lr": 1e-3, "epochs": 1, "warmup_epochs": 0, "weight_decay": 0.0, "share": share, "scale": 1.0}
    alkn(task, AlknParams.model_validate({"preset": preset, **params}))
    for name, change in changes(task, memorised).items():
        assert 0 < int(change.count_nonzero()) <= max(1, round(share * change.numel())), name


def test_protected_coordinates_move_a_tenth(memorised: Any) -> None:
    """``paper``, one step: on M the change is 0.1 of what it is without M, elsewhere the same."""
    free, bound = task_of(memorised, stop=NEVER), task_of(memorised, stop=NEVER)
    generator = torch.Generator().manual_seed(0)
    old = {n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in bound.weights().items()}
    bound.state = {f"mask.{name}": mask for name, mask in old.items()}
    params = AlknParams(preset="paper", lr=1e-3, epochs=1)
    alkn(free, params)
    alkn(bound, params)
    whole, part = changes(free, memorised), changes(bound, memorised)
    assert any(bool(t.any()) for t in whole.values())
    for name, mask in old.items():
        torch.testing.assert_close(part[name], whole[name] * torch.where(mask, 0.1, 1.0), rtol=0.02, atol=1e-6)


def test_densest_half_of_the_tensors_gets_the_lower_rate(memorised: Any) -> None:
    """``reference``: M fills ever more of the 20 tensors, so the last 10 are protected; without M nothing is."""
    task = task_of(memorised)
    weights = task.weights()
    for number, (name, w) in enumerate(weights.items()):
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[: w.numel() * (number + 1) // 32] = True
        task.state[f"mask.{name}"] = mask.reshape(w.shape)
    params = AlknParams(preset="reference", lr=1e-3)
    slow, fast = MaskedTraining(task, params).groups()  # type: ignore[misc]
    assert (slow["lr"], fast["lr"]) == (pytest.approx(1e-4), 1e-3)
    named = {id(p): n for n, p in task.model.named_parameters()}
    assert len(weights) == 20
    assert {named[id(p)] for p in slow["params"]} == set(list(weights)[10:])  # type: ignore[attr-defined]
    assert {named[id(p)] for p in fast["params"]} == set(list(weights)[:10])  # type: ignore[attr-defined]
    task.state = {}
    assert MaskedTraining(task, params).groups() is None


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("reference", [0.8] * 2 + [0.72] * 2 + [0.64] * 2 + [0.56] * 2 + [0.48] * 2),
        ("paper", [0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.51, 0.44, 0.37, 0.3]),
    ],
)
def test_share_schedules_by_hand(preset: str, expected: list[float], memorised: Any) -> None:
    """Ten steps: ``reference`` from 0.8 to 0.48 by fifths, ``paper`` down to 0.3."""
    training = MaskedTraining(task_of(memorised), AlknParams(preset=preset, epochs=10))  # type: ignore[arg-type]
    assert training.steps == 10
    assert [training._share(step) for step in range(10)] == pytest.approx(expected)


# Rounds


def test_one_round_by_hand(memorised: Any) -> None:
    """The pseudo-code of METHOD.md, put together from the core's functions with numpy's order statistics."""
    params = rounds_of(bisections=0)
    stop = StopRule(p=0.99, exact_memorization=1.0)
    task = task_of(memorised, stop=stop)
    model, theta = memorised.model(), task.copy_weights()
    picks = torch.randint(12, (9,), generator=task.generator("retain", 1)).tolist()
    g_r = mean_gradient(model, memorised.retain, picks)
    labels = [
        torch.tensor(np.minimum(1, expit(10 * (p.numpy() - 0.8)) - expit(-8))).float()
        for p in score(model, memorised.forget).token_probs
    ]
    fine_tune(
        model,
        memorised.forget,
        Hyperparameters(lr=5e-3, epochs=2, batch_size=32, clip=1.0),
        loss=answer_loss(labels),
        generator=task.generator("order", 1),
    )
    outcome = alkn(task, params)
    assert outcome.reached and [row["scale"] for row in outcome.history[1:]] == [2.0]
    assert outcome.passes == 9 + 2 * 6
    for name, p in model.named_parameters():
        tau = (p.detach() - theta[name]).numpy()
        ranking = (tau * g_r[name].numpy()).reshape(-1)
        eta = np.sort(ranking)[::-1][max(1, round(0.1 * ranking.size)) - 1]
        kept = np.where(ranking.reshape(tau.shape) >= eta, tau, 0)
        expected = theta[name].numpy() - 2 * kept
        np.testing.assert_allclose(task.weights()[name].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["exact", "m", "random", "magnitude"])
@pytest.mark.parametrize("share", [0.1, 0.02])
def test_a_round_moves_only_its_share(criterion: str, share: float, memorised: Any) -> None:
    """At most the share of each tensor differs from the start, and over the model something does."""
    start = p_of(memorised.trained, memorised.forget)
    task = task_of(memorised, stop=StopRule(p=start - 1e-9, exact_memorization=1.0))
    params = rounds_of(criterion=criterion, share=share, bisections=0)
    outcome = alkn(task, params)
    assert outcome.reached and len(outcome.history) == 2
    moved = {name: int(change.count_nonzero()) for name, change in changes(task, memorised).items()}
    for name, w in task.weights().items():
        assert moved[name] <= max(1, round(share * w.numel())), name
    assert sum(moved.values()) > 0.2 * share * 30_240


def test_exact_criterion_lowers_the_retain_loss_by_the_first_order_amount(memorised: Any) -> None:
    """Removing τ where τ · G_r is largest changes CE(D_r) by −λ · Σ τ · G_r, for a small λ; random masks do not."""
    start = p_of(memorised.trained, memorised.forget)
    fell = {}
    for criterion in ("exact", "random"):
        task = task_of(memorised, stop=StopRule(p=start - 1e-9, exact_memorization=1.0))
        before = float(score(task.model, memorised.retain).nll.mean())
        g_r = mean_gradient(task.model, memorised.retain, range(12))
        params = rounds_of(lr=1e-3, retain_gradient="full", scale_max=0.2, bisections=0, criterion=criterion)
        outcome = alkn(task, params)
        assert outcome.history[1]["scale"] == 0.2 and len(outcome.history) == 2
        predicted = sum(float((c * g_r[n]).sum()) for n, c in changes(task, memorised).items())
        fell[criterion] = float(score(task.model, memorised.retain).nll.mean()) - before
        assert fell[criterion] == pytest.approx(predicted, rel=0.15)
    assert fell["exact"] < 0 and fell["exact"] < 3 * fell["random"]


@pytest.mark.parametrize("criterion", ["exact", "m"])
def test_rounds_forget_and_keep_more_than_a_random_mask(criterion: str, memorised: Any, full_forward: Any) -> None:
    """Both targets are met, by a count of its own too; the retain set stays, with a random mask it does not."""
    task, random = task_of(memorised), task_of(memorised)
    outcome = alkn(task, rounds_of(criterion=criterion))
    beaten = alkn(random, rounds_of(criterion="random"))
    assert outcome.reached and beaten.reached
    with torch.no_grad():
        answers = [(e, *full_forward(task.model, e)) for e in memorised.forget]
    assert np.mean([math.exp(-nll.mean()) for _, nll, _ in answers]) <= STOP.p
    hits = [(logits.argmax(-1) == e.tokens[e.answer_start :]).float().mean() for e, _, logits in answers]
    assert np.mean(hits) <= STOP.exact_memorization
    assert p_of(task.model, memorised.retain) > 0.98
    assert p_of(random.model, memorised.retain) < 0.9


def test_repaired_rounds(memorised: Any) -> None:
    """Ten distilling steps of eight after each round, on retain and written records, still meet both targets."""
    task = task_of(memorised)
    outcome = alkn(task, rounds_of(rehearsal=16, repair_steps=10, repair_batch=8))
    assert outcome.reached and STOP.met(Forgetting.of(score(task.model, memorised.forget)))
    assert p_of(task.model, memorised.retain) > 0.9
    # Each round: two epochs of six records, nine for G_r and the repair; once: the records that were written.
    written = outcome.passes - (len(outcome.history) - 1) * (2 * 6 + 9 + 10 * 8)
    assert 0 < written <= 16


def test_a_sample_as_large_as_the_retain_set_is_the_retain_set(memorised: Any) -> None:
    """Drawing with replacement would only leave records out: the weights are those of ``full``, bit for bit."""
    runs = []
    for values in ({"retain_sample": 12}, {"retain_sample": 320}, {"retain_gradient": "full"}, {"retain_sample": 11}):
        task = task_of(memorised, stop=NEVER)
        outcome = alkn(task, rounds_of(steps=2, **values))
        runs.append((outcome.passes, task.copy_weights()))
    assert [passes for passes, _ in runs] == [2 * (12 + 12)] * 3 + [2 * (11 + 12)]
    same = [all(torch.equal(w, runs[0][1][n]) for n, w in weights.items()) for _, weights in runs]
    assert same == [True, True, True, False]


def test_history_of_rounds(memorised: Any) -> None:
    """Row 0 is the start, each later one a round, the last what the model is; λ is the smallest of its grid."""
    task = task_of(memorised)
    outcome = alkn(task, rounds_of())
    rows = outcome.history
    assert [row["round"] for row in rows] == list(range(len(rows)))
    assert set(rows[0]) == {"round", "p", "exact_memorization"} and set(rows[1]) == set(rows[0]) | {"scale"}
    assert rows[0]["p"] == p_of(memorised.trained, memorised.forget)
    now = Forgetting.of(score(task.model, memorised.forget))
    assert (rows[-1]["p"], rows[-1]["exact_memorization"]) == (now.p, now.exact_memorization)
    assert [row["scale"] for row in rows[1:-1]] == [2.0] * (len(rows) - 2)
    assert rows[-1]["scale"] in [2.0 * i / 32 for i in range(1, 33)]
    assert not any(STOP.met(Forgetting(row["p"], row["exact_memorization"])) for row in rows[:-1])
    assert outcome.passes == (len(rows) - 1) * (9 + 2 * 6)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_target_out_of_reach_is_reported(memorised: Any) -> None:
    """All rounds are used up, and the model is still made of finite numbers."""
    task = task_of(memorised, stop=NEVER)
    outcome = alkn(task, rounds_of(steps=3))
    assert not outcome.reached and len(outcome.history) == 4
    assert all(bool(torch.isfinite(w).all()) for w in task.weights().values())


@pytest.mark.parametrize("preset", ["interleaved", "rounds"])
def test_what_is_forgotten_already_is_left_alone(preset: str, memorised: Any) -> None:
    """No round, no record pass, not a bit of the weights."""
    task = task_of(memorised, stop=StopRule(1.0, 1.0))
    outcome = alkn(task, AlknParams(preset=preset))  # type: ignore[arg-type]
    assert outcome.reached and len(outcome.history) == 1 and outcome.passes == 0 and outcome.state == {}
    assert not any(bool(c.any()) for c in changes(task, memorised).values())


@pytest.mark.parametrize("preset", ["interleaved", "rounds", "derived"])
def test_weights_are_rounded_to_the_stored_precision(preset: str, memorised: Any) -> None:
    """So that what met the target is what is stored: bfloat16 and back changes nothing."""
    task = task_of(memorised, stored=torch.bfloat16)
    derived = AlknParams(preset="derived", lr=5e-3)
    outcome = alkn(task, {"interleaved": interleaved_of(), "rounds": rounds_of(), "derived": derived}[preset])
    assert outcome.reached
    assert all(torch.equal(w, w.bfloat16().float()) and w.dtype == torch.float32 for w in task.weights().values())
    task.model.bfloat16().float()
    assert STOP.met(Forgetting.of(score(task.model, memorised.forget)))


# Interleaved


def test_interleaved_meets_the_target_and_keeps_the_retain_set(memorised: Any, full_forward: Any) -> None:
    """Both numbers, by full forwards; what it says of the last step is what the model is."""
    task = task_of(memorised)
    outcome = alkn(task, interleaved_of())
    with torch.no_grad():
        answers = [(e, *full_forward(task.model, e)) for e in memorised.forget]
    assert outcome.reached
    assert np.mean([math.exp(-nll.mean()) for _, nll, _ in answers]) <= STOP.p
    hits = [(logits.argmax(-1) == e.tokens[e.answer_start :]).float().mean() for e, _, logits in answers]
    assert np.mean(hits) <= STOP.exact_memorization
    assert p_of(task.model, memorised.retain) > 0.9
    last = outcome.history[-1]
    now = Forgetting.of(score(task.model, memorised.forget))
    assert (last["p"], last["exact_memorization"]) == (now.p, now.exact_memorization)
    assert [row["round"] for row in outcome.history] == list(range(0, int(last["round"]) + 1, 5))
    assert last["round"] >= 60 and outcome.state == {}


def test_interleaved_reports_a_target_out_of_reach(memorised: Any) -> None:
    """All steps are taken; each passes two of six forget records, six retain and six written ones, all finite."""
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


def test_interleaved_without_rehearsal(memorised: Any) -> None:
    """Then nothing is written, and only retain records keep."""
    task = task_of(memorised, stop=NEVER)
    assert alkn(task, interleaved_of(steps=20, rehearsal=0)).passes == 20 * (2 + 6)


def test_interleaved_without_retain_records(memorised: Any) -> None:
    """No-retain mode: nothing is kept and nothing is drawn on; asking for either names the keys."""
    task = Task(model=memorised.model(), forget=memorised.forget, retain=[], stop=STOP, seed=0)
    outcome = alkn(task, interleaved_of(rehearsal=0, retain_batch=0))
    pushed = [row for row in outcome.history[:-1] if not STOP.met(Forgetting(row["p"], row["exact_memorization"]))]
    assert outcome.reached and 0 < outcome.passes <= 2 * 5 * len(pushed), "two a step, less those that rest"
    with pytest.raises(InputError, match="method.retain_batch, method.rehearsal: there is no retain record"):
        alkn(Task(model=memorised.model(), forget=memorised.forget, retain=[], stop=STOP, seed=0), interleaved_of())


def test_interleaved_leaves_tokens_that_anybody_would_guess(memorised: Any) -> None:
    """Where the background expects every token, the records stay as likely as that; where none, all are gone."""
    likely: dict[float, Scores] = {}
    level: dict[str, Any] = {"forget_loss": "cross_entropy"}
    for shift in (3.0, -16.0):
        task = task_of(memorised, stop=NEVER)
        alkn(
            task,
            interleaved_of(steps=60, background_sharpness=1e-3, background_shift=shift, background_step=0, **level),
        )
        likely[shift] = score(task.model, memorised.forget)
    assert float(likely[-16.0].probability.mean()) < 1e-3
    guessed = torch.cat(likely[3.0].token_probs).median()
    assert abs(float(torch.logit(guessed)) - 3.0) < 1.5


def test_resistant_pays_for_an_adversary(memorised: Any) -> None:
    """Without keeping parts: six forget records a step in batches of 8, one that he has, five that he has not."""
    plain, held = (
        alkn(
            task_of(memorised, stop=NEVER),
            AlknParams(preset="resistant", steps=7, rehearsal=0, retain_batch=0, resist_weight=weight),
        )
        for weight in (0.0, 0.3)
    )
    assert (plain.passes, held.passes) == (7 * 8, 7 * (8 + 1 + 5))
    assert plain.history[-1] != held.history[-1]


def test_expectations_above_the_target_are_lowered(memorised: Any) -> None:
    """A background that expects what may not be known: lowered at each measurement, it ends forgotten; else not."""
    high = {"forget_loss": "cross_entropy", "background_sharpness": 1e-3, "background_shift": 3.0, "steps": 120}
    reached = {by: alkn(task_of(memorised), interleaved_of(**high, background_step=by)).reached for by in (0.0, 0.7)}
    assert reached == {0.0: False, 0.7: True}


# Single negation


def test_derived_keeps_more_than_the_printed_sign(memorised: Any) -> None:
    """Both calibrated to the same forgetting, with G_r of all retain records; only the sign of m differs."""
    kept = {}
    for sign in ("derived", "paper"):
        task = task_of(memorised, stop=StopRule(p=0.1, exact_memorization=1.0))
        params = {"share": 0.3, "schedule": "constant", "retain_gradient": "full", "lr": 2e-3, "sign": sign}
        assert alkn(task, AlknParams.model_validate({"preset": "derived"} | params)).reached
        assert 0.05 < p_of(task.model, memorised.forget) <= 0.1
        kept[sign] = p_of(task.model, memorised.retain)
    assert kept["derived"] > 3 * kept["paper"]


@pytest.mark.parametrize("stop", [STOP, StopRule(p=0.9, exact_memorization=1.0)])
def test_calibrated_scale_is_the_smallest(stop: StopRule, memorised: Any) -> None:
    """It meets the rule, and the end of its last interval below does not."""
    task = task_of(memorised, stop=stop)
    outcome = alkn(task, AlknParams(preset="derived", lr=2e-3))
    scale = outcome.history[-1]["scale"]
    assert outcome.reached
    tau = {name: -c / scale for name, c in changes(task, memorised).items()}
    high = max(1.0, 2 ** math.ceil(math.log2(scale)))
    width = (high / 2 if high > 1 else 1.0) / 2**7
    theta = {n: p.detach().clone() for n, p in memorised.trained.named_parameters()}
    for less, met in ((scale, True), (scale - width, False)):
        task.set_weights(theta, tau, less)
        assert stop.met(Forgetting.of(score(task.model, memorised.forget))) is met


def test_calibrated_scale_ends_where_nothing_helps(memorised: Any) -> None:
    """A vector of zeros forgets nothing at any scale: the largest is returned and the rule is not met."""
    task = task_of(memorised)
    theta = task.copy_weights()
    zero = {name: torch.zeros_like(w) for name, w in theta.items()}
    assert calibrated_scale(task, theta, zero, largest=8.0) == 8.0
    assert all(torch.equal(w, theta[name]) for name, w in task.weights().items())


def test_smallest_scale_by_hand() -> None:
    """At 0.3 and three halvings of (0, 1]: 0.5 meets, 0.25 does not, 0.375 meets."""
    asked: list[float] = []

    def meets(limit: float) -> Callable[[float], bool]:
        def ask(scale: float) -> bool:
            asked.append(scale)
            return scale >= limit

        return ask

    assert smallest_scale(meets(0.3), high=1.0, bisections=3) == 0.375
    assert asked == [1.0, 0.5, 0.25, 0.375]
    assert smallest_scale(meets(0.3), high=1.0, bisections=0) == 1.0
    assert smallest_scale(meets(1.1), high=1.0, bisections=3) is None
    assert smallest_scale(meets(5.0), high=8.0, low=4.0, bisections=2) == 5.0
    assert smallest_scale(meets(0.0), high=1.0, bisections=4) == 1 / 16


@pytest.mark.parametrize("preset", ["reference", "paper"])
def test_presets_with_a_fixed_scale_say_whether_they_reached_the_target(preset: str, memorised: Any) -> None:
    """With their own λ and a tiny rate they do not; P falls all the same."""
    task = task_of(memorised)
    outcome = alkn(task, AlknParams.model_validate({"preset": preset, "lr": 2e-3}))
    assert not outcome.reached and len(outcome.history) == 2
    assert outcome.history[1]["scale"] == {"reference": 1.0, "paper": 0.8}[preset]
    assert outcome.history[1]["p"] < outcome.history[0]["p"]
    assert outcome.passes == 5 * 6 + {"reference": 5 * 6, "paper": 12}[preset]


# State and determinism


def run(memorised: Any, preset: str, *, seed: int = 0, **more: Any) -> tuple[Task, Outcome]:
    task = task_of(memorised, seed=seed, stop=StopRule(0.5, 1.0), **more)
    if preset in ("interleaved", "resistant"):
        return task, alkn(task, interleaved_of(preset=preset))
    quick = {"lr": 2e-3, "retain_sample": 9} | ({"steps": 30} if preset == "rounds" else {})
    return task, alkn(task, AlknParams.model_validate({"preset": preset} | quick))


@pytest.mark.parametrize("preset", PRESETS)
def test_same_seed_same_weights(preset: str, memorised: Any) -> None:
    """Bit for bit, state and history too, whatever the global random state; another seed differs."""
    (one, first), (two, again), (other, _) = (
        run(memorised, preset, seed=0),
        (torch.manual_seed(99), run(memorised, preset, seed=0))[1],
        run(memorised, preset, seed=1),
    )
    assert all(torch.equal(w, two.weights()[n]) for n, w in one.weights().items())
    assert first.history == again.history and first.passes == again.passes
    assert first.state.keys() == again.state.keys()
    assert all(torch.equal(first.state[key], again.state[key]) for key in first.state)
    if preset != "paper":  # six records are one batch there, and all of D_r is taken: nothing is random
        assert any(not torch.equal(w, other.weights()[n]) for n, w in one.weights().items())


@pytest.mark.parametrize(
    "values",
    [
        {"preset": "reference"},
        {"preset": "paper"},
        {"preset": "rounds", "overlap": "product_std", "criterion": "m", "retain_sample": 9},
    ],
)
def test_m_grows_as_a_union_over_requests(values: dict[str, Any], memorised: Any, tmp_path: Path) -> None:
    """What the first request leaves comes back from disk, and the second only adds to it."""
    params = AlknParams.model_validate(values | {"lr": 2e-3})
    first = task_of(memorised, stop=StopRule(0.5, 1.0))
    left = alkn(first, params).state
    masks = {name: t for name, t in left.items() if name.startswith("mask.")}
    assert {name.removeprefix("mask.") for name in masks} == set(first.weights())
    assert all(t.dtype == torch.bool for t in masks.values())
    save_file(left, tmp_path / "state.safetensors")
    second = task_of(
        memorised,
        second=True,
        model=first.model,
        stop=StopRule(0.5, 1.0),
        state=load_file(tmp_path / "state.safetensors"),
    )
    after = alkn(second, params).state
    assert set(after) == set(left)
    assert all(bool((masks[name] <= after[name]).all()) for name in masks)
    grown = [sum(int(state[name].sum()) for name in masks) for state in (left, after)]
    assert 0 < grown[0] < grown[1]


def test_reference_reuses_the_first_requests_thresholds(memorised: Any) -> None:
    """Found in the first request, handed on unchanged by the second."""
    _, first = run(memorised, "reference")
    thresholds = {key: t for key, t in first.state.items() if key.startswith("eta.")}
    assert len(thresholds) == 20
    _, second = run(memorised, "reference", second=True, state=first.state)
    assert all(torch.equal(second.state[key], t) for key, t in thresholds.items())
    _, alone = run(memorised, "reference", second=True)
    assert any(not torch.equal(alone.state[key], t) for key, t in thresholds.items())


def test_methods_without_m_leave_no_state(memorised: Any) -> None:
    assert run(memorised, "rounds")[1].state == {}


def test_state_can_be_saved_with_one_threshold_over_the_model(memorised: Any, tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory."""
    task = task_of(memorised)
    outcome = alkn(task, AlknParams(preset="reference", scope="model", lr=1e-3, epochs=1))
    save_file(outcome.state, tmp_path / "state.safetensors")
    assert len(load_file(tmp_path / "state.safetensors")) == 40


def test_seeds_of_different_purposes_differ() -> None:
    """The first 8 bytes of ``printf 0/retain/1 | sha256sum``, less a bit; other names give other seeds."""
    assert seed_of(0, "retain", 1) == 0x91A4AECB99949E42 >> 1
    seeds = {seed_of(s, *names) for s in (0, 1) for names in (("a",), ("a", 1), ("a", 2), ("b",))}
    assert len(seeds) == 8 and all(0 <= s < 2**63 for s in seeds)


def test_forgotten_means_both() -> None:
    """P alone flatters, and so does exact memorization alone; at the limit is enough."""
    rule = StopRule(p=0.1, exact_memorization=0.2)
    cases = {(0.1, 0.2): True, (0.11, 0.0): False, (0.0, 0.21): False, (float("nan"), 0.0): False}
    assert {case: rule.met(Forgetting(*case)) for case in cases} == cases
