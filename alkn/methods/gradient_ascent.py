"""Gradient ascent: climb the forget loss, and nothing else."""

from __future__ import annotations

from alkn.core.descent import descend
from alkn.core.sequence_losses import ascent_loss
from alkn.core.unlearning import Outcome, Task
from alkn.methods.descent_params import PaceParams
from alkn.registry import register_method


@register_method("gradient_ascent", params=PaceParams, source="Jang et al. 2023; TOFU (Maini et al. 2024)")
def gradient_ascent(task: Task, params: PaceParams) -> Outcome:
    """L = −CE(forget). There is no retain term, so retain records are not needed."""
    return descend(task, params.pace(), forget=ascent_loss(), keep=None)
