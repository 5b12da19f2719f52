"""What the tests of the baselines share: their settings in small, gradients and losses by full forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alkn.core.scoring import Example
from alkn.core.unlearning import Outcome, Task
from alkn.registry import methods

Finished = Callable[[str], tuple[Task, Outcome]]
SMALL: dict[str, dict[str, Any]] = {
    "rmu": {"lr": 1e-3, "trains": "blocks"},
    "sku": {"lr": 2e-3, "epochs": 20},
    "wagle": {"lr": 2e-3, "loss": "gradient_difference"},
    "second_order": {"lr": 1e-3},
    "retrain": {"lr": 1e-2, "epochs": 60, "warmup": 5, "batch_size": 8},
}
DESCENDING = ("rmu", "wagle", "second_order")
SHORT: dict[str, dict[str, Any]] = {
    "rmu": {"steps": 6}, "wagle": {"steps": 6}, "second_order": {"steps": 6, "curvature_every": 2},
    "sku": {"epochs": 2}, "retrain": {"epochs": 3},
}  # fmt: skip


def call(name: str, task: Task, **params: Any) -> Outcome:
    entry = methods[name]
    outcome = entry.call(task, entry.params(**SMALL[name] | params))
    assert isinstance(outcome, Outcome)
    return outcome


def mean_nll(model: nn.Module, records: Sequence[Example], full_forward: Any) -> Tensor:
    """Over all answer tokens, as a batch's loss is."""
    return torch.cat([full_forward(model, e)[0] for e in records]).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, np.ndarray]:
    names, params = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return {n: g.numpy() for n, g in zip(names, found, strict=True)}
