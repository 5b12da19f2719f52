"""Damaged answers: what is asked of an answer is asked of it behind other words too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from alkn.core.scoring import Batch
from alkn.core.training import Loss


def damaged(batch: Batch, share: float, generator: Generator) -> Batch:
    """In half of the records, what a label is predicted from is no longer what stood there; the labels stay.

    Each record has an even chance; of a batch of one record, what comes in is its own.

    Args:
        batch: its ``input_ids`` are not changed in place.
        share: of the input tokens from the last one of the prompt on, in the records that are drawn: so many are
            replaced, each by one that is drawn from those of the whole batch.
        generator: on the CPU; decides records, tokens and what comes in their place.
    """
    labels, device = len(batch.positions), batch.positions.device

    def chance(count: int) -> Tensor:
        return torch.rand(count, generator=generator).to(device)

    hit = (chance(len(batch.records)) < 0.5)[batch.rows] & (chance(labels) < share)
    others = torch.randint(labels, (labels,), generator=generator).to(device)
    ids = batch.input_ids.flatten()
    answers = ids[batch.positions]
    ids = ids.index_put((batch.positions,), torch.where(hit, answers[others], answers))
    return replace(batch, input_ids=ids.view_as(batch.input_ids))


def through_damage(loss: Loss, share: float, generator: Generator) -> Loss:
    """``loss``, each time on the batch as :func:`damaged` leaves it; with a share of 0 the loss itself."""

    def on_damaged(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model, damaged(batch, share, generator))

    return on_damaged if share else loss
