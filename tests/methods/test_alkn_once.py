"""ALKN in a single negation: one step by hand, masks and rates, the sign, the calibrated scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from method_cases import NEVER, STOP, changes, p_of, task_of
from scipy.special import expit
from torch import Tensor, nn

from alkn.core.calibration import calibrated_scale, smallest_scale
from alkn.core.scoring import Batch, score
from alkn.core.training import answer_loss, fine_tune
from alkn.core.unlearning import Forgetting, StopRule
from alkn.errors import InputError
from alkn.methods.alkn import alkn
from alkn.methods.alkn_once import MaskedTraining
from alkn.methods.alkn_params import AlknParams


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


def test_reference_has_one_retain_gradient_and_finds_thresholds_in_every_step(
    memorised: Any, full_forward: Any
) -> None:
    """G_r stays that of θ_{t-1}, of as many records as the request has; m and its 15 % lines by numpy, ten steps."""
    task = task_of(memorised, stop=NEVER)
    picks = torch.randint(12, (6,), generator=task.generator("retain")).tolist()
    model = memorised.model()
    g_r = gradients(model, torch.stack([full_forward(model, memorised.retain[i])[0].mean() for i in picks]).mean())
    params = AlknParams(preset="reference", lr=1e-2, epochs=10)
    training = MaskedTraining(task, params)
    assert training.passes == 6
    m = {name: np.zeros_like(g) for name, g in g_r.items()}

    def before(step: int, batch: Batch) -> None:
        for name, p in task.model.named_parameters():
            assert p.grad is not None
            m[name] += p.grad.numpy() * g_r[name]
        training.before_step(step, batch)
        share = 0.8 - 0.4 * (step // 2) / 5
        for name, moved in m.items():
            falling = np.sort(moved.reshape(-1))[::-1]
            high, low = (falling[max(1, round(part * falling.size)) - 1] for part in (0.15, 0.85))
            eta = high + (low - high) * (share - 0.15) / 0.7
            assert float(training.eta[name]) == pytest.approx(eta, rel=1e-3, abs=1e-4 * float(np.abs(moved).max())), (
                name
            )

    hp = params.hyperparameters()
    fine_tune(
        task.model, task.forget, hp, loss=answer_loss(), generator=task.generator("order"), before_step=before
    )  # fmt: skip
    assert training.passes == 6, "nothing is drawn later"


@pytest.mark.parametrize("preset", ["reference", "derived", "paper"])
def test_a_request_at_its_target_is_left_alone_and_hands_on_what_was_there(preset: str, memorised: Any) -> None:
    old = {"mask.a": torch.ones(2, dtype=torch.bool), "eta.a": torch.ones(())}
    task = task_of(memorised, stop=StopRule(1.0, 1.0), state=old)
    outcome = alkn(task, AlknParams(preset=preset))  # type: ignore[arg-type]
    assert outcome.reached and outcome.passes == 0 and len(outcome.history) == 1 and outcome.state == old
    assert not any(bool(c.any()) for c in changes(task, memorised).values())


@pytest.mark.parametrize("preset", ["reference", "derived", "paper", "rounds"])
def test_without_retain_records_it_says_what_asks_for_them(preset: str, memorised: Any) -> None:
    with pytest.raises(InputError, match=r"^method\.criterion.*: there is no retain record to draw; 'random'"):
        alkn(task_of(memorised, retain=[]), AlknParams(preset=preset))  # type: ignore[arg-type]


@pytest.mark.parametrize(("preset", "negations"), [("derived", 1), ("rounds", 2)])
def test_a_mask_by_size_needs_no_retain_records(preset: str, negations: int, memorised: Any) -> None:
    """Nor does it pass any: what is there changes nothing."""
    ends = []
    for retain in ([], memorised.retain):
        task = task_of(memorised, stop=NEVER, retain=retain)
        more = {"steps": 2, "epochs": 5} if preset == "rounds" else {"scale": 1.0}
        outcome = alkn(task, AlknParams.model_validate({"preset": preset, "criterion": "magnitude", "lr": 2e-3} | more))
        assert outcome.passes == negations * 5 * 6
        ends.append(task.copy_weights())
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


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
    params = {"lr": 1e-3, "epochs": 1, "warmup_epochs": 0, "weight_decay": 0.0, "share": share, "scale": 1.0,
              "estimator": "exact"}  # fmt: skip
    alkn(task, AlknParams.model_validate({"preset": preset, **params}))
    for name, change in changes(task, memorised).items():
        assert 0 < int(change.count_nonzero()) <= max(1, round(share * change.numel())), name


@pytest.mark.parametrize("preset", ["reference", "paper"])
def test_a_masked_update_stays_where_a_masked_gradient_decays(preset: str, memorised: Any) -> None:
    """One step without decay: the same weights. With an empty mask decay alone moves, and only a gradient lets it."""
    first = {"preset": preset, "lr": 1e-3, "epochs": 1, "warmup_epochs": 0, "weight_decay": 0.0, "scale": 1.0}
    closed = {**first, "epochs": 3, "weight_decay": 0.1, "share": 0.0, "schedule": "constant", "mask_first": True}
    ends = {}
    for masked in ("gradient", "update"):
        for name, values in (("first", first), ("closed", closed)):
            task = task_of(memorised, stop=NEVER)
            alkn(task, AlknParams.model_validate({**values, "masked": masked}))
            ends[masked, name] = changes(task, memorised)
    for name, change in ends["gradient", "first"].items():
        torch.testing.assert_close(ends["update", "first"][name], change, rtol=0, atol=1e-7)
        assert bool(change.any())
        assert not bool(ends["update", "closed"][name].any())
        decayed = (1 - 1e-3 * 0.1) ** 3 - 1
        start = memorised.trained.get_parameter(name).detach()
        torch.testing.assert_close(ends["gradient", "closed"][name], -decayed * start, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("mask_first", [True, False])
@pytest.mark.parametrize("used", [False, True], ids=["first request", "protected"])
def test_a_masked_update_step_by_step(mask_first: bool, used: bool, memorised: Any) -> None:
    """Three steps: outside the mask of the step nothing moves, inside all that AdamW moves does, on M a tenth of it."""
    state = {n: w > 0 for n, w in memorised.trained.named_parameters()} if used else {}
    task = task_of(memorised, stop=NEVER, state={f"mask.{name}": mask for name, mask in state.items()})
    params = AlknParams.model_validate(
        {"preset": "paper", "lr": 1e-3, "epochs": 3, "share": 0.5, "schedule": "constant", "estimator": "exact",
         "scope": "tensor", "mask_first": mask_first, "masked": "update"}
    )  # fmt: skip
    training = MaskedTraining(task, params)
    masks: list[dict[str, Tensor]] = []
    starts: list[dict[str, Tensor]] = []
    free: dict[str, Tensor] = {}

    def before(step: int, batch: Batch) -> None:
        held = {name: t.clone() for name, t in training.m.items()}
        cuts = dict(training.eta)
        starts.append(task.copy_weights())
        training.before_step(step, batch)
        after = (training.m, training.eta) if mask_first else (held, cuts)
        masks.append({name: t >= after[1][name] for name, t in after[0].items() if after[1]})

    def after(step: int) -> None:
        free.update(task.copy_weights())
        training.after_step(step)
        assert not training.old, "no copy of the weights outlives a step"
        for name, w in task.weights().items():
            old, mask = starts[-1][name], masks[-1].get(name, torch.ones_like(w, dtype=torch.bool))
            assert torch.equal(w[~mask], old[~mask])
            share = torch.where(state[name], 0.1, 1.0) if used else torch.ones_like(w)
            torch.testing.assert_close(w[mask], (old + (free[name] - old) * share)[mask], rtol=0, atol=0)
            assert bool((w[mask] != old[mask]).any())

    fine_tune(
        task.model, task.forget, params.hyperparameters(), loss=answer_loss(), generator=task.generator("order"),
        before_step=before, after_step=after,
    )  # fmt: skip
    assert len(masks) == 3 and bool(masks[0]) is mask_first
    assert all(0.3 < float(t.double().mean()) < 0.7 for t in masks[2].values() if t.numel() > 100)


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
    assert outcome.passes == 5 * 6 + {"reference": 6, "paper": 12}[preset]
