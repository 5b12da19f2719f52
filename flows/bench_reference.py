"""The slow way, to measure against: records padded to one length, logits everywhere, dense soft labels.

Written for this comparison after the shape of the authors' trainer (zaocan666/ALKN at fd84124): its
loader pads each record to 500 tokens, its loss builds a dense distribution of the logits' shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from alkn.core.scoring import Example, shuffled_batches
from alkn.core.soft_labels import entropic_weights
from alkn.core.training import Hyperparameters
from alkn.core.unlearning import Task

IGNORED = -100


def padded(examples: Sequence[Example], picks: Sequence[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and attention mask, each ``[batch, length]``."""
    ids = torch.zeros(len(picks), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    seen = torch.zeros_like(ids)
    for row, i in enumerate(picks):
        tokens, start = examples[i].tokens, examples[i].answer_start
        ids[row, : tokens.numel()] = tokens
        labels[row, start : tokens.numel()] = tokens[start:]
        seen[row, : tokens.numel()] = 1
    return ids, labels, seen


def full_logits(model: nn.Module, ids: Tensor, seen: Tensor) -> Tensor:
    """Logits of every position that has a next one, ``[batch, length - 1, vocab]``."""
    causal_lm: Any = model
    logits: Tensor = causal_lm(input_ids=ids, attention_mask=seen, use_cache=False).logits
    return logits[:, :-1].contiguous()


def dense_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over labels of −Σ_v q_v · log π_v, q holding a token's weight at the token and zeros elsewhere."""
    wanted = labels[:, 1:]
    target = torch.zeros_like(logits).scatter_(2, wanted.clamp(min=0).unsqueeze(2), weights.unsqueeze(2))
    per_label = -(target * logits.log_softmax(-1)).sum(-1)
    labelled = wanted != IGNORED
    return (per_label * labelled).sum() / labelled.sum()


def token_weights(model: nn.Module, examples: Sequence[Example], hp: Hyperparameters, k: float, length: int) -> Tensor:
    """Soft labels of every record, ``[records, length - 1]``, from full distributions over the vocabulary."""
    out = []
    with torch.no_grad():
        for begin in range(0, len(examples), hp.batch_size):
            ids, labels, seen = padded(examples, range(begin, min(begin + hp.batch_size, len(examples))), length)
            probs = full_logits(model, ids, seen).softmax(-1)
            wanted = labels[:, 1:].clamp(min=0).unsqueeze(2)
            out.append(entropic_weights(probs.gather(2, wanted).squeeze(2), form="reference", scale=k, midpoint=0.8))
    return torch.cat(out)


def retain_gradient(
    model: nn.Module, examples: Sequence[Example], hp: Hyperparameters, length: int
) -> dict[str, Tensor]:
    """Mean over records of the gradient of each record's mean cross-entropy."""
    for begin in range(0, len(examples), hp.batch_size):
        picks = range(begin, min(begin + hp.batch_size, len(examples)))
        ids, labels, seen = padded(examples, picks, length)
        logits, wanted = full_logits(model, ids, seen), labels[:, 1:]
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        (nll.sum(1) / (wanted != IGNORED).sum(1)).sum().div(len(examples)).backward()  # type: ignore[no-untyped-call]
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradient


def padded_job(task: Task, hp: Hyperparameters, *, k: float, length: int) -> None:
    """The preparation and the steps of a round with criterion m, on the batches that :func:`fine_tune` would take."""
    model, generator = task.model, task.generator("order")
    weights = token_weights(model, task.forget, hp, k, length)
    g_r = retain_gradient(model, task.retain, hp, length)
    m = {name: torch.zeros_like(g) for name, g in g_r.items()}
    optimizer = AdamW(model.parameters(), lr=hp.lr, weight_decay=hp.weight_decay)
    lengths = [e.tokens.numel() for e in task.forget]
    for _ in range(hp.epochs):
        for picks in shuffled_batches(lengths, batch_size=hp.batch_size, generator=generator, window=hp.window):
            ids, labels, seen = padded(task.forget, picks, length)
            dense_loss(full_logits(model, ids, seen), labels, weights[list(picks)]).backward()  # type: ignore[no-untyped-call]
            if hp.clip is not None:
                clip_grad_norm_(model.parameters(), hp.clip)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    m[name] = m[name] - p.grad * g_r[name]
            optimizer.step()
            optimizer.zero_grad()
