"""Each part of ALKN can be switched off by settings, and then really is off: the table of docs/METHOD.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_cases import NEVER, task_of
from torch import Tensor

from alkn.core.scoring import score
from alkn.core.unlearning import Outcome, Task
from alkn.methods.alkn import alkn
from alkn.methods.alkn_once import MaskedTraining
from alkn.methods.alkn_params import READ_BY, AlknParams, label_weights

ONCE = ("derived", "reference", "paper")
PRESETS = ("rounds", *ONCE)
NO_DGS: dict[str, Any] = {"share": 1.0, "share_end": 1.0}
NO_M: dict[str, Any] = {"overlap": "none", "protection": "none"}


def params(preset: str, **more: Any) -> AlknParams:
    """One step, or one round of one step, unmasked by decay, so that what moved is what the mask let through.

    Keys that only the other procedure reads, and would refuse here, are left out.
    """
    short: dict[str, Any] = {"lr": 1e-3, "epochs": 1, "weight_decay": 0.0, "warmup_epochs": 0}
    by_procedure = {"steps": 1, "bisections": 0} if preset == "rounds" else {"scale": 1.0}
    procedure = "rounds" if preset == "rounds" else "once"
    given = short | by_procedure | more
    read = {key: value for key, value in given.items() if procedure in READ_BY.get(key, (procedure,))}
    return AlknParams.model_validate({"preset": preset} | read)


def run(memorised: Any, p: AlknParams, *, state: dict[str, Tensor] | None = None) -> tuple[Task, Outcome]:
    task = task_of(memorised, stop=NEVER, state=state or {})
    return task, alkn(task, p)


def moved(task: Task, memorised: Any) -> dict[str, Tensor]:
    start = dict(memorised.trained.named_parameters())
    return {name: w != start[name] for name, w in task.weights().items()}


def share_of(mask: dict[str, Tensor]) -> float:
    return float(sum(int(t.sum()) for t in mask.values()) / sum(t.numel() for t in mask.values()))


def old_mask(task: Task) -> dict[str, Tensor]:
    """A state in which half of each tensor was used before."""
    generator = torch.Generator().manual_seed(9)
    return {f"mask.{n}": torch.rand(w.shape, generator=generator) < 0.5 for n, w in task.weights().items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_no_esl(preset: str, memorised: Any) -> None:
    """Every answer token counts the same; with it, other weights come out."""
    assert label_weights(score(memorised.trained, memorised.forget), params(preset, soft_labels=False)) is None
    assert label_weights(score(memorised.trained, memorised.forget), params(preset)) is not None
    ends = [
        run(memorised, params(preset, soft_labels=on, lr=1e-2, clip=None))[0].copy_weights() for on in (True, False)
    ]
    assert any(not torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("preset", PRESETS)
def test_no_dgs(preset: str, memorised: Any) -> None:
    """All coordinates with a gradient move, in the first step and in later ones, and with thresholds of before."""
    task, outcome = run(memorised, params(preset, **NO_DGS, epochs=2))
    free = moved(task, memorised)
    full = share_of(free)
    assert full > 0.85
    if preset != "paper":
        assert share_of(moved(run(memorised, params(preset, epochs=2))[0], memorised)) < 0.95 * full
    again, _ = run(memorised, params(preset, **NO_DGS, epochs=2), state=outcome.state)
    assert share_of(moved(again, memorised)) == pytest.approx(full, abs=0.01)


@pytest.mark.parametrize("preset", ONCE)
def test_no_dgs_masks_no_gradient(preset: str, memorised: Any) -> None:
    """The mask is all of the model at every step of the schedule."""
    p = params(preset, **NO_DGS, epochs=7)
    training = MaskedTraining(Task(memorised.model(), memorised.forget, memorised.retain, NEVER, 0), p)
    assert [training._share(step) for step in range(7)] == [1.0] * 7
    training._find_thresholds(0)
    assert all(float(eta) == float("-inf") for eta in training.eta.values())


@pytest.mark.parametrize("preset", ["reference", "derived", "paper"])
def test_no_apm(preset: str, memorised: Any) -> None:
    """Coordinates, or tensors, of M move as fast as the others; with it, a tenth of that."""
    state = old_mask(Task(memorised.model(), memorised.forget, memorised.retain, NEVER, 0))
    if preset != "paper":
        dense = {name for number, name in enumerate(sorted(state)) if number < len(state) // 2}
        state = {name: mask | torch.tensor(name in dense) for name, mask in state.items()}
    change: dict[str, list[float]] = {"with": [], "without": []}
    for which, more in (("with", {}), ("without", {"protection": "none"})):
        task, _ = run(memorised, params(preset, **NO_DGS, overlap="none", **more), state=state)
        start = dict(memorised.trained.named_parameters())
        for name, w in task.weights().items():
            distance = (w - start[name].detach()).abs()
            used = (
                state[f"mask.{name}"] if preset == "paper" else torch.full_like(w, state[f"mask.{name}"].all()).bool()
            )
            change[which] += distance[used].tolist()
    fast = np.median(change["without"])
    assert np.median(change["with"]) == pytest.approx(0.1 * fast, rel=0.05) and fast > 0


@pytest.mark.parametrize("preset", [*ONCE, "rounds"])
def test_no_m(preset: str, memorised: Any) -> None:
    """What earlier requests used has no say, and nothing is left for later ones."""
    more = {"criterion": "m"} if preset == "rounds" else {}
    state = old_mask(Task(memorised.model(), memorised.forget, memorised.retain, NEVER, 0))
    weights = []
    for given in (state, {}):
        task, outcome = run(memorised, params(preset, **NO_M, **more, epochs=2), state=given)
        weights.append(task.copy_weights())
        assert not [name for name in outcome.state if name.startswith("mask.")]
    assert all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())
    _, kept = run(memorised, params(preset, **{"overlap": "product_std"}, **more, epochs=2), state=state)
    assert len([name for name in kept.state if name.startswith("mask.")]) == 20


@pytest.mark.parametrize("preset", ONCE)
@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_other_masks_of_a_single_negation(preset: str, criterion: str, memorised: Any) -> None:
    """Ranked by chance, or by the accumulated size of the gradient; the retain set is not drawn on."""
    fixed = {"share": 0.3, "share_end": 0.3, "schedule": "constant", "scope": "tensor", "estimator": "exact"}
    p = params(preset, criterion=criterion, **fixed, **NO_M, reuse_thresholds=False, mask_first=True)
    task, outcome = run(memorised, p)
    assert outcome.passes == 6, "G_r is not computed"
    chosen = moved(task, memorised)
    for name, mask in chosen.items():
        assert int(mask.sum()) <= max(1, round(0.3 * mask.numel())), name
    other, _ = run(memorised, params(preset, criterion="m", **fixed, **NO_M, reuse_thresholds=False, mask_first=True))
    both = moved(other, memorised)
    assert any(not torch.equal(chosen[n], both[n]) for n in chosen)


def test_the_random_mask_is_random_and_stays(memorised: Any) -> None:
    """Uniform numbers that no step moves; the same for the same seed, others for another."""
    p = params("reference", criterion="random")
    made = [MaskedTraining(Task(memorised.model(), memorised.forget, memorised.retain, NEVER, s), p) for s in (0, 0, 1)]
    flat = [torch.cat([t.reshape(-1) for t in training.m.values()]) for training in made]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])
    assert float(flat[0].mean()) == pytest.approx(0.5, abs=0.01) and float(flat[0].var()) == pytest.approx(
        1 / 12, abs=0.005
    )
    for q in made[0].task.model.parameters():
        q.grad = torch.ones_like(q)
    made[0]._move()
    assert torch.equal(torch.cat([t.reshape(-1) for t in made[0].m.values()]), flat[0])


def test_the_magnitude_mask_adds_up_the_gradients_size(memorised: Any) -> None:
    training = MaskedTraining(
        Task(memorised.model(), memorised.forget, memorised.retain, NEVER, 0),
        params("reference", criterion="magnitude"),
    )
    name, q = next(iter(training.task.model.named_parameters()))
    for size in (2.0, -3.0):
        q.grad = torch.full_like(q, size)
        training._move()
    assert bool((training.m[name] == 5.0).all())
    assert not any(bool(m.any()) for other, m in training.m.items() if other != name)


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_other_masks_of_a_round(criterion: str, memorised: Any) -> None:
    """One round with all retain records: magnitude takes the largest |θ_ft − θ|, chance takes others."""
    whole, _ = run(memorised, params("rounds", **NO_DGS, criterion=criterion))
    task, _ = run(memorised, params("rounds", criterion=criterion, share=0.1, estimator="exact"))
    start = dict(memorised.trained.named_parameters())
    tau = {n: (w - start[n].detach()).abs() for n, w in whole.weights().items()}
    hits, count = 0, 0
    for name, mask in moved(task, memorised).items():
        eta = torch.topk(tau[name].reshape(-1), max(1, round(0.1 * mask.numel()))).values[-1]
        hits, count = hits + int((tau[name][mask] >= eta * 0.999).sum()), count + int(mask.sum())
    assert count > 0 and (hits > 0.95 * count if criterion == "magnitude" else hits < 0.6 * count)
