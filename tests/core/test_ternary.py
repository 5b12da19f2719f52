"""G_r in two bits an entry: packing, the kept signs, and what replaces the products (equation 56)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from alkn.core.ternary import CPU_PART, Ternary, look_up, pack, unpack


def signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bytes_by_hand() -> None:
    """Two bits an entry, the first lowest; 0, 1 and 2 for 0, +1 and −1; the last byte is filled up."""
    packed = pack(torch.tensor([1, 0, -1, 1, -1]))
    assert (packed.dtype, packed.tolist()) == (torch.uint8, [1 + 0 * 4 + 2 * 16 + 1 * 64, 2])


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (4,), (5,), (7, 3), (2, 3, 5), (0,)])
def test_round_trip(shape: tuple[int, ...]) -> None:
    """Every entry comes back, in a quarter of as many bytes as there are entries, rounded up."""
    values = signs(*shape)
    packed = pack(values)
    assert packed.numel() == -(-values.numel() // 4)
    assert torch.equal(unpack(packed, values.shape), values)


def test_round_trip_of_floats_and_of_every_byte() -> None:
    every = torch.tensor(np.array(np.meshgrid(*[[0.0, 1.0, -1.0]] * 4)).reshape(4, -1).T.copy())
    assert torch.equal(unpack(pack(every), every.shape).double(), every)
    assert pack(every).unique().numel() == 81


@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_byte_is_looked_up(one_by_one: bool) -> None:
    """A CPU's way and a GPU's, by hand: two bits an entry, the lowest first."""
    every = torch.arange(256, dtype=torch.uint8)
    for values, dtype in (((1.0, 100.0, -100.0), torch.float32), ((0, 1, -1), torch.int8)):
        by_hand = [(*values, values[0])[(byte >> shift) & 3] for byte in range(256) for shift in (0, 2, 4, 6)]
        found = look_up(every, values, dtype, one_by_one=one_by_one)
        assert found.dtype is dtype and found.tolist() == by_hand


def test_equation_56_by_hand() -> None:
    """Threshold 2 keeps four signs, an entry at it included; a = 10."""
    g_r = torch.tensor([3.0, -3.0, 1.0, -1.0, 0.0, 2.0, -2.0])
    g_u = torch.tensor([5.0, 5.0, 5.0, -5.0, 7.0, -1.0, 0.5])
    ternary = Ternary.of(g_r, 2.0, gain=10.0)
    assert unpack(ternary.packed, ternary.shape).tolist() == [1, -1, 0, 0, 0, 1, -1]
    assert ternary.product(g_u).tolist() == [50.0, -50.0, 5.0, -5.0, 7.0, -10.0, -5.0]


def test_ranking_by_hand() -> None:
    """First what helps the retain set, then what it does not notice by its size, last what harms it."""
    ternary = Ternary.of(torch.tensor([9.0, -9.0, 9.0, 0.1, 0.1, -9.0]), 1.0, gain=100.0)
    step = torch.tensor([0.5, 0.5, -0.25, -2.0, 1.0, -0.125])
    assert ternary.ranking(step).tolist() == [50.0, -50.0, -25.0, 2.0, 1.0, 12.5]


def test_product_against_numpy_over_several_chunks() -> None:
    """The printed formula with its three indicator terms; the shape is kept."""
    g_r, g_u = normal(3, (2 * CPU_PART + 9) // 3, seed=1), normal(3, (2 * CPU_PART + 9) // 3, seed=2)
    ternary = Ternary.of(g_r, 0.7, gain=64.0)
    hat = np.where(np.abs(g_r.numpy()) >= 0.7, np.sign(g_r.numpy()), 0)
    u = g_u.numpy()
    expected = u * (hat == 0) + 64.0 * u * (hat == 1) - 64.0 * u * (hat == -1)
    assert np.array_equal(ternary.product(g_u).numpy(), expected)
    assert ternary.packed.numel() == -(-g_r.numel() // 4)


@pytest.mark.parametrize("gain", [1.0, 0.5, -3.0])
def test_a_gain_that_is_not_above_one_is_refused(gain: float) -> None:
    with pytest.raises(ValueError, match="gain must be above 1"):
        Ternary.of(torch.ones(3), 0.5, gain=gain)
