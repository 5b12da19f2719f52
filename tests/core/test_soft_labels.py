"""Entropic soft labels: hand-worked points, limits and errors of both forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from alkn.core.soft_labels import entropic_weights


def test_paper_form_at_hand_worked_points() -> None:
    """σ(10 · (π − 1)): one half at π = 1, 1 / (1 + e^5) at one half, 1 / (1 + e^10) at 0."""
    weights = entropic_weights(
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), form="paper", scale=10.0, midpoint=1.0
    )
    expected = [0.5, 1 / (1 + math.exp(5)), 1 / (1 + math.exp(10))]
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)


def test_reference_form_at_hand_worked_points() -> None:
    """With scale 10 and midpoint 0.8 the offset σ(−8) is taken off: 0 at π = 0, ½ − σ(−8) at 0.8."""
    offset = 1 / (1 + math.exp(8))
    weights = entropic_weights(torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64), scale=10.0, midpoint=0.8)
    assert weights[0] == 0.0
    assert weights[1:].tolist() == pytest.approx([0.5 - offset, 1 / (1 + math.exp(-2)) - offset], rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.5, 10.0, 200.0])
@pytest.mark.parametrize("midpoint", [0.0, 0.8, 1.0])
def test_both_forms_against_scipy(scale: float, midpoint: float) -> None:
    """Over a grid, next to scipy's sigmoid."""
    probs = torch.linspace(0, 1, 41, dtype=torch.float64)
    sigmoid = expit(scale * (probs.numpy() - midpoint))
    paper = entropic_weights(probs, form="paper", scale=scale, midpoint=midpoint)
    np.testing.assert_allclose(paper.numpy(), sigmoid, rtol=1e-12, atol=1e-15)
    reference = entropic_weights(probs, form="reference", scale=scale, midpoint=midpoint)
    expected = np.minimum(1, sigmoid - expit(-scale * midpoint))
    np.testing.assert_allclose(reference.numpy(), expected, rtol=1e-12, atol=1e-15)
    assert bool(((reference >= 0) & (reference <= 1) & (paper >= 0) & (paper <= 1)).all())


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_log_odds_form_against_scipy(scale: float) -> None:
    """σ(s · (logit π − logit midpoint)): at s = 1 and a midpoint of 0.1 it is π / (π + (1 − π) / 9)."""
    probs = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    weights = entropic_weights(probs, form="log_odds", scale=scale, midpoint=0.1)
    expected = expit(scale * (logit(probs.numpy()) - logit(0.1)))
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
    assert float(weights[1]) == 0.5
    if scale == 1.0:
        by_hand = [p / (p + (1 - p) / 9) for p in probs.tolist()]
        assert weights.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_log_odds_form_is_finite_at_the_ends() -> None:
    """Probabilities of exactly 0 and 1 do not give infinite or undefined weights."""
    weights = entropic_weights(torch.tensor([0.0, 1.0]), form="log_odds", scale=1.0, midpoint=0.076)
    assert 0 <= float(weights[0]) < 1e-4 and 1 - 1e-4 < float(weights[1]) <= 1


@pytest.mark.parametrize("form", ["paper", "reference", "log_odds"])
def test_better_known_tokens_weigh_more(form: str) -> None:
    """Weights rise strictly with the probability."""
    weights = entropic_weights(torch.linspace(0, 1, 11).double(), form=form, scale=10.0, midpoint=0.8)  # type: ignore[arg-type]
    assert bool((weights.diff() > 0).all())


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_steep_limit_is_a_step(form: str) -> None:
    """A very large scale gives 0 below the midpoint and 1 above it."""
    weights = entropic_weights(torch.tensor([0.0, 0.7, 0.9, 1.0]), form=form, scale=1e4, midpoint=0.8)  # type: ignore[arg-type]
    assert weights.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_stay(dtype: torch.dtype) -> None:
    """Any shape, the empty one too, and the precision of the input."""
    for shape in ((), (3, 2), (0,)):
        probs = torch.full(shape, 0.3, dtype=dtype)
        weights = entropic_weights(probs, scale=1.5, midpoint=0.8)
        assert (weights.shape, weights.dtype) == (probs.shape, dtype)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scale_must_be_positive(scale: float) -> None:
    """The error names what was found."""
    with pytest.raises(ValueError, match=f"scale must be positive, found {scale}"):
        entropic_weights(torch.ones(1), scale=scale, midpoint=0.8)


def test_unknown_form() -> None:
    """The error names the known forms and what was found."""
    with pytest.raises(ValueError, match="form must be 'reference', .*'paper'.*found 'linear'"):
        entropic_weights(torch.ones(1), form="linear", scale=1.0, midpoint=0.8)  # type: ignore[arg-type]
