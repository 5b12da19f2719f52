"""Losses on what a model says of whole answers and of their tokens: ascent, weighted ascent, preference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from alkn.core.scoring import Batch, Example, answer_logits, bucketed, collate, weighted_nll
from alkn.core.training import Loss
from alkn.core.unlearning import Task


def sequence_log_probs(logits: Tensor, targets: Tensor, rows: Tensor, count: int) -> Tensor:
    """Whole answers, log π of each: the sum over its tokens, end of sequence included, in nats.

    Args:
        logits: ``[labels, vocab]``.
        targets: ``[labels]``, int64.
        rows: which answer each label belongs to, ``[labels]``, in 0..count-1.
        count: number of answers.

    Returns:
        ``[count]``, float32 (float64 for float64 logits).
    """
    wide = logits if logits.dtype is torch.float64 else logits.float()
    tokens = -nn.functional.cross_entropy(wide, targets, reduction="none")
    return tokens.new_zeros(count).index_add(0, rows, tokens)


def answer_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """The answers of a batch, log π of each, ``[batch]``, with the graph."""
    return sequence_log_probs(answer_logits(model, batch), batch.targets, batch.rows, len(batch.records))


@torch.no_grad()
def reference_log_probs(task: Task, examples: Sequence[Example], *, max_tokens: int = 8192) -> Tensor:
    """Answers, log π of each under the task's model as it is now, ``[len(examples)]``, on its device.

    The forward passes run in the precision of those in training, so that a ratio to them begins at one.
    """
    device = next(task.model.parameters()).device
    task.model.eval()
    found = torch.zeros(len(examples), device=device)
    for records in bucketed([e.tokens.numel() for e in examples], max_tokens=max_tokens):
        with task.autocast():
            found[records] = answer_log_probs(task.model, collate(examples, records, device=device))
    return found


def preference_loss(margin: Tensor, *, beta: float) -> Tensor:
    """−(2/β) · mean log σ(β · margin), 0-d.

    Its gradient in a margin of 0 is −1/batch whatever β is; it vanishes as the margin grows.

    Args:
        margin: how much better off the preferred answer is against the rejected one than under the
            reference, in nats, ``[batch]``; the rejected answer alone: −log(π_θ / π_reference).
        beta: inverse temperature, > 0.

    Source: Rafailov et al. 2023, equation 7, times 2/β as in Zhang et al. 2024, equation 3.
    """
    return -2.0 / beta * nn.functional.logsigmoid(beta * margin).mean()


def negative_preference_loss(reference: Tensor, *, beta: float, per_token: bool = False) -> Loss:
    """NPO on a batch of forget records: the reference knows them better, and that is preferred.

    Args:
        reference: log π of every forget record under θ_{t-1}, ``[len(task.forget)]``.
        beta: inverse temperature, > 0; towards 0 this is gradient ascent on whole answers.
        per_token: divide the margin of an answer by its tokens, so that the loss vanishes as many times later.

    Source: Zhang et al. 2024, equation 3; a token, the code of SOUL (Jia et al. 2024), ``src/unlearn/NPO.py``.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        margin = reference[list(batch.records)] - answer_log_probs(model, batch)
        if per_token:
            margin = margin / torch.bincount(batch.rows, minlength=len(batch.records))
        return preference_loss(margin, beta=beta)

    return loss


def ascent_loss(weight: Callable[[Tensor], Tensor] | None = None) -> Loss:
    """−Σ w(π) · nll / number of answer tokens: descending it climbs the cross-entropy.

    Args:
        weight: maps the tokens' probabilities ``[labels]``, without the graph, to their weights;
            ``None``: plain gradient ascent.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = answer_logits(model, batch)
        if weight is None:
            return -weighted_nll(logits, batch.targets, None)
        with torch.no_grad():
            nll = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        return -weighted_nll(logits, batch.targets, weight(torch.exp(-nll)))

    return loss
