"""Entropic soft labels: how much each answer token still has to be unlearned."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SoftLabelForm = Literal["reference", "paper"]


def entropic_weights(
    token_probs: Tensor, *, form: SoftLabelForm = "reference", scale: float, midpoint: float
) -> Tensor:
    """Weight of each target token in the forget fine-tuning loss, from the model's own probability of it.

    The soft label puts its mass on the true token only, so it is one weight a token; a token
    that the model hardly knows gets a small one.

    Args:
        token_probs: probability of each target token, any shape, in [0, 1].
        form: ``paper``: w = σ(scale · (π − midpoint)), equation 6 with midpoint 1;
            ``reference``: w = min(1, σ(scale · (π − midpoint)) − σ(−scale · midpoint)), the authors'
            code with midpoint 0.8, which is exactly 0 at π = 0.
        scale: steepness (s, or k in the code), > 0.
        midpoint: probability at which the sigmoid is one half.

    Returns:
        Weights, same shape and dtype as ``token_probs``, in [0, 1].

    Raises:
        ValueError: on an unknown form or a scale that is not positive.

    Source: ALKN (ICML 2025) equation 6; zaocan666/ALKN at fd84124 for ``reference``.
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive, found {scale}")
    if form == "paper":
        return torch.sigmoid(scale * (token_probs - midpoint))
    if form == "reference":
        offset = torch.sigmoid(token_probs.new_tensor(-scale * midpoint))
        return (torch.sigmoid(scale * (token_probs - midpoint)) - offset).clamp(max=1.0)
    raise ValueError(f"form must be 'reference' or 'paper', found {form!r}")
