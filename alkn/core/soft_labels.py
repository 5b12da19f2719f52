"""Entropic soft labels: how much each answer token still has to be unlearned."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

LOGIT_EPS = 1e-6
"""Probabilities are held this far from 0 and 1 before their logit is taken."""
SoftLabelForm = Literal["reference", "paper", "log_odds"]


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
            code with midpoint 0.8, which is exactly 0 at π = 0; ``log_odds`` (own):
            w = σ(scale · (logit π − logit midpoint)), which also tells apart probabilities near 0 and 1.
        scale: steepness (s, or k in the code), > 0.
        midpoint: probability at which the sigmoid is one half; inside (0, 1) for ``log_odds``.

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
    if form == "log_odds":
        if not 0.0 < midpoint < 1.0:
            raise ValueError(f"midpoint must be inside (0, 1) for 'log_odds', found {midpoint}")
        logit = torch.logit(token_probs, eps=LOGIT_EPS)
        return torch.sigmoid(scale * (logit - math.log(midpoint / (1.0 - midpoint))))
    raise ValueError(f"form must be 'reference', 'paper' or 'log_odds', found {form!r}")
