"""Fine-tuning a copy of a model a little, and what it then knows of other records."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from torch import Generator, nn

from alkn.core.attack import Point
from alkn.core.distributed import refuse_split
from alkn.core.scoring import Example, Progress, collate, endless_batches, no_progress, score
from alkn.core.training import adamw, answer_loss
from alkn.errors import TrainingDiverged


def points_of_training(
    model: nn.Module,
    shown: Sequence[Example],
    measured: Sequence[Example],
    owners: Sequence[str],
    *,
    steps: Sequence[int],
    lr: float,
    batch_size: int,
    generator: Generator,
    progress: Progress = no_progress,
    label: str = "relearning",
) -> list[Point]:
    """Train a float32 copy by AdamW, constant rate, no weight decay, no dropout, and score other records on the way.

    Args:
        model: a causal language model on its device; unchanged afterwards.
        shown: encoded records that the copy is trained on, at least one.
        measured: encoded records that are scored.
        owners: the request of each of them.
        steps: rising numbers of steps at which they are; at 0 it is the given model, at its stored precision.
        lr: learning rate.
        batch_size: records a step, each once before any comes again; at most all.
        generator: order of the batches.
        progress: told about every step.
        label: what the progress shows.

    Raises:
        InputError: if the model's weights are split over processes.
        TrainingDiverged: when a loss is not finite.
    """
    refuse_split(model, label)
    points = [Point.of(0, score(model, measured), owners)] if steps[0] == 0 else []
    copied = copy.deepcopy(model).float().requires_grad_(True).eval()
    device, loss = next(copied.parameters()).device, answer_loss()
    optimizer = adamw(copied.parameters(), device=device, lr=lr)
    batches = endless_batches(len(shown), min(batch_size, len(shown)), generator)
    for step in range(1, steps[-1] + 1):
        progress(label, step - 1, steps[-1])
        value = loss(copied, collate(shown, next(batches), device=device))
        if not math.isfinite(float(value.detach())):
            raise TrainingDiverged(f"{label}: the loss of step {step} is {float(value.detach())}")
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in steps:
            points.append(Point.of(step, score(copied, measured), owners))
    progress(label, steps[-1], steps[-1])
    return points
