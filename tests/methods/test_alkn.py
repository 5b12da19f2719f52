"""What holds for every preset of ALKN: what is left alone, stored precision, determinism, state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from alkn_cases import PRESETS, interleaved_of, rounds_of
from method_cases import STOP, changes, task_of
from safetensors.torch import load_file, save_file

from alkn.core.scoring import score
from alkn.core.unlearning import Forgetting, Outcome, StopRule, Task, seed_of
from alkn.methods.alkn import alkn
from alkn.methods.alkn_params import AlknParams


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


def run(memorised: Any, preset: str, *, seed: int = 0, **more: Any) -> tuple[Task, Outcome]:
    task = task_of(memorised, seed=seed, stop=StopRule(0.5, 1.0), **more)
    if preset in ("interleaved", "resistant"):
        return task, alkn(task, interleaved_of(preset=preset, alternatives=8, hidden_weight=20.0))
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
        forget=memorised.second,
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
    _, second = run(memorised, "reference", forget=memorised.second, state=first.state)
    assert all(torch.equal(second.state[key], t) for key, t in thresholds.items())
    _, alone = run(memorised, "reference", forget=memorised.second)
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
