"""Forget records with a refusal in place of their answer."""

from __future__ import annotations

import torch

from alkn.core.limits import context_of
from alkn.core.scoring import Example
from alkn.core.unlearning import Task
from alkn.errors import InputError


def refused_examples(task: Task) -> list[Example]:
    """Each forget record's prompt with one of the task's refusals, drawn once for the whole request.

    A refusal is drawn from those with which the record fits into the model's context.

    Args:
        task: its ``forget`` and ``refusals``.

    Returns:
        One example a forget record, in their order.

    Raises:
        InputError: if there is no refusal at all, or none that fits; names the record's place, never its text.
    """
    if not task.refusals:
        raise InputError("method: it teaches the model to refuse, and there is no refusal to teach")
    context = context_of(task.model)
    generator = task.generator("refusals")
    examples = []
    for number, record in enumerate(task.forget):
        prompt = record.tokens[: record.answer_start]
        fitting = [r for r in task.refusals if context is None or prompt.numel() + r.numel() <= context]
        if not fitting:
            raise InputError(
                f"method: no refusal fits after the prompt of forget record {number} "
                f"({prompt.numel()} tokens) into the model's context of {context} tokens"
            )
        refusal = fitting[int(torch.randint(len(fitting), (), generator=generator))]
        examples.append(Example(torch.cat([prompt, refusal]), record.answer_start))
    return examples
