"""RMU: steer the hidden states of forget records into a random direction, leave the others where they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from alkn.core.blocks import Hidden, decoder_blocks, down_projection
from alkn.core.descent import descend, retain_term
from alkn.core.distributed import refuse_split
from alkn.core.scoring import Batch, bucketed, collate
from alkn.core.unlearning import Outcome, Task
from alkn.errors import InputError
from alkn.methods.descent_params import DescentParams
from alkn.registry import register_method

BELOW = 2
"""Blocks below the steered one that are trained with it."""


class RmuParams(DescentParams):
    """Settings of the baseline.

    Attributes:
        layer: the block whose output is steered, counted from 0; ``null``: the middle one.
        trains: in that block and the two below it, the MLP's ``down_projection`` only, or the whole ``blocks``.
        coefficient: c, the length of the target; ``null``: ``factor`` times the mean length of the
            forget records' hidden states at θ_{t-1}.
        factor: see ``coefficient``.
        tokens: hidden states that count: those from which ``answer`` tokens are predicted, or ``all`` of a record.
        retain_weight: α, factor on the distance to θ_{t-1} on retain records.
    """

    lr: float = Field(1e-3, gt=0)
    layer: int | None = Field(None, ge=0)
    trains: Literal["down_projection", "blocks"] = "down_projection"
    coefficient: float | None = Field(None, gt=0)
    factor: float = Field(5.0, gt=0)
    tokens: Literal["answer", "all"] = "answer"
    retain_weight: float = Field(10.0, ge=0)


@register_method("rmu", params=RmuParams, source="Li et al. 2024, WMDP; adaptive c: Huu-Tien et al. 2025")
def rmu(task: Task, params: RmuParams) -> Outcome:
    """L = mean ‖h − c·u‖² / width on forget records + retain_weight · mean ‖h − h_{t-1}‖² / width on retain records."""
    refuse_split(task.model, "method: rmu")
    blocks = decoder_blocks(task.model)
    layer = len(blocks) // 2 if params.layer is None else params.layer
    if layer >= len(blocks):
        raise InputError(f"method.layer: {layer} is asked for, and the model has the blocks 0 to {len(blocks) - 1}")
    pace = params.pace()
    frozen = task.teacher()
    with _caught(task.model, layer) as hidden, _caught(frozen, layer) as hidden_before:
        now, before = States(hidden, params.tokens), States(hidden_before, params.tokens)
        target = steering_target(task, params, now)

        def steer(model: nn.Module, batch: Batch) -> Tensor:
            return (now(model, batch) - target).square().mean()

        def stay(model: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = before(frozen, batch)
            return (now(model, batch) - wanted).square().mean()

        return descend(
            task,
            pace,
            forget=steer,
            keep=retain_term(task, stay, pace, weight=params.retain_weight),
            parameters=_trained(blocks, layer, params, width=target.numel()),
        )


class States:
    """Hidden states of the tokens that count, ``[tokens, hidden]``."""

    def __init__(self, hidden: Hidden, tokens: str) -> None:
        self._hidden, self._tokens = hidden, tokens

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model's blocks on a batch and pick the states; ``model`` is the one that the hook is in."""
        causal_lm: Any = model
        causal_lm.base_model(input_ids=batch.input_ids, use_cache=False)
        states = self._hidden.value.float()
        if self._tokens == "answer":
            return states.flatten(0, 1)[batch.positions]
        rows, seq = batch.input_ids.shape
        # A record's last labelled position has only its last token after it; what follows is padding.
        last = torch.zeros(rows, dtype=torch.long, device=states.device)
        last.scatter_reduce_(0, batch.rows, batch.positions - batch.rows * seq + 1, "amax")
        whole: Tensor = states[torch.arange(seq, device=states.device) <= last.unsqueeze(1)]
        return whole


@contextmanager
def _caught(model: nn.Module, layer: int) -> Iterator[Hidden]:
    hidden = Hidden(decoder_blocks(model)[layer])
    try:
        yield hidden
    finally:
        hidden.close()


def steering_target(task: Task, params: RmuParams, states: States) -> Tensor:
    """The target c · u, ``[hidden]``: u of length 1, its entries drawn uniformly from [0, 1) before."""
    device = next(task.model.parameters()).device
    total, count, width = 0.0, 0, 0
    with torch.no_grad():
        for records in bucketed([e.tokens.numel() for e in task.forget], max_tokens=8192):
            found = states(task.model, collate(task.forget, records, device=device))
            total, count, width = total + float(found.norm(dim=-1).sum()), count + len(found), found.shape[-1]
    length = params.factor * total / count if params.coefficient is None else params.coefficient
    drawn = torch.rand(width, generator=task.generator("direction"))
    target: Tensor = length * drawn / drawn.norm()
    return target.to(device)


def _trained(blocks: nn.ModuleList, layer: int, params: RmuParams, *, width: int) -> list[nn.Parameter]:
    chosen = [blocks[i] for i in range(max(0, layer - BELOW), layer + 1)]
    if params.trains == "blocks":
        return [p for block in chosen for p in block.parameters()]
    return [down_projection(block, width) for block in chosen]
