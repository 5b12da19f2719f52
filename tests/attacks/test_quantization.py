"""Rounding of weights against numpy, and what the attack reports."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from alkn import registry
from alkn.attacks.quantization import QuantizationParams, quantize_, rounded_rows
from alkn.core.attack import Target
from alkn.core.scoring import score


def by_numpy(weight: np.ndarray, bits: int) -> np.ndarray:
    """Row by row, number by number: the nearest level of the row's grid."""
    levels = np.arange(-(2 ** (bits - 1) - 1), 2 ** (bits - 1))
    out = np.empty_like(weight)
    for i, row in enumerate(weight):
        grid = levels * (np.abs(row).max() / levels[-1])
        out[i] = [grid[np.argmin(np.abs(grid - value))] for value in row]
    return out


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_against_numpy(bits: int) -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    expected = by_numpy(weight.numpy(), bits)
    assert np.abs(rounded_rows(weight, bits=bits).numpy() - expected).max() < 1e-12
    assert len(np.unique(rounded_rows(weight, bits=bits)[0])) <= 2**bits - 1


def test_by_hand() -> None:
    """Three bits: levels −3..3 times 0.6 / 3; a row of zeros stays."""
    weight = torch.tensor([[0.6, -0.29, 0.09, 0.31], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.6, -0.2, 0.0, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(rounded_rows(weight, bits=3), expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_twice_is_rounding_once(dtype: torch.dtype, bits: int) -> None:
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    once = rounded_rows(weight, bits=bits)
    assert once.dtype is dtype and not torch.equal(once, weight)
    assert torch.equal(rounded_rows(once, bits=bits), once)


@pytest.mark.parametrize("kind", ["llama", "llama_untied", "gpt2"])
def test_which_weights(kind: str, make_model) -> None:
    """Matrices an output channel at a time (columns in GPT-2's layers), vectors not at all."""
    model = make_model(kind, std=0.3)
    before = copy.deepcopy(model).state_dict()
    share = quantize_(model, bits=4)
    matrices = 0
    for name, weight in model.named_parameters():
        old = before[name].double().numpy()
        if weight.dim() == 1:
            assert torch.equal(weight, before[name]), name
            continue
        matrices += weight.numel()
        turned = kind == "gpt2" and ".h." in name
        expected = by_numpy(old.T, 4).T if turned else by_numpy(old, 4)
        assert np.abs(weight.detach().double().numpy() - expected).max() < 1e-6, name
    assert share == pytest.approx(matrices / sum(p.numel() for p in model.parameters()))


def test_the_report(memorised) -> None:
    model = memorised.model()
    before = copy.deepcopy(model).state_dict()
    target = Target(model, {"a": memorised.forget, "b": memorised.second}, {"retain": memorised.retain})
    found = registry.attacks["quantization"].call(target, QuantizationParams(bits=(8, 2)))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    whole, eight, two = found.points
    assert found.unit == "bits" and [point.at for point in found.points] == [32, 8, 2]
    rounded = memorised.model()
    quantize_(rounded, bits=8)
    second = score(rounded, memorised.second)
    assert eight.requests["b"].p == pytest.approx(float(second.probability.mean()))
    assert eight.known.p == pytest.approx((eight.requests["a"].p + eight.requests["b"].p) / 2)
    assert whole.utility["retain"] == pytest.approx(float(score(model, memorised.retain).probability.mean()))
    assert two.utility["retain"] < 0.5 < eight.utility["retain"]
    row = found.as_dict()["points"][2]
    assert row["requests"]["a"]["exact_memorization"] == two.requests["a"].exact_memorization
    assert row["utility"] == dict(two.utility)


@pytest.mark.parametrize("bits", [(), (1,), (17,), (4, 4), (4, 8)])
def test_widths(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        QuantizationParams(bits=bits)
