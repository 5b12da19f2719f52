"""Tasks of the language-model evaluation harness, an optional extra."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import nn

from alkn.core.measured import Measured
from alkn.core.view import Text, View
from alkn.registry import Params, register_metric

logger = logging.getLogger(__name__)

ABSENT = "lm-eval is not installed: pip install 'alkn[lm-eval]'"


class LmEvalParams(Params):
    """What the harness runs.

    Attributes:
        tasks: names of its tasks; their data is fetched from the Hugging Face hub, unless it is there already.
        include: folder of task files of your own, beside the harness's.
        shots: examples before each question; ``null``: what each task says.
        limit: documents a task; ``null``: all.
        batch_size: requests at a time.
    """

    tasks: tuple[str, ...] = ()
    include: str | None = None
    shots: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)


@register_metric("lm_eval", params=LmEvalParams, source="Gao et al., lm-evaluation-harness", scope="model")
def lm_eval(view: View, params: LmEvalParams) -> Measured:
    """Mean over the tasks of the first number that the harness gives for each; parts: ``<task>_<number>``, all of them.

    A task that cannot be run is told with the harness's words, and with it that there is no mean.
    """
    if not params.tasks:
        return Measured.missing("metrics.lm_eval.tasks names no task")
    if importlib.util.find_spec("lm_eval") is None:
        return Measured.missing(ABSENT)
    if view.model is None or view.tokens is None:
        return Measured.missing("there is no model to ask")
    try:
        results = _run(view.model, view.tokens, params)
    except Exception as error:  # the harness raises whatever its data sources do
        logger.warning("lm-eval failed: %s", type(error).__name__)
        return Measured.missing(f"lm-eval: {type(error).__name__}: {str(error)[:200]}")
    numbers = {task: _numbers(results[task]) for task in params.tasks if task in results}
    missing = [task for task in params.tasks if not numbers.get(task)]
    if missing:
        return Measured.missing(f"lm-eval gave no number for {', '.join(missing)}")
    first = [next(iter(found.values())) for found in numbers.values()]
    parts = {f"{task}_{name}": value for task, found in numbers.items() for name, value in found.items()}
    return Measured(math.fsum(first) / len(first)).with_parts(**parts)


def _run(model: nn.Module, tokens: Text, params: LmEvalParams) -> Mapping[str, Mapping[str, Any]]:
    """Task -> what the harness says of it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    asked = HFLM(pretrained=model, tokenizer=tokens.tokenizer, batch_size=params.batch_size)
    found = simple_evaluate(
        model=asked,
        tasks=list(params.tasks),
        num_fewshot=params.shots,
        limit=params.limit,
        log_samples=False,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=params.include),
    )
    results: Mapping[str, Mapping[str, Any]] = found["results"]
    return results


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Its finite numbers, errors of them left out; ``acc,none`` is called ``acc``."""
    return {
        name.removesuffix(",none").replace(",", "_"): float(value)
        for name, value in row.items()
        if "," in name and "stderr" not in name and isinstance(value, int | float) and math.isfinite(value)
    }
