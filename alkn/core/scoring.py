"""Scoring answers under teacher forcing: probabilities, losses, and what a greedy reader would get right.

Methods stop on these numbers and metrics are built on them. The language-model head is taken at
the labelled positions only (:mod:`alkn.core.labelled`) and batches hold records of similar length,
which is two and more times faster than padded full logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from alkn.core.distributed import (
    average_gradients_,
    dealt,
    joined_rows,
    local,
    rank,
    shares,
    shares_rows,
    sum_,
    whole_batches,
)
from alkn.core.labelled import LABELLED, labelled

PROMPT = 4
"""Fewest tokens of a prompt that asks something; before plain text stands less."""


@dataclass(frozen=True)
class Example:
    """One encoded record.

    Attributes:
        tokens: prompt, answer and end-of-sequence, ``[length]``, int64.
        answer_start: index of the first answer token, ≥ 1. The labelled tokens are
            ``tokens[answer_start:]``.
    """

    tokens: Tensor
    answer_start: int

    @property
    def answer_length(self) -> int:
        """Number of labelled tokens, end-of-sequence included."""
        return self.tokens.numel() - self.answer_start


@dataclass(frozen=True)
class Batch:
    """Right-padded records. Padding follows every labelled token, so causal attention needs no mask.

    Attributes:
        input_ids: ``[batch, seq]``, int64; the padding's value is never read by a labelled position.
        positions: flat indices into ``[batch * seq]`` whose next token is labelled, ``[labels]``.
        targets: the labelled tokens, ``[labels]``.
        rows: which record of ``records`` each label belongs to, ``[labels]``, in 0..batch-1.
        records: indices of the records in the caller's sequence.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor
    records: tuple[int, ...]


def collate(examples: Sequence[Example], records: Sequence[int], *, device: torch.device) -> Batch:
    """Pad ``examples[i] for i in records`` to the longest and list their labelled positions."""
    chosen = [examples[i] for i in records]
    seq = max(e.tokens.numel() for e in chosen)
    input_ids = torch.zeros(len(chosen), seq, dtype=torch.long)
    positions, targets, rows = [], [], []
    for row, example in enumerate(chosen):
        n = example.tokens.numel()
        input_ids[row, :n] = example.tokens
        positions.append(torch.arange(example.answer_start - 1, n - 1) + row * seq)
        targets.append(example.tokens[example.answer_start :])
        rows.append(torch.full((example.answer_length,), row))
    return Batch(
        input_ids.to(device),
        torch.cat(positions).to(device),
        torch.cat(targets).to(device),
        torch.cat(rows).to(device),
        tuple(records),
    )


def bucketed(lengths: Sequence[int], *, max_tokens: int, max_records: int = 128) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first; at most ``max_tokens`` padded tokens each."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        width = max(1, lengths[order[start]])
        count = max(1, min(max_records, max_tokens // width))
        yield order[start : start + count]
        start += count


def shuffled_batches(
    lengths: Sequence[int], *, batch_size: int, generator: Generator, window: int = 8
) -> Iterator[list[int]]:
    """One epoch of shuffled batches whose records have similar lengths.

    The shuffled order is cut into windows of ``window`` batches, each sorted by length and cut
    into batches, and the batches of a window are shuffled again: little padding, still random.

    Args:
        lengths: tokens of each record.
        batch_size: records a batch; the last one may be smaller.
        generator: source of the order.
        window: batches that are sorted together.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    span = batch_size * window
    for begin in range(0, len(order), span):
        part = sorted(order[begin : begin + span], key=lambda i: lengths[i])
        batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        for pick in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[pick]


def endless_batches(count: int, batch_size: int, generator: Generator) -> Iterator[list[int]]:
    """Batches without end: each record once before any comes again, across batch borders."""
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:batch_size]
        order = order[batch_size:]


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the labelled positions only, ``[labels, vocab]``.

    The head runs on the selected hidden states, unless the model's forward does something
    after its head (a cap or a scale on the logits), which :func:`alkn.core.labelled.has_plain_head` finds out once.
    With several processes each runs the model on its share of the rows; all get all logits.
    """
    return _at_labels(model, batch, states=False)[0]


def answer_states(model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """:func:`answer_logits`, and what each block of the model says there, ``[labels, hidden]``; of the last, normed."""
    logits, *states = _at_labels(model, batch, states=True)
    return logits, states


def _at_labels(model: nn.Module, batch: Batch, *, states: bool) -> list[Tensor]:
    run = getattr(model, LABELLED, None) or partial(labelled, model)
    if not shares_rows():
        whole: list[Tensor] = run(batch.input_ids, batch.positions, states=states)
        return whole
    rows = shares(len(batch.records))
    counts = torch.bincount(batch.rows, minlength=len(batch.records)).tolist()
    sizes = [sum(counts[row] for row in part) for part in rows]
    mine, begin, seq = rows[rank()], sum(sizes[: rank()]), batch.input_ids.shape[1]
    # Without a row of its own a process runs one for nothing: split weights have to be run by all.
    first, last = (mine.start, mine.stop) if mine else (0, 1)
    positions = batch.positions[begin : begin + sizes[rank()]] - first * seq
    return [joined_rows(part, sizes) for part in run(batch.input_ids[first:last], positions, states=states)]


@dataclass(frozen=True)
class Scores:
    """What teacher forcing says about each record.

    Attributes:
        nll: mean over answer tokens of −log π, end-of-sequence included, ``[records]``, nats.
        token_probs: per record, π of each answer token, ``[answer_length]``.
        token_hits: per record, whether each answer token is the model's first choice.
        token_log_probs: per record, log π of each answer token, ``[answer_length]``, nats.
    """

    nll: Tensor
    token_probs: tuple[Tensor, ...]
    token_hits: tuple[Tensor, ...]
    token_log_probs: tuple[Tensor, ...] = ()

    @property
    def probability(self) -> Tensor:
        """P of each record: exp(−mean NLL), ``[records]``, in [0, 1]."""
        return torch.exp(-self.nll)

    @property
    def exact_memorization(self) -> Tensor:
        """Share of answer tokens predicted right, ``[records]``, in [0, 1]."""
        return torch.stack([hits.double().mean() for hits in self.token_hits])


@torch.no_grad()
def score(model: nn.Module, examples: Sequence[Example], *, max_tokens: int = 8192) -> Scores:
    """Score every example's answer under teacher forcing, in the model's evaluation mode.

    Args:
        model: a transformers causal language model, already on its device.
        examples: encoded records, at least one.
        max_tokens: padded tokens a batch at the most.

    Returns:
        Scores on the CPU, in the order of ``examples``.

    Raises:
        ValueError: if there is no example.
    """

    def chosen(logits: Tensor, targets: Tensor) -> Tensor:
        found = torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        return torch.stack([found, (logits.argmax(-1) == targets).float()])

    values = read_labels(model, examples, chosen, columns=2, max_tokens=max_tokens)
    log_probs = tuple(found for found, _ in values)
    nll = torch.stack([-lp.double().mean() for lp in log_probs])
    return Scores(nll, tuple(lp.exp() for lp in log_probs), tuple(hits.bool() for _, hits in values), log_probs)


@torch.no_grad()
def read_labels(
    model: nn.Module,
    examples: Sequence[Example],
    read: Callable[[Tensor, Tensor], Tensor],
    *,
    columns: int,
    max_tokens: int = 8192,
) -> list[Tensor]:
    """A few numbers of each labelled token, read off its logits batch by batch; no logits are kept.

    Args:
        model: a transformers causal language model, already on its device; read in its evaluation mode.
        examples: encoded records, at least one.
        read: logits ``[labels, vocab]`` in float32 and targets ``[labels]`` -> ``[columns, labels]``.
        columns: numbers a token.
        max_tokens: padded tokens a batch at the most.

    Returns:
        ``[columns, answer_length]`` a record on the CPU, in the order of ``examples``.

    Raises:
        ValueError: if there is no example.
    """
    if not examples:
        raise ValueError("nothing to score: the set of examples is empty")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    lengths = [e.answer_length for e in examples]
    found = torch.zeros(columns, sum(lengths))
    places = found.split(lengths, dim=1)
    for records, counts in dealt(list(bucketed([e.tokens.numel() for e in examples], max_tokens=max_tokens))):
        batch = collate(examples, records, device=device)
        with whole_batches():
            logits = answer_logits(model, batch).float()
        values = read(logits, batch.targets).cpu()
        if counts:
            for i, own in zip(records, values.split([lengths[i] for i in records], dim=1), strict=True):
                places[i].copy_(own)
    model.train(training)
    sum_(found)
    return list(places)


def weighted_nll(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Σ w · nll / number of labels, a 0-d tensor in nats; ``weights=None`` is the cross-entropy.

    Args:
        logits: ``[labels, vocab]``.
        targets: ``[labels]``, int64.
        weights: ``[labels]`` in [0, 1], or ``None``.
    """
    nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return nll.mean() if weights is None else (nll * weights).sum() / targets.numel()


def mean_gradient(
    model: nn.Module,
    examples: Sequence[Example],
    picks: Iterable[int],
    *,
    max_tokens: int = 8192,
    max_records: int = 128,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Tensor]:
    """Mean over records of the gradient of each record's answer cross-entropy.

    Each record counts the same: its loss is the mean over its own answer tokens. ``picks`` may
    name a record more than once.

    Args:
        model: the model at which the gradient is taken; its ``grad`` fields are left ``None``.
        examples: encoded records.
        picks: indices into ``examples``, at least one.
        max_tokens: padded tokens a batch at the most.
        max_records: records a batch at the most; bounds the memory of the backward pass.
        autocast: context for the forward passes (mixed precision).

    Returns:
        Parameter name -> gradient, for every parameter that requires one.
    """
    chosen = list(picks)
    if not chosen:
        raise ValueError("nothing to take a gradient of: no record was picked")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    lengths = [examples[i].tokens.numel() for i in chosen]
    for part in bucketed(lengths, max_tokens=max_tokens, max_records=max_records):
        records = [chosen[i] for i in part]
        batch = collate(examples, records, device=device)
        per_label = torch.tensor([1.0 / examples[i].answer_length for i in records], device=device)[batch.rows]
        with autocast():
            logits = answer_logits(model, batch).float()
        nll = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        ((nll * per_label).sum() / len(chosen)).backward()
    average_gradients_(model.parameters())
    gradient = {
        name: local(torch.zeros_like(p) if p.grad is None else p.grad).detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    for p in model.parameters():
        p.grad = None
    model.train(training)
    return gradient


Progress = Callable[[str, int, int], None]
"""Called as (what, done, total) by long work; a no-op by default."""


def no_progress(what: str, done: int, total: int) -> None:
    """The default :data:`Progress`: say nothing."""
