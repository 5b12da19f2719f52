"""The training loop: AdamW on answer tokens, with a hook between the gradient and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from alkn.core.distributed import average_gradients_, everywhere, local
from alkn.core.scoring import (
    Batch,
    Example,
    Progress,
    answer_logits,
    answer_states,
    collate,
    no_progress,
    shuffled_batches,
    weighted_nll,
)
from alkn.errors import TrainingDiverged

Loss = Callable[[nn.Module, Batch], Tensor]
"""Maps a model and a batch to a 0-d loss."""
GradientHook = Callable[[int, Batch], None]
"""Called as (step, batch) when every ``grad`` is ready and clipped, before the optimizer's step."""
StepHook = Callable[[int], None]
"""Called as (step) after the optimizer's step."""


def adamw(
    parameters: Iterable[Any],
    *,
    device: torch.device,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> AdamW:
    """AdamW in few kernels: one for all tensors on a GPU, ``torch._foreach`` elsewhere.

    Args:
        parameters: tensors, or groups as torch takes them.
        device: where they are.
        lr: learning rate.
        weight_decay: decoupled.
        betas: of the moments.

    Raises:
        ValueError: if there are none.
    """
    fused = device.type == "cuda"
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=betas, fused=fused, foreach=not fused)


def linear_warmup(optimizer: Optimizer, *, warmup: int, total: int) -> LambdaLR:
    """Learning rate up linearly over ``warmup`` steps, then linearly down to zero at ``total``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / max(1, warmup)
        return max(0.0, (total - step) / max(1, total - warmup))

    return LambdaLR(optimizer, factor)


def cosine(optimizer: Optimizer, *, warmup: int, total: int, floor: float) -> LambdaLR:
    """Learning rate up linearly over ``warmup`` steps, then by half a cosine down to ``floor`` of it."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Hyperparameters:
    """One call of :func:`fine_tune`.

    Attributes:
        lr: AdamW's learning rate.
        epochs: passes over the examples.
        batch_size: records an optimizer step.
        weight_decay: AdamW's decoupled decay.
        betas: AdamW's moments.
        clip: largest norm of the whole gradient; ``None``: no clipping.
        window: batches that are sorted by length together, see :func:`alkn.core.scoring.shuffled_batches`;
            1 where a batch must be a fair sample.
    """

    lr: float
    epochs: int
    batch_size: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    window: int = 8


def steps_of(examples: int, hp: Hyperparameters) -> int:
    """Optimizer steps that :func:`fine_tune` takes."""
    return hp.epochs * math.ceil(examples / hp.batch_size)


def answer_loss(weights: Sequence[Tensor] | None = None) -> Loss:
    """Cross-entropy over answer tokens, optionally weighted a token.

    Args:
        weights: per record of the training set, ``[answer_length]``; ``None``: plain.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = answer_logits(model, batch)
        if weights is None:
            return weighted_nll(logits, batch.targets, None)
        picked = torch.cat([weights[i] for i in batch.records]).to(logits.device)
        return weighted_nll(logits, batch.targets, picked)

    return loss


def suppression_loss(*, scale: float, midpoint: float) -> Loss:
    """Mean over answer tokens of softplus(scale · (z − logit midpoint)) / scale, z the token's log-odds.

    Its gradient in z is exactly the entropic weight of form ``log_odds`` at the model as it is now,
    so descending it is the negation of one step of learning the log-odds with soft labels that are
    never out of date: tokens that are forgotten already are left alone.

    Args:
        scale: steepness of the weight, > 0.
        midpoint: probability at which the weight is one half, inside (0, 1).
    """
    offset = math.log(midpoint / (1.0 - midpoint))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        odds = log_odds(answer_logits(model, batch), batch.targets)
        return nn.functional.softplus(scale * (odds - offset)).mean() / scale

    return loss


def level_loss(
    levels: Sequence[Tensor],
    *,
    scale: float,
    reach: float | None = None,
) -> Loss:
    """Bring every answer token to given log-odds by half the squared distance over ``scale``; records weigh the same.

    Its slope in the log-odds z of a token is (z - level) / scale: the entropic soft label with a zero at the level, and
    turned round below it. It is as steep for a token far below even odds as for one above, so that a level of 1e-8 is
    reached as well as one of .1.

    Args:
        levels: per record of the training set, log-odds of each answer token, ``[answer_length]``.
        scale: > 0, nats to both sides of the level, at which the slope is -1 or 1.
        reach: in ``scale``, > 0: the largest slope; further away it is no steeper (Huber). ``None``: there is none.

    Source: the loss, Huber 1964; its use here, own.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        odds = log_odds(answer_logits(model, batch), batch.targets)
        wanted = torch.cat([levels[i] for i in batch.records]).to(odds)
        if reach is None:
            values = (odds - wanted) ** 2 / (2 * scale)
        else:
            values = nn.functional.huber_loss(odds, wanted, reduction="none", delta=reach * scale) / scale
        return _mean_over_records(values, batch)

    return loss


@dataclass
class Weighted:
    """A factor times a loss; the factor may change between two steps.

    Attributes:
        loss: maps the model and a batch to a 0-d loss.
        weight: the factor.
    """

    loss: Loss
    weight: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch, times the factor as it is now."""
        return self.weight * self.loss(model, batch)


def _mean_over_records(values: Tensor, batch: Batch) -> Tensor:
    """The mean over a record's labels, then over records: each record weighs the same. ``[labels]`` to 0-d."""
    length = torch.bincount(batch.rows, minlength=len(batch.records))
    return (values / length[batch.rows]).sum() / len(batch.records)


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """log(π / (1 − π)) of each target token, ``[labels]``, computed without cancellation."""
    logits, target = logits.float(), targets.unsqueeze(1)
    others = logits.scatter(1, target, float("-inf")).logsumexp(-1)
    return logits.gather(1, target).squeeze(1) - others


def distillation_loss(teacher: nn.Module, *, temperature: float = 1.0, hidden: float = 0.0) -> Loss:
    """Mean over answer tokens of T² · KL(teacher ‖ model), in nats: stay what the teacher was on these records.

    Args:
        teacher: the same kind of model, on the same device; it is not trained.
        temperature: T, by which the logits of both are divided. Above 1, the tokens that the teacher does not
            choose count for more.
        hidden: factor on :func:`state_distance`, which is added.

    Source: Hinton et al. 2015; as a term against forgetting, Li and Hoiem 2016.
    """

    def divergence(said: Tensor, taught: Tensor) -> Tensor:
        now, wanted = (torch.log_softmax(logits.float() / temperature, -1) for logits in (said, taught))
        return temperature**2 * nn.functional.kl_div(now, wanted, reduction="batchmean", log_target=True)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if not hidden:
            with torch.no_grad():
                taught = answer_logits(teacher, batch)
            return divergence(answer_logits(model, batch), taught)
        with torch.no_grad():
            taught, wanted = answer_states(teacher, batch)
        said, states = answer_states(model, batch)
        return divergence(said, taught) + hidden * state_distance(states, wanted)

    return loss


def anchored_loss(teacher: nn.Module, *, hidden: float) -> Loss:
    """Cross-entropy over answer tokens, and ``hidden`` times the :func:`state_distance` to the teacher there."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            _, wanted = answer_states(teacher, batch)
        said, states = answer_states(model, batch)
        return weighted_nll(said, batch.targets, None) + hidden * state_distance(states, wanted)

    return loss


def state_distance(states: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """How far hidden states are from others: Σ‖h − h*‖² / Σ‖h*‖² over all places of a block, mean over blocks.

    An answer that is known by heart says next to nothing about the model in its distribution of tokens; what each block
    computes on the way to it does.

    Args:
        states: h of each block, ``[labels, hidden]``.
        wanted: h* of each block.

    Source: Romero et al. 2015 (FitNets); relative, and of all blocks, as in Sun et al. 2019 (patient distillation).
    """
    far = [
        (h.float() - w.float()).square().sum() / w.float().square().sum() for h, w in zip(states, wanted, strict=True)
    ]
    return torch.stack(far).mean()


def backward(loss: Tensor, step: int, what: str) -> None:
    """Backpropagate a 0-d loss, unless it is not a number to descend.

    Raises:
        TrainingDiverged: if it is not finite; ``step`` counts from 0.
    """
    if not math.isfinite(float(loss.detach())):
        raise TrainingDiverged(f"step {step + 1}: the {what} loss is {float(loss.detach())}")
    loss.backward()


def refuse_broken(params: Sequence[nn.Parameter], what: str, last: str) -> None:
    """What the last update broke no loss has seen.

    Args:
        params: what was trained.
        what: which training, for the message.
        last: which update was the last.

    Raises:
        TrainingDiverged: if a weight is not finite, in any process.
    """
    if not everywhere(bool(torch.stack([local(p.detach()).isfinite().all() for p in params]).all())):
        raise TrainingDiverged(f"{what}: a weight is not a finite number after {last}")


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    hp: Hyperparameters,
    *,
    loss: Loss,
    generator: Generator,
    scheduler: Callable[[Optimizer], LambdaLR] | None = None,
    groups: Iterable[dict[str, object]] | None = None,
    before_step: GradientHook | None = None,
    after_step: StepHook | None = None,
    until: Callable[[], bool] | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Progress = no_progress,
    label: str = "fine-tune",
) -> list[float]:
    """Train ``model`` in place with a fresh AdamW and return the loss of each step.

    Args:
        model: a transformers causal language model, on its device. Dropout is off throughout:
            the same batch must give the same gradient.
        examples: encoded records, at least one.
        hp: learning rate, length and so on.
        loss: maps the model and a batch to a 0-d loss, in nats.
        generator: order of the batches.
        scheduler: makes the learning-rate schedule; ``None``: constant.
        groups: parameter groups for AdamW; ``None``: all parameters that require a gradient.
        before_step: sees every gradient, clipped, before the optimizer does; may change it in place.
        after_step: called when the weights have moved.
        until: asked after every epoch; true ends the training there.
        autocast: context for the forward pass (mixed precision).
        progress: told before the first step and after every one.
        label: what the progress shows.

    Raises:
        TrainingDiverged: when a loss or, after the last step, a weight is not finite; with the step, never with data.
    """
    device = next(model.parameters()).device
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(
        params if groups is None else groups, device=device, lr=hp.lr, weight_decay=hp.weight_decay, betas=hp.betas
    )
    schedule = scheduler(optimizer) if scheduler else None
    lengths = [e.tokens.numel() for e in examples]
    total = steps_of(len(examples), hp)
    losses: list[float] = []
    model.eval()
    progress(label, 0, total)
    for _ in range(hp.epochs):
        for records in shuffled_batches(lengths, batch_size=hp.batch_size, generator=generator, window=hp.window):
            batch = collate(examples, records, device=device)
            with autocast():
                value = loss(model, batch)
            value.backward()
            average_gradients_(params)
            if hp.clip is not None:
                nn.utils.clip_grad_norm_(params, hp.clip)
            if before_step is not None:
                before_step(len(losses), batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if schedule is not None:
                schedule.step()
            if after_step is not None:
                after_step(len(losses))
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise TrainingDiverged(f"{label}: the loss of step {len(losses)} of {total} is {losses[-1]}")
            progress(label, len(losses), total)
        if until is not None and until():
            break
    refuse_broken(params, label, f"step {len(losses)} of {total}")
    return losses
