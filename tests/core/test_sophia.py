"""Sophia and its two estimates of the curvature, against numpy, quadratics and finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from randomness import seeded
from scipy.special import softmax
from torch import Tensor, nn

from alkn.core.scoring import collate
from alkn.core.sophia import Sophia, gauss_newton_bartlett, hutchinson
from alkn.core.training import answer_loss

CPU = torch.device("cpu")


def test_sophia_against_numpy() -> None:
    """Two groups, five steps, curvature at steps 0 and 3, positive, zero and negative; some entries are clipped."""
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (5,)]
    start = [rng.normal(size=shape) for shape in shapes]
    params = [nn.Parameter(torch.tensor(t)) for t in start]
    rates, decays = [0.1, 0.02], [0.5, 0.0]
    groups = [{"params": [p], "lr": r, "weight_decay": d} for p, r, d in zip(params, rates, decays, strict=True)]
    sophia = Sophia(groups, lr=1.0, betas=(0.8, 0.6), gamma=0.3)
    theta, m, h = [t.copy() for t in start], [0 * t for t in start], [0 * t for t in start]
    clipped = []
    for step in range(5):
        given = [rng.normal(size=shape) for shape in shapes]
        if step in (0, 3):
            curvature = [rng.normal(1.0, 1.0, size=shape) * (rng.random(shape) > 0.2) for shape in shapes]
            sophia.update_curvature([torch.tensor(c) for c in curvature])
            h = [0.6 * old + 0.4 * new for old, new in zip(h, curvature, strict=True)]
        for i, p in enumerate(params):
            p.grad = torch.tensor(given[i])
            m[i] = 0.8 * m[i] + 0.2 * given[i]
            ratio = m[i] / np.maximum(0.3 * h[i], 1e-12)
            clipped += list((np.abs(ratio) > 1).reshape(-1))
            theta[i] = theta[i] * (1 - rates[i] * decays[i]) - rates[i] * np.clip(ratio, -1, 1)
        sophia.step()
        for p, t in zip(params, theta, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), t, rtol=1e-12)
    assert 0.2 < np.mean(clipped) < 0.9


def test_sophia_takes_newton_steps_on_a_quadratic() -> None:
    """Curvatures from 0.1 to 1000, no averaging, γ = 1: the minimum in one step, from within reach of the clip."""
    curvature = torch.logspace(-1, 3, 9, dtype=torch.float64)
    minimum = torch.linspace(-2, 2, 9, dtype=torch.float64)
    theta = nn.Parameter(minimum + 0.9 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1], dtype=torch.float64))
    sophia = Sophia([theta], lr=1.0, betas=(0.0, 0.0), gamma=1.0)

    def loss() -> Tensor:
        return 0.5 * (curvature * (theta - minimum).square()).sum()

    sophia.update_curvature(hutchinson(loss, [theta], generator=seeded()))
    loss().backward()
    sophia.step()
    torch.testing.assert_close(theta.detach(), minimum, rtol=1e-12, atol=1e-12)


def test_sophia_leaves_what_has_no_gradient_and_takes_no_closure() -> None:
    still, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    sophia = Sophia([still, moved], lr=0.1)
    moved.grad = torch.tensor([3.0, -0.001])
    sophia.step()
    assert still.tolist() == [1.0, 1.0]
    torch.testing.assert_close(moved.detach(), torch.tensor([0.9, 1.1]))
    with pytest.raises(ValueError, match="closure"):
        sophia.step(lambda: None)
    with pytest.raises(ValueError, match="shorter"):
        sophia.update_curvature([torch.ones(2)])


def test_hutchinson_on_a_known_hessian() -> None:
    """A dense 4 × 4 Hessian: the mean of 600 estimates is its diagonal, within five standard errors."""
    upper = [[2.0, 0.5, -1.0, 0.3], [0, -1.5, 0.7, 0.2], [0, 0, 0.4, -0.6], [0, 0, 0, 0.0]]
    hessian = torch.tensor(upper, dtype=torch.float64).triu(1)
    hessian = hessian + hessian.T + torch.diag(torch.tensor([2.0, -1.5, 0.4, 0.0], dtype=torch.float64))
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    unused = nn.Parameter(torch.ones(2))
    generator = seeded(3)
    draws = []
    for _ in range(600):
        estimate, zero = hutchinson(lambda: 0.5 * theta @ hessian @ theta, [theta, unused], generator=generator)
        draws.append(estimate.numpy())
        assert not zero.any()
    error = np.std(draws, axis=0) / math.sqrt(600)
    assert np.all(np.abs(np.mean(draws, axis=0) - [2.0, -1.5, 0.4, 0.0]) < 5 * error) and error.max() < 0.1


def test_hutchinson_of_a_linear_loss_is_zero() -> None:
    theta = nn.Parameter(torch.ones(3))
    assert not hutchinson(lambda: theta.sum(), [theta], generator=seeded())[0].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hutchinson_of_a_transformer_by_finite_differences(kind: str, make_model: Any, make_examples: Any) -> None:
    """u ⊙ (∇L(θ + εu) − ∇L(θ − εu)) / 2ε in float64, with the same signs; ``grad`` fields stay empty."""
    model, batch = make_model(kind, std=0.2).double(), collate(make_examples(3), [0, 1, 2], device=CPU)
    params = list(model.parameters())
    logits = answer_loss()
    estimate = hutchinson(lambda: logits(model, batch), params, generator=seeded(5))
    assert all(p.grad is None for p in params)
    generator = seeded(5)
    signs = [2 * torch.randint(2, p.shape, generator=generator).double() - 1 for p in params]
    sides, size = [], 1e-5
    for side in (1, -1):
        with torch.no_grad():
            for p, u in zip(params, signs, strict=True):
                p.add_(u, alpha=side * size)
        sides.append(torch.autograd.grad(logits(model, batch), params, allow_unused=True, materialize_grads=True))
        with torch.no_grad():
            for p, u in zip(params, signs, strict=True):
                p.sub_(u, alpha=side * size)
    for found, u, up, down in zip(estimate, signs, *sides, strict=True):
        # The cross-entropy is taken in float32, which bounds the differences.
        torch.testing.assert_close(found, u * (up - down) / (2 * size), rtol=0.02, atol=0.02)


def test_gauss_newton_estimate_is_labels_times_the_squared_gradient(
    make_model: Any, make_examples: Any, full_forward: Any
) -> None:
    """The drawn labels are put into the records, whose mean loss is then taken by full forwards."""
    model, examples = make_model("llama", std=0.2), make_examples(4)
    batch = collate(examples, range(4), device=CPU)
    params = list(model.parameters())
    estimate = gauss_newton_bartlett(model, batch, params, generator=seeded(2))
    assert all(p.grad is None for p in params)
    logits = torch.cat([full_forward(model, e)[1] for e in examples])
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=seeded(2)).squeeze(1)
    picked = -torch.log_softmax(logits, -1)[torch.arange(len(drawn)), drawn]
    for found, g in zip(estimate, torch.autograd.grad(picked.mean(), params), strict=True):
        torch.testing.assert_close(found, len(drawn) * g.square(), rtol=1e-3, atol=1e-7)


def test_gauss_newton_estimate_is_unbiased(make_model: Any, make_examples: Any) -> None:
    """Of the head's matrix the diagonal is known: the mean over labels of π_k (1 − π_k) · h_j²."""
    model, examples = make_model("llama_untied", std=0.3), make_examples(2)
    batch = collate(examples, range(2), device=CPU)
    head: nn.Parameter = model.get_output_embeddings().weight
    with torch.no_grad():
        states = model.base_model(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)[batch.positions].numpy()
    pi = softmax(states @ head.detach().numpy().T, axis=-1)
    diagonal = np.einsum("lk,lj->kj", pi * (1 - pi), states**2) / len(states)
    generator = seeded(0)
    mean = np.mean(
        [gauss_newton_bartlett(model, batch, [head], generator=generator)[0].numpy() for _ in range(300)], axis=0
    )
    assert mean.sum() == pytest.approx(diagonal.sum(), rel=0.05)
    np.testing.assert_allclose(mean.sum(0), diagonal.sum(0), rtol=0.15)
    often = diagonal.sum(1) > np.quantile(diagonal.sum(1), 0.9)
    np.testing.assert_allclose(mean.sum(1)[often].sum(), diagonal.sum(1)[often].sum(), rtol=0.1)
