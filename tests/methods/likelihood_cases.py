"""What the tests of the baselines that work on likelihoods share."""

from __future__ import annotations

from typing import Any

from alkn.core.unlearning import Outcome, Task
from alkn.registry import methods

ALL = (
    "gradient_ascent", "gradient_difference", "kl_minimization", "npo", "simnpo", "dpo", "idk", "undial", "wga",
    "satimp",
)  # fmt: skip
WITH_RETAIN = ALL[1:]


def run(name: str, task: Task, **values: Any) -> Outcome:
    """The registered method with these settings."""
    entry = methods[name]
    return entry.call(task, entry.params.model_validate(values))  # type: ignore[no-any-return]
