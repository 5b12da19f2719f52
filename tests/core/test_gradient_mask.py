"""The mask variable m: its update and the sign of it, thresholds, and masks over tensors, models and ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from alkn.core.gradient_mask import (
    SAMPLE_SIZE,
    accumulate_,
    overlap_penalty,
    threshold,
    top_share_mask,
    top_share_masks,
)

FORGET = torch.tensor([1.0, -2.0, 3.0, 0.0])
RETAIN = torch.tensor([4.0, 5.0, -6.0, 7.0])
PREVIOUS = torch.tensor([True, False, True, True])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [-3.0, 11.0, 19.0, 1.0]),
        ({"sign": "paper"}, [5.0, -9.0, -17.0, 1.0]),
        ({"strength": 0.5}, [-1.0, 6.0, 10.0, 1.0]),
        ({"sign": "paper", "strength": 0.5}, [3.0, -4.0, -8.0, 1.0]),
        ({"previous": PREVIOUS, "penalty": 0.25}, [-3.25, 11.0, 18.75, 0.75]),
        ({"sign": "paper", "previous": PREVIOUS, "penalty": torch.tensor(0.25)}, [4.75, -9.0, -17.25, 0.75]),
        ({"previous": PREVIOUS}, [-3.0, 11.0, 19.0, 1.0]),
        ({"penalty": 9.0}, [-3.0, 11.0, 19.0, 1.0]),
    ],
)
def test_accumulate_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    """From m = 1 with G_u · G_r = (4, −10, −18, 0); the penalty is always taken off, and only on M."""
    m = torch.ones(4)
    assert accumulate_(m, FORGET, RETAIN, **options) is None  # type: ignore[func-returns-value]
    assert m.tolist() == expected


def test_accumulate_leaves_its_inputs_alone_and_takes_other_precisions() -> None:
    """Only m changes; gradients in bfloat16 are multiplied in m's precision."""
    m, forget, retain = torch.zeros(4), FORGET.bfloat16(), RETAIN.bfloat16()
    accumulate_(m, forget, retain, previous=PREVIOUS, penalty=1.0)
    assert torch.equal(forget, FORGET.bfloat16()) and torch.equal(retain, RETAIN.bfloat16())
    assert m.tolist() == [-5.0, 10.0, 17.0, -1.0]


@pytest.mark.parametrize("wrong", ["forget_grad", "retain_grad", "previous"])
def test_accumulate_refuses_other_shapes(wrong: str) -> None:
    """Also those that would broadcast; the error names the argument and both shapes, and m is unchanged."""
    values = {"forget_grad": FORGET, "retain_grad": RETAIN, "previous": PREVIOUS}
    values[wrong] = values[wrong][:1]
    m = torch.ones(4)
    with pytest.raises(ValueError, match=rf"{wrong} has shape \(1,\), m has \(4,\)"):
        accumulate_(m, **values)
    assert m.tolist() == [1.0] * 4


def test_accumulate_refuses_an_unknown_sign() -> None:
    m = torch.ones(4)
    with pytest.raises(ValueError, match="'derived' or 'paper', found 'plus'"):
        accumulate_(m, FORGET, RETAIN, sign="plus")  # type: ignore[arg-type]
    assert m.tolist() == [1.0] * 4


ALPHA, LAMBDA = 0.5, 0.8


class Localisation:
    """Equation 8 with a continuous m and one gradient step, in float64, by plain full forwards.

    θ_ft = θ − α · m · G_u and θ' = θ − λ · (θ_ft − θ); what is minimised over m is L_r(θ').
    """

    def __init__(self, model: nn.Module, forget: list[Any], retain: list[Any], full_forward: Any) -> None:
        self.model, self.retain, self.forward = model, retain, full_forward
        self.theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.g_u = self.gradient(forget)
        self.g_r = self.gradient(retain)

    def mean_loss(self, model: nn.Module, examples: list[Any]) -> Tensor:
        return torch.stack([self.forward(model, e)[0].mean() for e in examples]).mean()

    def gradient(self, examples: list[Any]) -> dict[str, Tensor]:
        names, params = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(self.mean_loss(self.model, examples), params), strict=True))

    def retain_loss(self, m: dict[str, Tensor]) -> float:
        """L_r(θ'), every coordinate without an entry in m unmasked to 0."""
        moved = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                if name in m:
                    fine_tuned = self.theta[name] - ALPHA * m[name] * self.g_u[name]
                    p.copy_(self.theta[name] - LAMBDA * (fine_tuned - self.theta[name]))
            return float(self.mean_loss(moved, self.retain))


@pytest.fixture(scope="module")
def problem(make_model: Any, make_examples: Any, full_forward: Any) -> Localisation:
    """GPT-2: unlike Llama's norm, its arithmetic stays in float64 throughout."""
    model = make_model("gpt2", std=0.3).double()
    return Localisation(model, make_examples(4, seed=1), make_examples(4, seed=2), full_forward)


def largest(product: Tensor, count: int) -> list[int]:
    return product.abs().reshape(-1).topk(count).indices.tolist()


def test_gradient_with_respect_to_m_is_plus_lambda_alpha_product(problem: Localisation) -> None:
    """dL_r/dm = +λα · G_u · G_r by central differences, and accumulate_ with ``derived`` goes against it."""
    names = ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.bias"]
    checked = 0
    for name in names:
        product = problem.g_u[name] * problem.g_r[name]
        m = torch.zeros_like(product)
        accumulate_(m, problem.g_u[name], problem.g_r[name], sign="derived", strength=LAMBDA * ALPHA)
        printed = torch.zeros_like(product)
        accumulate_(printed, problem.g_u[name], problem.g_r[name], sign="paper", strength=LAMBDA * ALPHA)
        for at in largest(product, 4):
            nudge = torch.zeros_like(product)
            nudge.view(-1)[at] = 1e-2
            slope = (problem.retain_loss({name: nudge}) - problem.retain_loss({name: -nudge})) / 2e-2
            assert slope == pytest.approx(float(LAMBDA * ALPHA * product.view(-1)[at]), rel=1e-4)
            assert float(m.view(-1)[at]) == pytest.approx(-slope, rel=1e-4)
            assert float(printed.view(-1)[at]) == pytest.approx(slope, rel=1e-4)
            checked += 1
    assert checked == 12


def test_a_step_of_derived_lowers_the_retain_loss_and_one_of_paper_raises_it(problem: Localisation) -> None:
    """Over all coordinates at once, from m = 0, by the first-order amount λα · Σ (G_u · G_r)² a unit."""
    loss = {}
    for sign in ("derived", "paper"):
        m = {name: torch.zeros_like(g) for name, g in problem.g_u.items()}
        for name in m:
            accumulate_(m[name], problem.g_u[name], problem.g_r[name], sign=sign, strength=1e-2)  # type: ignore[arg-type]
        loss[sign] = problem.retain_loss(m)
    here = problem.retain_loss({})
    squares = sum(float((problem.g_u[n] * problem.g_r[n]).square().sum()) for n in problem.g_u)
    assert loss["derived"] < here < loss["paper"]
    assert loss["paper"] - loss["derived"] == pytest.approx(2e-2 * LAMBDA * ALPHA * squares, rel=1e-2)


@pytest.mark.parametrize("factor", [0.5, 1.0, 0.0])
def test_overlap_penalty_against_numpy(factor: float) -> None:
    """Unbiased standard deviations of G_u, or of the products."""
    forget, retain = normal(7, 3, seed=1), normal(7, 3, seed=2)
    by_gradient = overlap_penalty(forget, retain, form="gradient_std", factor=factor)
    by_product = overlap_penalty(forget, retain, form="product_std", factor=factor)
    assert by_gradient.ndim == by_product.ndim == 0
    assert float(by_gradient) == pytest.approx(factor * np.std(forget.numpy(), ddof=1))
    assert float(by_product) == pytest.approx(factor * np.std(forget.numpy() * retain.numpy(), ddof=1))


def test_overlap_penalty_of_one_element_is_zero() -> None:
    """Where a standard deviation is not a number."""
    assert float(overlap_penalty(torch.ones(1), torch.ones(1))) == 0.0


def test_overlap_penalty_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="'gradient_std' or 'product_std', found 'std'"):
        overlap_penalty(FORGET, RETAIN, form="std")  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 0.98, 0.999])
def test_exact_threshold_is_numpys_order_statistic(share: float) -> None:
    """The k-th largest entry with k = share · 1000."""
    m = normal(10, 100)
    k = round(share * 1000)
    assert float(threshold(m, share)) == np.partition(m.numpy().reshape(-1), 1000 - k)[1000 - k]


def test_a_tiny_share_keeps_one_entry() -> None:
    """Fewer than half an entry is rounded up to one."""
    m = normal(50)
    assert float(threshold(m, 0.001)) == float(m.max())


@pytest.mark.parametrize("estimator", ["exact", "sampled", "trimmed_linear"])
def test_threshold_at_the_ends(estimator: str) -> None:
    """A share of 1 keeps all, of 0 nothing, with every estimator; an empty tensor has no entries to lose."""
    m, generator = normal(20), torch.Generator().manual_seed(0)
    assert float(threshold(m, 1.0, estimator=estimator, generator=generator)) == -np.inf  # type: ignore[arg-type]
    assert float(threshold(m, 0.0, estimator=estimator, generator=generator)) == np.inf  # type: ignore[arg-type]
    assert top_share_mask(m[:0], 0.5, estimator=estimator, generator=generator).numel() == 0  # type: ignore[arg-type]


def test_sampled_threshold_is_near_the_exact_one() -> None:
    """Of 200,000 entries; the standard error of the share is sqrt(0.1 · 0.9 / 65,536) = 0.0012."""
    m = normal(200_000)
    for share in (0.1, 0.5):
        eta = threshold(m, share, estimator="sampled", generator=torch.Generator().manual_seed(3))
        assert float((m >= eta).double().mean()) == pytest.approx(share, abs=0.008)
        assert float(eta) != float(threshold(m, share))


def test_sampled_threshold_repeats_from_its_generator() -> None:
    """The same seed gives the same value, another one another, and global random numbers stay unused."""
    m = normal(SAMPLE_SIZE + 1)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (
        float(threshold(m, 0.1, estimator="sampled", generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampled_threshold_of_a_small_tensor_is_exact() -> None:
    """Nothing is drawn where everything can be looked at."""
    m = normal(999)
    assert threshold(m, 0.3, estimator="sampled", generator=torch.Generator()) == threshold(m, 0.3)


def test_trimmed_linear_by_hand() -> None:
    """On 1..100 the top 15 % begin at 86 and the top 85 % at 16: a line of −100 a unit of share."""
    m = torch.arange(100, 0, -1).double()
    for share, expected in ((0.15, 86.0), (0.85, 16.0), (0.5, 51.0), (0.3, 71.0), (0.05, 96.0), (0.95, 6.0)):
        assert float(threshold(m, share, estimator="trimmed_linear")) == pytest.approx(expected)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_threshold_refuses_a_share_outside_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], found"):
        threshold(FORGET, share)


def test_threshold_refuses_unknown_estimators_and_a_missing_generator() -> None:
    with pytest.raises(ValueError, match="found 'median'"):
        threshold(FORGET, 0.5, estimator="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sampled' needs a generator"):
        threshold(FORGET, 0.5, estimator="sampled")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.99, 1.0])
def test_mask_keeps_the_share(share: float) -> None:
    """Just so many entries, all of them at least as large as the rest."""
    m = normal(20, 50)
    mask = top_share_mask(m, share)
    assert (mask.shape, mask.dtype) == (m.shape, torch.bool)
    assert int(mask.sum()) == round(share * 1000)
    if 0 < share < 1:
        assert float(m[mask].min()) > float(m[~mask].max())


def test_mask_keeps_all_ties_at_the_threshold() -> None:
    """Half of (3, 2, 2, 1) is cut at 2, and both twos stay."""
    assert top_share_mask(torch.tensor([3.0, 2.0, 2.0, 1.0]), 0.5).tolist() == [True, True, True, False]


def test_masks_have_one_threshold_over_all_tensors() -> None:
    """A tensor of large entries keeps more than its share, one of small entries less."""
    m = {"large": normal(100, seed=1) + 3, "small": normal(20, 15, seed=2), "bias": normal(4, seed=3) - 9}
    masks = top_share_masks(m, 0.25)
    values = np.concatenate([t.numpy().reshape(-1) for t in m.values()])
    eta = np.sort(values)[::-1][round(0.25 * values.size) - 1]
    assert {n: t.shape for n, t in masks.items()} == {n: t.shape for n, t in m.items()}
    assert all(np.array_equal(masks[n].numpy(), m[n].numpy() >= eta) for n in m)
    assert sum(int(t.sum()) for t in masks.values()) == 101
    assert int(masks["large"].sum()) > 90 and int(masks["bias"].sum()) == 0


def _whole() -> dict[str, Tensor]:
    return {"a": normal(30, 7, seed=4), "b": normal(11, seed=5) + 1, "c": normal(5, 5, seed=6) * 2}


def _shards(rank: int) -> dict[str, Tensor]:
    """Uneven: rank 0 has the first 20 rows of ``a`` and all of ``b``, rank 1 the rest."""
    whole = _whole()
    return {"a": whole["a"][:20], "b": whole["b"]} if rank == 0 else {"a": whole["a"][20:], "c": whole["c"]}


def _rank(rank: int, folder: str, share: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    out: dict[str, Any] = {}
    for estimator in ("exact", "sampled", "trimmed_linear"):
        generator = torch.Generator().manual_seed(0)
        masks = top_share_masks(
            _shards(rank),
            share,
            estimator=estimator,  # type: ignore[arg-type]
            generator=generator,
            group=dist.group.WORLD,
        )
        out |= {f"{estimator}.{name}": mask for name, mask in masks.items()}
    np.savez(f"{folder}/{rank}.npz", **{name: mask.numpy() for name, mask in out.items()})
    dist.destroy_process_group()


def test_masks_over_two_processes_equal_those_of_one(tmp_path: Path) -> None:
    """A real gloo group of two processes with shards of different sizes."""
    share = 0.3
    mp.spawn(_rank, args=(str(tmp_path), share), nprocs=2)
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    for estimator in ("exact", "sampled", "trimmed_linear"):
        alone = top_share_masks(
            _whole(),
            share,
            estimator=estimator,  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(0),
        )
        joined = np.concatenate([ranks[0][f"{estimator}.a"], ranks[1][f"{estimator}.a"]])
        assert np.array_equal(joined, alone["a"].numpy())
        assert np.array_equal(ranks[0][f"{estimator}.b"], alone["b"].numpy())
        assert np.array_equal(ranks[1][f"{estimator}.c"], alone["c"].numpy())
    assert sum(int(t.sum()) for t in top_share_masks(_whole(), share).values()) == round(share * 246)
