"""Alternative answers: what a model may say to a forgotten question instead of the right answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alkn.core.limits import context_of, vocabulary_of
from alkn.core.scoring import PROMPT, Example, collate
from alkn.core.training import answer_loss
from alkn.core.unlearning import Task


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

    def __call__(self, prompt: Tensor) -> Tensor:
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
        kept: records that stay. One whose answer has the same set of tokens is no alternative: it says the same.
        vocab_size: of the token ids.
        context: most tokens of a record: an answer that would be longer is none either; ``None``: any.

    Returns:
        Per record of ``asked``: its prompt and the other's answer; ``None`` where its prompt has fewer than
        :data:`PROMPT` tokens, or no kept one with as many shares a token with it that not all of them have.
    """
    kept = [example for example in kept if example.answer_start >= PROMPT]
    if not kept:
        return [None] * len(asked)
    similarity = Similarity([example.tokens[: example.answer_start] for example in kept], vocab_size=vocab_size)
    words = [frozenset(example.tokens[example.answer_start :].tolist()) for example in kept]
    lengths = torch.tensor([example.answer_length for example in kept])

    def alternative(example: Example) -> Example | None:
        prompt = example.tokens[: example.answer_start]
        if len(prompt) < PROMPT:
            return None
        own = frozenset(example.tokens[example.answer_start :].tolist())
        near = similarity(prompt)
        near[torch.tensor([other == own for other in words])] = 0
        if context is not None:
            near[lengths > context - len(prompt)] = 0
        best = int(near.argmax())
        if not float(near[best]):
            return None
        return Example(torch.cat([prompt, kept[best].tokens[kept[best].answer_start :]]), len(prompt))

    return [alternative(example) for example in asked]


class AlternativeTerm:
    """Cross-entropy on alternative answers of the records to forget, and as much on those of earlier requests.

    Args:
        task: whose records; its retain records are what stays.
        batch_size: alternatives of a large request in a step.
        weight: factor on the mean over their tokens.
        share: maps how many there are to what of the two a step takes, in (0, 1]: of few it takes fewer, and they weigh
            less.

    Attributes:
        passes: record passes spent so far.
    """

    def __init__(self, task: Task, *, batch_size: int, weight: float, share: Callable[[int], float]) -> None:
        self._task, self._batch_size, self._weight, self._share = task, batch_size, weight, share
        asked, own = [*task.forget, *task.earlier], len(task.forget)
        found = alternatives(asked, task.retain, vocab_size=vocabulary_of(task.model), context=context_of(task.model))
        groups = [[one for one in part if one is not None] for part in (found[:own], found[own:])]
        self._groups = [group for group in groups if group]
        self.passes = 0

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __call__(self, step: int) -> Tensor:
        """The weighted loss on the alternatives of ``step``; there must be one."""
        model, generator = self._task.model, self._task.generator("alternatives", step)
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        for group in self._groups:
            share = self._share(len(group))
            order = torch.randperm(len(group), generator=generator)
            picks = [int(i) for i in order[: math.ceil(self._batch_size * share)]]
            total = total + self._weight * share * answer_loss()(model, collate(group, picks, device=device))
            self.passes += len(picks)
        return total
