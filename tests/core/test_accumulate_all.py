"""The update of m over a whole model: fused, in other precisions, and with a ternary G_r."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alkn.core.gradient_mask import accumulate_, accumulate_all_, overlap_penalty, retain_gain
from alkn.core.ternary import CPU_PART, Ternary

SHAPES = ((4, 5), (7,), (2, 3, 2), (1,))


def normals(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("sign", ["derived", "paper"])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_equals_numpy_and_the_loop_in_float64(sign: Any, masked: bool) -> None:
    """Three steps over four tensors; with M each tensor has a penalty of its own, one of them a tensor."""
    m, loop = normals(0), normals(0)
    expected = [t.numpy().copy() for t in m]
    used = [t > 0 for t in normals(9)]
    penalties: list[float | Tensor] = [0.5, torch.tensor(0.25, dtype=torch.float64), 0.0, 2.0]
    for step in range(3):
        g_u, g_r = normals(10 + step), normals(20 + step)
        more: dict[str, Any] = {"previous": used, "penalties": penalties} if masked else {}
        accumulate_all_(m, g_u, g_r, sign=sign, strength=0.8, **more)
        for k in range(4):
            one: dict[str, Any] = {"previous": used[k], "penalty": penalties[k]} if masked else {}
            accumulate_(loop[k], g_u[k], g_r[k], sign=sign, strength=0.8, **one)
            product = 0.8 * g_u[k].numpy() * g_r[k].numpy()
            expected[k] += product if sign == "paper" else -product
            expected[k] -= float(penalties[k]) * used[k].numpy() * masked
    for k in range(4):
        assert torch.equal(m[k], loop[k])
        np.testing.assert_allclose(m[k].numpy(), expected[k], rtol=1e-13, atol=1e-14)


def test_bfloat16_is_rounded_once_a_step() -> None:
    """m in bf16 after a step is the float32 result rounded: the products are not rounded before."""
    g_u, g_r = normals(1, torch.float32), normals(2, torch.bfloat16)
    m = [t.bfloat16() for t in normals(0)]
    wide = [t.float() - u * r.float() for t, u, r in zip(m, g_u, g_r, strict=True)]
    accumulate_all_(m, g_u, g_r)
    for narrow, exact in zip(m, wide, strict=True):
        assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, exact.bfloat16())


def test_bfloat16_over_ten_steps_stays_within_its_rounding() -> None:
    """Each step rounds once, by at most 2^-9 of the largest |m| on the way; G_r itself is rounded by 2^-9."""
    narrow, wide = [t.bfloat16() for t in normals(0)], [t.bfloat16().double() for t in normals(0)]
    bound = [torch.zeros_like(t) for t in wide]
    for step in range(10):
        g_u, g_r = normals(10 + step, torch.float32), normals(30 + step, torch.float32)
        accumulate_all_(narrow, g_u, [g.bfloat16() for g in g_r])
        accumulate_all_(wide, g_u, g_r)
        for k in range(4):
            bound[k] += 2**-9 * (g_u[k] * g_r[k]).abs() + 2**-9 * torch.maximum(wide[k].abs(), narrow[k].double().abs())
    worst = max(float(((a.double() - b).abs() / c).max()) for a, b, c in zip(narrow, wide, bound, strict=True))
    assert 0.01 < worst <= 1.0


def test_parts_of_a_large_tensor_join() -> None:
    """More entries than one part holds, in a precision that takes the parts."""
    generator = torch.Generator().manual_seed(0)
    g_u, g_r = (torch.randn(3, CPU_PART // 2, generator=generator) for _ in range(2))
    m = [torch.zeros(3, CPU_PART // 2, dtype=torch.bfloat16)]
    accumulate_all_(m, [g_u], [g_r])
    assert torch.equal(m[0], (-g_u * g_r).bfloat16())


def test_ternary_product_in_m() -> None:
    """Beside dense tensors: each takes the product of its own kind; m is float32, a = 8 loses nothing."""
    g_u, g_r = normals(1, torch.float32), normals(2, torch.float32)
    mixed = [g_r[0], Ternary.of(g_r[1], 0.5, gain=8.0), g_r[2], Ternary.of(g_r[3], 0.0, gain=8.0)]
    m = [torch.zeros(shape) for shape in SHAPES]
    accumulate_all_(m, g_u, mixed, sign="paper")
    hat = np.where(np.abs(g_r[1].numpy()) >= 0.5, np.sign(g_r[1].numpy()), 0)
    factor = np.select([hat == 1, hat == -1], [8.0, -8.0], 1.0)
    assert torch.equal(m[0], g_u[0] * g_r[0]) and torch.equal(m[2], g_u[2] * g_r[2])
    assert np.array_equal(m[1].numpy(), g_u[1].numpy() * factor.astype(np.float32))
    assert torch.equal(m[3], 8 * g_u[3] * g_r[3].sign())
    spread = np.std(g_u[1].numpy() * factor, ddof=1)
    assert float(overlap_penalty(g_u[1], mixed[1], form="product_std")) == pytest.approx(spread, rel=1e-5)


def test_gain_of_a_step_by_numpy() -> None:
    """Step · G_r in the step's precision, whatever G_r is kept in."""
    step, g_r = normals(1, torch.float32)[0], normals(2, torch.float32)[0]
    assert np.array_equal(retain_gain(step, g_r).numpy(), step.numpy() * g_r.numpy())
    rounded = retain_gain(step, g_r.bfloat16())
    assert rounded.dtype == torch.float32
    np.testing.assert_allclose(rounded.numpy(), step.numpy() * g_r.numpy(), rtol=2**-8)
    ternary = retain_gain(step, Ternary.of(g_r, 0.5, gain=8.0))
    large = g_r.abs() >= 0.5
    assert torch.equal(ternary, torch.where(large, 8 * step * g_r.sign(), step.abs()))


@pytest.mark.parametrize("wrong", ["forget_grad", "retain_grad", "ternary", "previous"])
def test_a_wrong_shape_in_the_last_tensor_changes_none(wrong: str) -> None:
    m, g_u, g_r, used = normals(0), normals(1), normals(2), [t > 0 for t in normals(3)]
    before = [t.clone() for t in m]
    if wrong == "ternary":
        mixed: list[Any] = [*g_r[:3], Ternary.of(torch.ones(2), 0.5, gain=2.0)]
        wrong, more = "retain_grad", {}
    else:
        mixed, more = g_r, {"previous": used, "penalties": [0.0] * 4}
        {"forget_grad": g_u, "retain_grad": mixed, "previous": used}[wrong][3] = torch.ones(2) > 0
    with pytest.raises(ValueError, match=rf"{wrong} has shape \(2,\), m has \(1,\)"):
        accumulate_all_(m, g_u, mixed, **more)
    assert all(torch.equal(a, b) for a, b in zip(m, before, strict=True))
