"""Quantization: does rounding the weights, as for cheap serving, bring forgotten records back?"""

from __future__ import annotations

import copy

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alkn.core.attack import Curve, Target, known_at
from alkn.core.distributed import refuse_split
from alkn.registry import Params, register_attack


class QuantizationParams(Params):
    """Budget of the attack.

    Attributes:
        bits: widths that the weights are rounded to, falling, each from the given model.
    """

    bits: tuple[int, ...] = Field((8, 4), min_length=1)

    @field_validator("bits")
    @classmethod
    def _falling(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= width <= 16 for width in bits) or any(a <= b for a, b in zip(bits, bits[1:], strict=False)):
            raise ValueError("expected numbers of bits from 16 to 2, each smaller than the one before")
        return bits


@register_attack(
    "quantization",
    params=QuantizationParams,
    source="Zhang et al. 2024, Catastrophic Failure of LLM Unlearning via Quantization",
)
def quantization(target: Target, params: QuantizationParams) -> Curve:
    """P and exact memorization of each request and P of each utility set, by the width of a weight.

    The first point is the given model, at the width of its dtype.
    """
    refuse_split(target.model, "quantization")
    stored = next(target.model.parameters()).dtype
    points, share = [known_at(torch.finfo(stored).bits, target, target.model)], 0.0
    for done, bits in enumerate(params.bits):
        target.progress("quantization", done, len(params.bits))
        copied = copy.deepcopy(target.model)
        share = quantize_(copied, bits=bits)
        points.append(known_at(bits, target, copied))
    target.progress("quantization", len(params.bits), len(params.bits))
    return Curve("bits", tuple(points), {"share_rounded": share})


@torch.no_grad()
def quantize_(model: nn.Module, *, bits: int) -> float:
    """Round every two-dimensional weight of ``model`` in place, an output channel at a time.

    Embeddings have a scale a token; vectors (norms, biases) stay. The weights keep their dtype: what is
    measured is the rounding, not an integer kernel.

    Returns:
        The share of all weights that was rounded.
    """
    # GPT-2's layers hold their weight transposed: their output channels are columns.
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    rounded = 0
    parameters = list(model.parameters())
    for weight in parameters:
        if weight.dim() == 2:
            source = weight.T if id(weight) in transposed else weight
            source.copy_(rounded_rows(source, bits=bits))
            rounded += weight.numel()
    return rounded / sum(weight.numel() for weight in parameters)


def rounded_rows(weight: Tensor, *, bits: int) -> Tensor:
    """Symmetric round-to-nearest, a scale a row: levels −n..n times (largest size of the row) / n, n = 2^(bits−1) − 1.

    In float64, so that a row's largest weight stays as it is and rounding twice changes nothing.

    Args:
        weight: ``[out, in]``, floating.
        bits: width, at least 2.

    Returns:
        The same shape and dtype.
    """
    levels = 2 ** (bits - 1) - 1
    exact = weight.double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    steps = torch.round(exact * levels / largest.clamp_min(torch.finfo(torch.float64).tiny))
    nearest: Tensor = steps * largest / levels
    return nearest.to(weight.dtype)
