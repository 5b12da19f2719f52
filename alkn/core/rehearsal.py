"""Keeping what must stay known: retain records, and records that the model writes in its own words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from alkn.core.damage import through_damage
from alkn.core.generation import greedy
from alkn.core.limits import context_of
from alkn.core.scoring import PROMPT, Example, Progress, collate, mean_gradient, no_progress
from alkn.core.training import (
    Hyperparameters,
    Loss,
    anchored_loss,
    answer_loss,
    distillation_loss,
    fine_tune,
    linear_warmup,
)
from alkn.core.unlearning import Task, Teacher
from alkn.errors import InputError


def group_weights(groups: Sequence[str], exponent: float) -> Tensor:
    """Weights by which groups are drawn by their sizes to a power, as languages in Conneau et al. 2020 (XLM-R).

    Args:
        groups: the group of each record.
        exponent: 0: each group as often as any other; 1: each record.

    Returns:
        ``[len(groups)]``, float64, of sum 1.
    """
    sizes = Counter(groups)
    weights = torch.tensor([sizes[group] ** (exponent - 1) for group in groups], dtype=torch.float64)
    return weights / weights.sum()


def with_replacement(count: int, shape: tuple[int, ...], weights: Tensor | None, generator: Generator) -> Tensor:
    """Numbers below ``count``, each as likely as any other or by weight, of this shape."""
    if weights is None:
        return torch.randint(count, shape, generator=generator)
    return torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator).view(shape)


def spliced_prompts(
    examples: Sequence[Example], count: int, *, generator: Generator, weights: Tensor | None = None
) -> list[Tensor]:
    """Prompts that nobody wrote: the first part of one record's prompt and the rest of another's.

    Both are cut at the same relative place, drawn between 0.2 and 0.8, so that templates survive at
    both ends. Where one of the two has a prompt of fewer than :data:`PROMPT` tokens (plain text), the first record
    gives its own beginning up to the cut, its answer's included.

    Args:
        examples: encoded records, at least one.
        count: how many prompts.
        generator: source of the pairs and cuts.
        weights: how likely each record is to be drawn, ``[len(examples)]``; ``None``: all the same.

    Returns:
        Token ids, each ``[length]``.

    Source: own; pseudo-rehearsal goes back to Robins 1995.
    """
    prompts = []
    pairs = with_replacement(len(examples), (count, 2), weights, generator).tolist()
    cuts = (0.2 + 0.6 * torch.rand(count, generator=generator)).tolist()
    for (i, j), cut in zip(pairs, cuts, strict=True):
        head, tail = (examples[k].tokens[: examples[k].answer_start] for k in (i, j))
        if min(head.numel(), tail.numel()) < PROMPT:
            whole = examples[i].tokens
            prompts.append(whole[: max(1, int(cut * whole.numel()))])
            continue
        start = max(2, int(cut * head.numel()))
        prompts.append(torch.cat([head[:start], tail[min(tail.numel() - 2, int(cut * tail.numel())) :]]))
    return prompts


def rehearsal_set(
    model: nn.Module,
    examples: Sequence[Example],
    count: int,
    *,
    eos: int,
    generator: Generator,
    weights: Tensor | None = None,
    max_new_tokens: int = 64,
    progress: Progress = no_progress,
) -> list[Example]:
    """Records in the model's own words: its greedy answers to :func:`spliced_prompts`.

    They cover what the model knows beyond the records at hand, so that keeping its answers to them
    keeps knowledge that no retain record names.

    Args:
        model: whose words.
        examples: the retain records that prompts are spliced from.
        count: how many prompts.
        eos: end-of-sequence id.
        generator: source of the prompts.
        weights: see :func:`spliced_prompts`.
        max_new_tokens: longest answer.
        progress: told after every batch.

    Returns:
        At most ``count`` examples; empty answers are left out. Hold them in memory only: a model
        may repeat anything that it was trained on.
    """
    context = context_of(model)
    prompts = spliced_prompts(examples, count, generator=generator, weights=weights)
    answers = greedy(model, prompts, eos=eos, max_new_tokens=max_new_tokens, progress=progress)
    return [
        Example(torch.cat([prompt, torch.tensor([*answer, eos])])[:context], prompt.numel())
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


class Keeper:
    """The records that a request must leave alone, and what a method does with them.

    Args:
        task: the request; its model is θ_{t-1} now.
        sample: records that G_r is averaged over, drawn anew each time; ``None``: all.
        gradient_batch: records at once when G_r is taken: no more than in a training batch, or G_r is the peak.
        rehearsal: prompts that the teacher answers in its own words; 0: retain records only.
        steps: optimizer steps of a repair; 0: none.
        batch_size: records a step of a repair.
        lr: rate at the beginning of a repair; it falls linearly to zero.
        retain_batch, rehearsal_batch: records of each kind in the keeping loss of a step.
        temperature: at which the teacher is distilled, see :func:`alkn.core.training.distillation_loss`.
        teacher: who writes and is distilled, see :meth:`alkn.core.unlearning.Task.teacher`.
        exponent: of :func:`group_weights`, by which the domains of the retain records are drawn in the keeping loss and
            in the prompts.
        damage: of the answers that are distilled, see :func:`alkn.core.damage.damaged`.
        hidden: factor on the distance of hidden states to the teacher's in the keeping loss of a step, of either kind
            of records, see :func:`alkn.core.training.state_distance`.

    Attributes:
        pool: the retain records, then the written ones.
        teacher: who writes and is distilled; the task's own model where nothing is.
        passes: record passes spent so far.
    """

    def __init__(
        self,
        task: Task,
        *,
        rehearsal: int,
        sample: int | None = None,
        gradient_batch: int = 128,
        steps: int = 0,
        batch_size: int = 1,
        lr: float = 0.0,
        retain_batch: int = 0,
        rehearsal_batch: int = 0,
        temperature: float = 1.0,
        teacher: Teacher = "parent",
        exponent: float = 1.0,
        damage: float = 0.0,
        hidden: float = 0.0,
    ) -> None:
        self._task, self._sample, self._gradient_batch = task, sample, gradient_batch
        self._steps, self._batch_size, self._lr = steps, batch_size, lr
        self._retain_batch, self._rehearsal_batch = retain_batch, rehearsal_batch
        self._shares = group_weights(task.retain_domains, exponent) if exponent < 1 and task.retain_domains else None
        self._written: list[Example] = []
        self._distillation: Loss | None = None
        self._own = answer_loss()
        self.teacher = task.model
        if steps or rehearsal or hidden:
            self.teacher = task.teacher(teacher)
            distillation = distillation_loss(self.teacher, temperature=temperature, hidden=hidden)
            self._distillation = through_damage(distillation, damage, task.generator("damage", "keep"))
        if hidden:
            self._own = anchored_loss(self.teacher, hidden=hidden)
        if rehearsal:
            self._written = rehearsal_set(
                self.teacher,
                task.retain,
                rehearsal,
                eos=int(task.retain[0].tokens[-1]) if task.eos is None else task.eos,
                generator=task.generator("rehearsal"),
                weights=self._shares,
                progress=task.progress,
            )
            if not self._written:
                raise InputError("method.rehearsal: the model says nothing to any prompt; 0 does without its words")
        self.pool = [*task.retain, *self._written]
        self.passes = len(self._written)

    def gradient(self, number: int) -> dict[str, Tensor]:
        """G_r at the current weights, from the sample of round ``number``."""
        if self._sample is None or self._sample >= len(self.pool):
            picks = list(range(len(self.pool)))
        else:
            picks = self._draw(self._sample, self._task.generator("retain", number))
        self.passes += len(picks)
        task, batch = self._task, self._gradient_batch
        return mean_gradient(task.model, self.pool, picks, max_records=batch, autocast=task.autocast)

    def repair(self, number: int) -> None:
        """Small steps back to what the teacher says to these records: KL(teacher ‖ θ)."""
        if self._distillation is None or not self._steps:
            return
        drawn = self._draw(self._steps * self._batch_size, self._task.generator("repair", number))
        fine_tune(
            self._task.model,
            [self.pool[i] for i in drawn],
            Hyperparameters(lr=self._lr, epochs=1, batch_size=self._batch_size, clip=1.0, window=1),
            loss=self._distillation,
            generator=self._task.generator("repair order", number),
            scheduler=lambda optimizer: linear_warmup(optimizer, warmup=0, total=self._steps),
            autocast=self._task.autocast,
            label=f"repair {number}",
        )
        self._task.round_weights()
        self.passes += len(drawn)

    def __call__(self, step: int) -> Tensor:
        """Cross-entropy on a few retain records plus KL(teacher ‖ θ) on a few written ones; of both, hidden states.

        Args:
            step: decides which records are drawn; the damage is drawn anew in each call.
        """
        generator, own, model = self._task.generator("keep", step), len(self._task.retain), self._task.model
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        if self._retain_batch:
            picks = [int(i) for i in with_replacement(own, (self._retain_batch,), self._shares, generator)]
            total = total + self._own(model, collate(self.pool, picks, device=device))
            self.passes += self._retain_batch
        if self._written and self._distillation is not None:
            count = self._rehearsal_batch
            picks = [own + int(i) for i in torch.randint(len(self._written), (count,), generator=generator)]
            total = total + self._distillation(model, collate(self.pool, picks, device=device))
            self.passes += count
        return total

    def _draw(self, count: int, generator: Generator) -> list[int]:
        """Half retain records, half written ones, with replacement."""
        own = len(self._task.retain)
        half = count // 2 if self._written else 0
        picks = torch.randint(own, (count - half,), generator=generator)
        if half:
            picks = torch.cat([own + torch.randint(len(self._written), (half,), generator=generator), picks])
        return [int(i) for i in picks]
