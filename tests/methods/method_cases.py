"""What the tests of the methods share: a request to a tiny model that knows its records, and what it knows after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alkn.core.scoring import Example, score
from alkn.core.unlearning import Forgetting, StopRule, Task

STOP = StopRule(p=0.01, exact_memorization=0.2)
NEVER = StopRule(p=0.0, exact_memorization=0.0)
CPU = torch.device("cpu")


def task_of(memorised: Any, *, stop: StopRule = STOP, seed: int = 0, **more: Any) -> Task:
    given = {"model": memorised.model(), "forget": memorised.forget, "retain": memorised.retain} | more
    return Task(stop=stop, seed=seed, **given)


def changes(task: Task, memorised: Any) -> dict[str, Tensor]:
    start = dict(memorised.trained.named_parameters())
    return {name: w - start[name].detach() for name, w in task.weights().items()}


def p_of(model: nn.Module, records: Sequence[Example]) -> float:
    return float(score(model, records).probability.mean())


def forgetting_of(model: nn.Module, records: Sequence[Example], full_forward: Any) -> Forgetting:
    """P and exact memorization by full forwards, one record at a time."""
    with torch.no_grad():
        answers = [(e, *full_forward(model, e)) for e in records]
    hits = [(logits.argmax(-1) == e.tokens[e.answer_start :]).double().mean() for e, _, logits in answers]
    return Forgetting(float(np.mean([math.exp(-nll.mean()) for _, nll, _ in answers])), float(np.mean(hits)))
