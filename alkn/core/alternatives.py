"""Alternative answers: what a model may say to a forgotten question instead of the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alkn.core.scoring import Example, collate
from alkn.core.training import answer_loss
from alkn.core.unlearning import Task

PROMPT = 4
"""Tokens of a prompt that asks something: plain text has no alternative."""


class Similarity:
    """How alike prompts are: the cosine of their sets of tokens, each token weighted by how few prompts have it.

    Args:
        prompts: what others are compared with, at least one, each ``[length]``.
        vocab_size: of the token ids.

    Source: inverse document frequency, Spärck Jones 1972; the cosine, Salton and McGill 1983.
    """

    def __init__(self, prompts: Sequence[Tensor], *, vocab_size: int) -> None:
        sets = [prompt.unique() for prompt in prompts]
        self._count = len(sets)
        self._rows = torch.repeat_interleave(torch.arange(len(sets)), torch.tensor([len(tokens) for tokens in sets]))
        self._columns = torch.cat(sets)
        having = torch.bincount(self._columns, minlength=vocab_size).double()
        self._weights = torch.where(having > 0, torch.log(len(sets) / having.clamp(min=1)), 0)
        values = self._weights[self._columns]
        lengths = self._sums(values**2).sqrt()
        self._values = values / lengths.clamp(min=1e-12)[self._rows]

    def to(self, prompt: Tensor) -> Tensor:
        """The cosine of every prompt with this one times its length, ``[prompts]``, float64, at least 0."""
        own = torch.zeros_like(self._weights)
        own[prompt.unique()] = 1
        return self._sums(self._values * (own * self._weights)[self._columns])

    def _sums(self, values: Tensor) -> Tensor:
        """Per prompt the sum over its tokens."""
        return torch.zeros(self._count, dtype=torch.float64).index_add(0, self._rows, values)


def alternatives(
    asked: Sequence[Example], kept: Sequence[Example], *, vocab_size: int, context: int | None = None
) -> list[Example | None]:
    """Each question with the right answer of the kept record that asks most nearly the same.

    A model that never saw a record answers its question as the nearest one that it knows.

    Args:
        asked: the records to forget.
        kept: records that stay; one with the same answer is no alternative.
        vocab_size: of the token ids.
        context: most tokens of a record; a longer answer is cut off. ``None``: any.

    Returns:
        Per record of ``asked``: its prompt and the other's answer; ``None`` where a prompt has fewer than
        :data:`PROMPT` tokens, or no kept one has as many.
    """
    kept = [example for example in kept if example.answer_start >= PROMPT]
    found: list[Example | None] = [None] * len(asked)
    if not kept:
        return found
    similarity = Similarity([example.tokens[: example.answer_start] for example in kept], vocab_size=vocab_size)
    for i, example in enumerate(asked):
        prompt, answer = example.tokens[: example.answer_start], example.tokens[example.answer_start :]
        if len(prompt) < PROMPT:
            continue
        for j in similarity.to(prompt).argsort(descending=True, stable=True).tolist():
            other = kept[j].tokens[kept[j].answer_start :]
            if not torch.equal(other, answer):
                found[i] = Example(torch.cat([prompt, other])[:context], len(prompt))
                break
    return found


class AlternativeTerm:
    """Cross-entropy on alternative answers of the records to forget, and as much on those of earlier requests.

    Args:
        task: whose records; its retain records are what stays.
        portion: maps how many records there are to how many of their alternatives a step takes.
        batch_size: alternatives that weigh ``weight``; fewer weigh less, each as much as in a full batch.
        weight: factor on the loss of a full batch.

    Attributes:
        passes: record passes spent so far.
    """

    def __init__(self, task: Task, *, portion: Callable[[int], int], batch_size: int, weight: float) -> None:
        self._task, self._portion, self._weight = task, portion, weight / batch_size
        config: Any = task.model.config
        sizes = {
            "vocab_size": config.get_text_config().vocab_size,
            "context": getattr(config, "max_position_embeddings", None),
        }
        found = [alternatives(asked, task.retain, **sizes) for asked in (task.forget, task.earlier)]
        self._groups = [group for group in ([one for one in each if one is not None] for each in found) if group]
        self.passes = 0

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __call__(self, step: int) -> Tensor:
        """The weighted loss on the alternatives of ``step``; there must be one."""
        model, generator = self._task.model, self._task.generator("alternatives", step)
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        for group in self._groups:
            picks = [int(i) for i in torch.randperm(len(group), generator=generator)[: self._portion(len(group))]]
            total = total + len(picks) * answer_loss()(model, collate(group, picks, device=device))
            self.passes += len(picks)
        return self._weight * total
