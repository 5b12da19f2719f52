"""ALKN's savings: G_r and m in fewer bytes, G_r reused and averaged over rounds, negation in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from alkn_cases import rounds_of
from method_cases import NEVER, STOP, task_of
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alkn.core.scoring import mean_gradient, score
from alkn.core.ternary import Ternary, unpack
from alkn.core.unlearning import Outcome, StopRule, Task
from alkn.methods.alkn import alkn
from alkn.methods.alkn_params import AlknParams, empty_m, move_m, stored_gradient


def run(memorised: Any, stop: StopRule = STOP, **more: Any) -> tuple[Task, Outcome]:
    task = task_of(memorised, stop=stop)
    return task, alkn(task, rounds_of(**more))


def gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(6, 5, generator=generator), "b": torch.randn(8, generator=generator)}


def stored(new: dict[str, Tensor], old: Any = None, **params: Any) -> Any:
    return stored_gradient(new, rounds_of(**params), generator=torch.Generator().manual_seed(0), old=old)


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, for which it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overlap", ["none", "product_std", "gradient_std"])
@pytest.mark.parametrize(
    "kept", [{}, {"gradient_dtype": "bf16"}, {"ternary_share": 0.3}, {"ternary_share": 0.3, "gradient_dtype": "bf16"}]
)
def test_moving_m_reads_no_number_of_a_tensor(kept: dict[str, Any], overlap: str, memorised: Any) -> None:
    task = task_of(memorised)
    p = rounds_of(criterion="m", overlap=overlap, **kept)
    g_r = stored_gradient(
        mean_gradient(task.model, task.retain, range(12)), p, generator=torch.Generator().manual_seed(0)
    )
    m, old = empty_m(task, p), {name: w > 0 for name, w in task.weights().items()}
    for w in task.model.parameters():
        w.grad = torch.ones_like(w)
    with Reads() as seen:
        move_m(task, p, m, g_r, old)
    assert seen.count == 0 and all(bool(t.any()) for t in m.values())
    with Reads() as seen:
        float(m["model.norm.weight"].sum())
    assert seen.count == 1, "it does count"


def test_a_gradient_is_kept_as_asked_and_not_twice() -> None:
    """As it is, rounded, or the signs of the largest fifth of each tensor; the given mapping is emptied."""
    given = gradients(0)
    assert all(torch.equal(t, given[n]) for n, t in stored(dict(given)).items())
    rounded = stored(dict(given), gradient_dtype="bf16")
    assert all(torch.equal(t, given[n].bfloat16()) for n, t in rounded.items())
    emptied = dict(given)
    signs = stored(emptied, ternary_share=0.2, estimator="exact")
    assert emptied == {}
    for name, t in signs.items():
        assert isinstance(t, Ternary) and t.gain == 100.0
        size = np.abs(given[name].numpy())
        large = size >= np.sort(size.reshape(-1))[::-1][max(1, round(0.2 * size.size)) - 1]
        assert np.array_equal(unpack(t.packed, t.shape).numpy(), np.where(large, np.sign(given[name].numpy()), 0))


def test_the_ternary_share_holds_under_every_estimator() -> None:
    """Also of a gradient of which nine tenths are zero, through which no line is drawn."""
    generator = torch.Generator().manual_seed(3)
    sparse = torch.randn(100, 100, generator=generator) * (torch.rand(100, 100, generator=generator) < 0.1)
    for estimator in ("exact", "sampled", "trimmed_linear"):
        kept = stored({"a": sparse.clone()}, ternary_share=0.05, estimator=estimator)["a"]
        assert float((unpack(kept.packed, kept.shape) != 0).double().mean()) == pytest.approx(0.05, abs=0.002)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_momentum_averages_gradients(dtype: str) -> None:
    """Three quarters of the old one and a quarter of the new one; the first is taken whole."""
    first, second = gradients(1), gradients(2)
    params = {"retain_momentum": 0.75, "gradient_dtype": dtype}
    old = stored(dict(first), **params)
    new = stored(dict(second) | {n: t.clone() for n, t in second.items()}, old, **params)
    for name in first:
        assert torch.equal(old[name].float(), first[name].to(old[name].dtype).float())
        expected = 0.75 * old[name].double() + 0.25 * gradients(2)[name].double()
        tolerance = 2**-8 if dtype == "bf16" else 1e-6
        torch.testing.assert_close(new[name].double(), expected, rtol=tolerance, atol=tolerance / 100)


def test_m_is_kept_in_its_precision(memorised: Any) -> None:
    m = empty_m(task_of(memorised), rounds_of(gradient_dtype="bf16"))
    assert {t.dtype for t in m.values()} == {torch.bfloat16} and not any(t.any() for t in m.values())


@pytest.mark.parametrize("criterion", ["exact", "m"])
def test_a_round_in_bf16_is_that_of_fp32_but_for_coordinates_at_the_threshold(criterion: str, memorised: Any) -> None:
    """Rounding by 2^-9 swaps coordinates whose rank is within it of the cut, and changes nothing else."""
    once = StopRule(p=float(score(memorised.trained, memorised.forget).probability.mean()) - 1e-9, exact_memorization=1)
    full, _ = run(memorised, once, criterion=criterion, bisections=0)
    half, _ = run(memorised, once, criterion=criterion, bisections=0, gradient_dtype="bf16")
    other = total = 0
    for name, w in full.weights().items():
        start = dict(memorised.trained.named_parameters())[name].detach()
        a, b = w - start, half.weights()[name] - start
        both = (a != 0) & (b != 0)
        assert torch.equal(a[both], b[both]), name
        other += int(((a != 0) != (b != 0)).sum())
        total += int((a != 0).sum())
    assert total > 500 and other < 0.05 * total


def test_rounds_with_a_ternary_gradient_forget_and_keep(memorised: Any) -> None:
    """Two bits of G_r an entry still localise: the retain set stays, and with a random mask it does not.

    What a random mask costs depends on the mask: .63 to .91 of P are left, so six are asked.
    """

    def kept(seed: int, **more: Any) -> float:
        task = task_of(memorised, stop=STOP, seed=seed)
        assert alkn(task, rounds_of(**more)).reached
        return float(score(task.model, memorised.retain).probability.mean())

    for criterion in ("exact", "m"):
        assert min(kept(seed, criterion=criterion, ternary_share=0.3) for seed in range(6)) > 0.95, criterion
    lost = [kept(seed, criterion="random") for seed in range(6)]
    assert min(lost) < 0.8 and sum(lost) / 6 < 0.9


def test_a_gradient_that_is_reused_is_not_paid_for(memorised: Any) -> None:
    """Seven rounds, a new G_r in the first, fourth and seventh: 3 · 9 retain and 7 · 2 · 6 forget passes."""
    _, outcome = run(memorised, NEVER, steps=7, retain_every=3, scale_max=0.1, bisections=0)
    assert len(outcome.history) == 8 and outcome.passes == 3 * 9 + 7 * 12


def test_momentum_and_reuse_change_the_second_round_only(memorised: Any) -> None:
    """One round is the same with and without; the second one differs, and differs between the two."""
    results = []
    for steps in (1, 2):
        for more in ({}, {"retain_momentum": 0.5}, {"retain_every": 2}):
            task, _ = run(memorised, NEVER, steps=steps, bisections=0, **more)
            results.append(torch.cat([w.reshape(-1) for w in task.weights().values()]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[3], results[4]) and not torch.equal(results[4], results[5])


@pytest.mark.parametrize("stored_in", [torch.float32, torch.bfloat16])
def test_negation_in_place(stored_in: torch.dtype, memorised: Any) -> None:
    """θ − λ·τ with two roundings as numpy makes them, then the stored precision; θ and τ stay as they were."""
    task = task_of(memorised, stored=stored_in)
    generator = torch.Generator().manual_seed(0)
    theta = task.copy_weights()
    tau = {n: torch.randn(w.shape, generator=generator) for n, w in theta.items()}
    kept = {n: (theta[n].clone(), tau[n].clone()) for n in theta}
    task.set_weights(theta, tau, 0.3)
    for name, w in task.weights().items():
        expected = theta[name].numpy() - np.float32(0.3) * tau[name].numpy()
        assert torch.equal(w, torch.tensor(expected).to(stored_in).float())
        assert torch.equal(theta[name], kept[name][0]) and torch.equal(tau[name], kept[name][1])


def test_the_retain_gradient_in_small_batches_is_the_same(memorised: Any) -> None:
    """Batches of five instead of one of twelve: the same mean, up to the rounding of sums."""
    whole = mean_gradient(memorised.model(), memorised.retain, range(12))
    parts = mean_gradient(memorised.model(), memorised.retain, range(12), max_records=5)
    largest = max(float(g.abs().max()) for g in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "rounds", "ternary_share": 0.3, "retain_momentum": 0.5}, "does not go with ternary_share"),
        ({"preset": "rounds", "ternary_share": 0.0}, "greater than 0"),
        ({"preset": "rounds", "ternary_gain": 1.0}, "greater than 1"),
        ({"preset": "rounds", "retain_momentum": 1.0}, "less than 1"),
        ({"preset": "rounds", "gradient_dtype": "fp16"}, "Input should be 'fp32' or 'bf16'"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AlknParams.model_validate(values)


@pytest.mark.parametrize("more", [{"gradient_dtype": "bf16"}, {"ternary_share": 0.5}])
def test_a_single_negation_takes_them_too(more: dict[str, Any], memorised: Any) -> None:
    """``paper`` with a G_r in fewer bytes: the same passes, a mask of about the same size, another one."""
    plain, small = task_of(memorised, stop=NEVER), task_of(memorised, stop=NEVER)
    a = alkn(plain, AlknParams(preset="paper", lr=1e-3))
    b = alkn(small, AlknParams.model_validate({"preset": "paper", "lr": 1e-3} | more))
    masks = [torch.cat([t.reshape(-1) for t in o.state.values()]) for o in (a, b)]
    assert a.passes == b.passes and not torch.equal(*masks)
    share = [float(m.double().mean()) for m in masks]
    assert share[1] == pytest.approx(share[0], abs=0.25)


@pytest.mark.parametrize(("estimator", "share"), [("exact", 0.3), ("sampled", 0.3), ("trimmed_linear", 0.5)])
def test_g_r_in_two_bits_has_signs_at_the_share_that_was_asked_for(estimator: str, share: float) -> None:
    new = {"w": torch.randn(200, 300, generator=torch.Generator().manual_seed(1))}
    kept = stored_gradient(
        new, rounds_of(ternary_share=share, estimator=estimator), generator=torch.Generator().manual_seed(0)
    )["w"]
    assert isinstance(kept, Ternary)
    signs = unpack(kept.packed, kept.shape)
    assert float((signs != 0).float().mean()) == pytest.approx(share, abs=0.02)
