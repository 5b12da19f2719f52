"""A retain gradient in two bits an entry: the signs of its large entries, and zero for the rest (equation 56)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CPU_PART, DEVICE_PART = 1 << 16, 1 << 24
"""Entries that are worked on at once, multiples of 4: what is widened stays in a CPU's cache, or is worth a launch."""
PLACES = (1, 4, 16, 64)
"""Value of each of the four entries of a byte; an entry is 0, 1 for +1, or 2 for −1."""


def pack(signs: Tensor) -> Tensor:
    """Four entries of −1, 0 or +1 in a byte, in flat order; the last byte is filled up with zeros.

    Args:
        signs: any shape, any signed type.

    Returns:
        uint8, ``[ceil(n / 4)]``.
    """
    flat = signs.reshape(-1).to(torch.int8)
    codes = torch.zeros(-(-flat.numel() // 4) * 4, dtype=torch.uint8, device=flat.device)
    codes[: flat.numel()] = (flat * flat + (flat < 0)).to(torch.uint8)
    places = torch.tensor(PLACES, dtype=torch.uint8, device=flat.device)
    return (codes.view(-1, 4) * places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`pack` packed, as int8 of ``shape``."""
    return _looked_up(packed, (0, 1, -1), torch.int8)[: shape.numel()].reshape(shape)


def part_size(tensor: Tensor) -> int:
    """How many entries of ``tensor`` are widened at once."""
    return CPU_PART if tensor.device.type == "cpu" else DEVICE_PART


@dataclass(frozen=True)
class Ternary:
    """Ĝ_r of one tensor: what stands in for G_r where memory counts.

    Attributes:
        packed: Ĝ_r, see :func:`pack`.
        shape: of the tensor it stands for.
        gain: a, > 1: how much more an entry with a sign counts than one without.

    Source: ALKN (ICML 2025) equation 56.
    """

    packed: Tensor
    shape: torch.Size
    gain: float

    @classmethod
    def of(cls, gradient: Tensor, eta: Tensor | float, *, gain: float) -> Ternary:
        """The signs of the entries of ``gradient`` whose size is at least ``eta``.

        Raises:
            ValueError: if ``gain`` is not above 1.
        """
        if gain <= 1:
            raise ValueError(f"gain must be above 1, found {gain}")
        flat = gradient.detach().reshape(-1)
        parts = [torch.where(part.abs() >= eta, part.sign(), 0) for part in flat.split(part_size(flat))]
        return cls(torch.cat([pack(part) for part in parts]), gradient.shape, gain)

    def factors(self) -> Iterator[tuple[slice, Tensor]]:
        """By flat slices: 1 where Ĝ_r is 0, a where it is +1, −a where it is −1, in float32."""
        total, size, values = self.shape.numel(), part_size(self.packed), (1.0, self.gain, -self.gain)
        for begin in range(0, total, size):
            end = min(begin + size, total)
            part = self.packed[begin // 4 : -(-end // 4)]
            yield slice(begin, end), _looked_up(part, values, torch.float32)[: end - begin]

    def product(self, forget_grad: Tensor) -> Tensor:
        """What replaces G_u · G_r: G_u·[Ĝ_r = 0] + a·G_u·[Ĝ_r = 1] − a·G_u·[Ĝ_r = −1], of G_u's shape."""
        flat = forget_grad.reshape(-1)
        out = torch.empty_like(flat)
        for part, factor in self.factors():
            torch.mul(flat[part], factor, out=out[part])
        return out.reshape(self.shape)

    def ranking(self, step: Tensor) -> Tensor:
        """What replaces (θ_ft − θ) · G_r: a·step·Ĝ_r where Ĝ_r has a sign, |step| where it has none.

        Taking back a coordinate without a sign neither helps nor harms the retain set to first order,
        so those come after all that help and before all that harm, the furthest moved first: it
        forgets most.
        """
        flat = step.reshape(-1)
        out = torch.empty_like(flat)
        for part, factor in self.factors():
            torch.mul(flat[part], factor, out=out[part])
            out[part].copy_(torch.where(factor == 1, flat[part].abs(), out[part]))
        return out.reshape(self.shape)


def look_up(packed: Tensor, values: tuple[float, float, float], dtype: torch.dtype, *, one_by_one: bool) -> Tensor:
    """A value for each of the four entries of every byte.

    Args:
        packed: uint8, ``[bytes]``, see :func:`pack`.
        values: for zero, +1 and −1.
        dtype: of the result.
        one_by_one: look up each entry, fifteen times faster on a GPU, or all four of a byte, faster on a CPU.

    Returns:
        ``[4 * bytes]``, in flat order.
    """
    table = _table(values, dtype, packed.device, one_by_one)
    if not one_by_one:
        return table.index_select(0, packed.int()).view(-1)
    codes = packed.unsqueeze(1).bitwise_right_shift(_shifts(packed.device)).bitwise_and_(3)
    return table.index_select(0, codes.view(-1).int())


def _looked_up(packed: Tensor, values: tuple[float, float, float], dtype: torch.dtype) -> Tensor:
    return look_up(packed, values, dtype, one_by_one=packed.device.type != "cpu")


@lru_cache(maxsize=16)
def _table(values: tuple[float, float, float], dtype: torch.dtype, device: torch.device, one_by_one: bool) -> Tensor:
    """The value of each code, ``[4]``, or those of each byte, ``[256, 4]``; kept: making it waits for the device."""
    of_code = torch.tensor((*values, values[0]), dtype=dtype, device=device)
    every = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1)
    return of_code if one_by_one else of_code[(every.bitwise_right_shift(_shifts(device)) & 3).int()]


@lru_cache(maxsize=16)
def _shifts(device: torch.device) -> Tensor:
    """By how many bits each entry of a byte is shifted, ``[4]``; kept as well."""
    return torch.tensor([place.bit_length() - 1 for place in PLACES], dtype=torch.uint8, device=device)
