"""What the tests of ALKN share: its presets in small, and a request to a tiny model that knows its records."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alkn.core.scoring import score
from alkn.core.unlearning import StopRule, Task
from alkn.methods.alkn_params import AlknParams

PRESETS = ("interleaved", "resistant", "rounds", "derived", "reference", "paper")
STOP = StopRule(p=0.01, exact_memorization=0.2)
NEVER = StopRule(p=0.0, exact_memorization=0.0)


def rounds_of(**more: Any) -> AlknParams:
    """``rounds`` with a rate for a model of 30,000 parameters and a sample of 9 of its 12 retain records."""
    return AlknParams.model_validate({"preset": "rounds", "lr": 5e-3, "retain_sample": 9} | more)


def interleaved_of(**more: Any) -> AlknParams:
    """``interleaved`` in small: twelve written records, a rate for so small a model, half the steps."""
    small = {"lr": 2e-3, "rehearsal": 12, "rehearsal_batch": 6, "retain_batch": 6, "decay_steps": 60, "steps": 200}
    return AlknParams.model_validate({"preset": "interleaved"} | small | more)


def task_of(memorised: Any, *, stop: StopRule = STOP, seed: int = 0, second: bool = False, **more: Any) -> Task:
    forget = memorised.second if second else memorised.forget
    model = more.pop("model", None) or memorised.model()
    return Task(model=model, forget=forget, retain=memorised.retain, stop=stop, seed=seed, **more)


def changes(task: Task, memorised: Any) -> dict[str, Tensor]:
    start = dict(memorised.trained.named_parameters())
    return {name: w - start[name].detach() for name, w in task.weights().items()}


def p_of(model: nn.Module, records: Any) -> float:
    return float(score(model, records).probability.mean())
