"""The learned mask m: which coordinates of the model a request may change.

``m`` is one real number a parameter, zero at the start of every request. It is moved by the
products of the forget and the retain gradient, and its largest entries form the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import BoolTensor, Generator, Tensor

from alkn.core.distributed import joined, sum_
from alkn.core.ternary import Ternary, part_size

RetainGradient = Tensor | Ternary
"""G_r of one tensor, or what stands in for it."""
Sign = Literal["derived", "paper"]
Estimator = Literal["exact", "sampled", "trimmed_linear"]
PenaltyForm = Literal["gradient_std", "product_std"]

SAMPLE_SIZE = 65_536
TRIM = 0.15


def accumulate_(
    m: Tensor,
    forget_grad: Tensor,
    retain_grad: Tensor,
    *,
    sign: Sign = "derived",
    strength: float = 1.0,
    previous: Tensor | None = None,
    penalty: float | Tensor = 0.0,
) -> None:
    """Move ``m`` in place by one step of the mask's own gradient descent.

    ``derived``: m ← m − strength · G_u · G_r − penalty · M, the sign that the chain rule gives;
    ``paper``: m ← m + strength · G_u · G_r − penalty · M, as equation 9 prints it.

    Args:
        m: mask variable, any shape; changed in place.
        forget_grad: G_u, same shape as ``m``.
        retain_grad: G_r, same shape as ``m``.
        sign: which of the two signs.
        strength: factor on the product, λ in equation 9.
        previous: boolean M, the union of the earlier requests' masks, same shape; ``None``: empty.
        penalty: μ itself, taken off where ``previous`` is true; a number or a 0-d tensor.

    Raises:
        ValueError: on shapes that differ or an unknown sign.

    Source: ALKN (ICML 2025) equations 8, 9, 52-54; docs/METHOD.md for the sign.
    """
    accumulate_all_(
        [m], [forget_grad], [retain_grad], sign=sign, strength=strength,
        previous=None if previous is None else [previous], penalties=[penalty],
    )  # fmt: skip


def accumulate_all_(
    m: Sequence[Tensor],
    forget_grads: Sequence[Tensor],
    retain_grads: Sequence[RetainGradient],
    *,
    sign: Sign = "derived",
    strength: float = 1.0,
    previous: Sequence[Tensor] | None = None,
    penalties: Sequence[float | Tensor] = (),
) -> None:
    """:func:`accumulate_` for all tensors of a model: fused, and without waiting for the device.

    Product and sum are computed in the widest of the three precisions and rounded once, to that of
    ``m``. Where G_r is ternary, the product is :meth:`alkn.core.ternary.Ternary.product`.

    Args:
        m: mask variables, contiguous; changed in place.
        forget_grads: G_u of each.
        retain_grads: G_r of each.
        sign: see :func:`accumulate_`.
        strength: see :func:`accumulate_`.
        previous: boolean M of each; ``None``: empty.
        penalties: μ of each, read only with ``previous``.

    Raises:
        ValueError: on shapes that differ or an unknown sign, before anything is changed.

    Source: ALKN (ICML 2025) equations 8, 9, 52-54, 56.
    """
    if sign not in ("derived", "paper"):
        raise ValueError(f"sign must be 'derived' or 'paper', found {sign!r}")
    for name, others in (("forget_grad", forget_grads), ("retain_grad", retain_grads), ("previous", previous)):
        for variable, other in zip(m, others or (), strict=bool(others)):
            if other.shape != variable.shape:
                raise ValueError(f"{name} has shape {tuple(other.shape)}, m has {tuple(variable.shape)}")
    direction = -strength if sign == "derived" else strength
    fused: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for variable, forget, retain in zip(m, forget_grads, retain_grads, strict=True):
        if isinstance(retain, Tensor) and variable.dtype == forget.dtype == retain.dtype:
            for part, tensor in zip(fused, (variable, forget, retain), strict=True):
                part.append(tensor)
        else:
            _add_product_in_parts_(variable, forget, retain, direction)
    if fused[0]:
        torch._foreach_addcmul_(*fused, value=direction)
    if previous is not None:
        for variable, used, penalty in zip(m, previous, penalties, strict=True):
            variable.sub_(used.to(variable.dtype) * penalty)


def _add_product_in_parts_(m: Tensor, forget: Tensor, retain: RetainGradient, direction: float) -> None:
    """Add direction · G_u · G_r to m, a part at a time: other precisions and two-bit signs are widened on the way."""
    flat, forget = m.view(-1), forget.detach().reshape(-1)
    if isinstance(retain, Ternary):
        for part, factor in retain.factors():
            flat[part].addcmul_(forget[part], factor, value=direction)
        return
    size = part_size(m)
    for variable, g_u, g_r in zip(flat.split(size), forget.split(size), retain.reshape(-1).split(size), strict=True):
        variable.addcmul_(g_u, g_r, value=direction)


def retain_gain(step: Tensor, retain_grad: RetainGradient) -> Tensor:
    """What each coordinate of ``step`` gains the retain set when it is taken back: step · G_r, to first order.

    Args:
        step: θ_ft − θ, any shape.
        retain_grad: G_r, same shape; for a ternary one see :meth:`alkn.core.ternary.Ternary.ranking`.

    Returns:
        Same shape and precision as ``step``.
    """
    return retain_grad.ranking(step) if isinstance(retain_grad, Ternary) else (step * retain_grad).to(step.dtype)


def overlap_penalty(
    forget_grad: Tensor,
    retain_grad: RetainGradient,
    *,
    form: PenaltyForm = "gradient_std",
    factor: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The size μ of the penalty on coordinates that earlier requests already used.

    Args:
        forget_grad: G_u, any shape with at least two elements (else the penalty is 0).
        retain_grad: G_r, same shape.
        form: ``gradient_std``: factor · std(G_u), the paper's reading; ``product_std``:
            factor · std(G_u · G_r), the authors' code with factor 0.5.
        factor: multiplier, ≥ 0.
        group: processes that hold the other parts of both; ``None``: they are whole.

    Returns:
        0-d tensor, ≥ 0, unbiased standard deviation.

    Source: ALKN (ICML 2025) section 4.2; zaocan666/ALKN at fd84124.
    """
    if form == "gradient_std":
        values = forget_grad
    elif form == "product_std":
        values = retain_grad.product(forget_grad) if isinstance(retain_grad, Ternary) else forget_grad * retain_grad
    else:
        raise ValueError(f"form must be 'gradient_std' or 'product_std', found {form!r}")
    if group is not None:
        return factor * _spread(values, group)
    if values.numel() < 2:
        return values.new_zeros(())
    return factor * values.std()


def _spread(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The unbiased standard deviation of all parts of a tensor."""
    count, total = sum_(torch.stack([part.new_full((), part.numel()), part.sum()]), group)
    squares = sum_((part - total / count).square().sum(), group)
    return torch.where(count < 2, 0, (squares / (count - 1).clamp(min=1)).sqrt())


def threshold(
    m: Tensor,
    share: float,
    *,
    estimator: Estimator = "exact",
    generator: Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The value η that the largest ``share`` of the entries of ``m`` reach or pass.

    Args:
        m: any shape, finite.
        share: share of entries to keep, in [0, 1]. 1 gives −inf, 0 gives +inf.
        estimator: ``exact``: order statistic; ``sampled``: order statistic of 65,536 entries drawn
            with ``generator``; ``trimmed_linear``: linear between the values at the bottom and
            the top 15 percent (appendix D), extrapolated outside them.
        generator: source of randomness of ``sampled``; required there.
        group: processes that hold the other parts of ``m``, cut along its first dimension; ``None``: it is whole.

    Returns:
        0-d tensor of ``m``'s dtype.

    Raises:
        ValueError: on a share outside [0, 1], an unknown estimator or a missing generator.

    Source: ALKN (ICML 2025) appendix D.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], found {share}")
    if share == 1.0 or (m.numel() == 0 and group is None):
        return m.new_full((), float("-inf"))
    if share == 0.0:
        return m.new_full((), float("inf"))
    flat = m.detach().reshape(-1)
    if group is not None:
        flat = joined(flat, group)
    if estimator == "sampled":
        if generator is None:
            raise ValueError("the estimator 'sampled' needs a generator")
        if flat.numel() > SAMPLE_SIZE:
            picks = torch.randint(flat.numel(), (SAMPLE_SIZE,), generator=generator, device=generator.device)
            flat = flat[picks.to(flat.device)]
        return _largest(flat, share)
    if estimator == "exact":
        return _largest(flat, share)
    if estimator == "trimmed_linear":
        high, low = _largest(flat, TRIM), _largest(flat, 1.0 - TRIM)
        return high + (low - high) * ((share - TRIM) / (1.0 - 2 * TRIM))
    raise ValueError(f"estimator must be 'exact', 'sampled' or 'trimmed_linear', found {estimator!r}")


def _largest(flat: Tensor, share: float) -> Tensor:
    """The k-th largest value, k = round(share · n), at least 1."""
    k = max(1, round(share * flat.numel()))
    return torch.kthvalue(flat, flat.numel() - k + 1).values


def top_share_mask(
    m: Tensor,
    share: float,
    *,
    estimator: Estimator = "exact",
    generator: Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> BoolTensor:
    """True where ``m`` is among its largest ``share`` of entries: 1[m ≥ η].

    Args:
        m: any shape.
        share: share of entries to keep, in [0, 1].
        estimator: see :func:`threshold`. Ties at η are all kept.
        generator: see :func:`threshold`.
        group: see :func:`threshold`.

    Returns:
        Boolean tensor, same shape as ``m``.

    Source: ALKN (ICML 2025) equation 7.
    """
    mask = m >= threshold(m, share, estimator=estimator, generator=generator, group=group)
    return mask  # type: ignore[return-value]


def top_share_masks(
    m: Mapping[str, Tensor],
    share: float,
    *,
    estimator: Estimator = "exact",
    generator: Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, BoolTensor]:
    """:func:`top_share_mask` with one η over all tensors of a model, and over all ranks of a group.

    Args:
        m: parameter name -> mask variable. With ``group`` each rank passes its own shards.
        share: share of all entries to keep, in [0, 1].
        estimator: see :func:`threshold`.
        generator: see :func:`threshold`.
        group: process group that holds the shards; ``None``: this process holds everything.

    Returns:
        Name -> boolean tensor; every rank cuts at the same η.
    """
    flat = torch.cat([t.detach().reshape(-1) for t in m.values()])
    eta = threshold(flat, share, estimator=estimator, generator=generator, group=group)
    return {name: t >= eta for name, t in m.items()}  # type: ignore[misc]
