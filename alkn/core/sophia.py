"""Sophia: gradients divided by an estimate of the Hessian's diagonal, clipped a coordinate at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from alkn.core.distributed import whole_batches
from alkn.core.scoring import Batch, answer_logits


class Sophia(Optimizer):
    """θ ← θ − lr · clip(m / max(gamma · h, epsilon), 1), with decoupled weight decay before it.

    m is the moving average of the gradients, h that of the curvature estimates given to
    :meth:`update_curvature`. Where h is zero or negative, also before the first estimate, the
    update is ± lr.

    Args:
        params: parameters or groups of them.
        lr: learning rate, also the largest change of a coordinate in a step (weight decay apart).
        betas: decay of m a step, and of h an estimate.
        gamma: factor on h; the smaller, the more coordinates are clipped.
        epsilon: least denominator.
        weight_decay: decoupled decay, a share of ``lr``.

    Source: Liu et al. 2024, "Sophia", algorithm 3.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        gamma: float = 0.04,
        epsilon: float = 1e-12,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "epsilon": epsilon, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def update_curvature(self, estimates: Sequence[Tensor]) -> None:
        """Move the average: h ← β₂ · h + (1 − β₂) · estimate.

        Args:
            estimates: one tensor a parameter, in the order of the groups.

        Raises:
            ValueError: if there are more or fewer estimates than parameters.
        """
        given = [(group, p) for group in self.param_groups for p in group["params"]]
        for (group, p), estimate in zip(given, estimates, strict=True):
            h = self._of(p)["h"]
            h.lerp_(estimate.to(h.dtype), 1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: if a closure is given: the loss is evaluated once a step, by the caller.
        """
        if closure is not None:
            raise ValueError("Sophia takes no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._of(p)
                state["m"].lerp_(p.grad, 1 - group["betas"][0])
                scale = (group["gamma"] * state["h"]).clamp_(min=group["epsilon"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((state["m"] / scale).clamp_(-1, 1), alpha=group["lr"])

    def _of(self, p: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state |= {"m": torch.zeros_like(p), "h": torch.zeros_like(p)}
        return state


def gauss_newton_bartlett(
    model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter], *, generator: Generator
) -> list[Tensor]:
    """An unbiased estimate of the Gauss-Newton diagonal of the mean cross-entropy over a batch's labels.

    The labels are drawn from the model's own distribution; the estimate is then
    labels · (gradient of the mean cross-entropy)², never negative.

    Args:
        model: whose curvature; its ``grad`` fields are left alone.
        batch: the labelled positions that count.
        parameters: of the model.
        generator: source of the labels, on the CPU.

    Returns:
        One tensor a parameter; zeros where the loss does not depend on it.

    Source: Liu et al. 2024, "Sophia", algorithm 2.
    """
    with whole_batches():
        logits = answer_logits(model, batch).float()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
    loss = nn.functional.cross_entropy(logits, drawn.to(logits.device))
    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
    return [drawn.numel() * g.square() for g in gradients]


def hutchinson(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], *, generator: Generator) -> list[Tensor]:
    """An unbiased estimate of the diagonal of a loss's Hessian: u ⊙ Hu, u random signs.

    Args:
        loss: computes the 0-d loss. It is run with attention's plain kernel, the one that can be
            differentiated twice.
        parameters: what it depends on; their ``grad`` fields are left alone.
        generator: source of the signs, on the CPU.

    Returns:
        One tensor a parameter; entries may be negative.

    Source: Liu et al. 2024, "Sophia", algorithm 1. Signs instead of normal variables: the same mean,
        less variance.
    """
    with sdpa_kernel(SDPBackend.MATH), whole_batches():
        first = torch.autograd.grad(
            loss(), list(parameters), create_graph=True, allow_unused=True, materialize_grads=True
        )
        signs = [(2 * torch.randint(2, p.shape, generator=generator) - 1).to(p.device, p.dtype) for p in parameters]
        product = torch.stack([(g * u).sum() for g, u in zip(first, signs, strict=True)]).sum()
        if not product.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        second = torch.autograd.grad(product, list(parameters), allow_unused=True, materialize_grads=True)
    return [u * g for u, g in zip(signs, second, strict=True)]
