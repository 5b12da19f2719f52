"""A model's pass over a batch: what it says at labelled positions, and which rows it is run on together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alkn.core.distributed import processes

LABELLED = "_alkn_labelled"
"""Attribute under which a split model has :func:`labelled` as a method (see :mod:`alkn.core.sharding`)."""

RUN_COST = 64
"""Padded tokens that a run of the model on a CPU costs beside its own, measured in one thread (docs/PERFORMANCE.md)."""


def labelled(model: nn.Module, input_ids: Tensor, positions: Tensor, *, states: bool = False) -> list[Tensor]:
    """What a model says at flat positions of ``[batch * seq]``, in this process alone.

    Returns:
        Logits ``[positions, vocab]``; with ``states`` the hidden states after each block as well, ``[positions,
        hidden]``, of the last one behind the norm.
    """
    causal_lm: Any = model
    plain = has_plain_head(model)
    forward = causal_lm.base_model if plain else causal_lm

    def at(ids: Tensor, places: Tensor) -> list[Tensor]:
        said = forward(input_ids=ids, use_cache=False, output_hidden_states=states)
        blocks = said.hidden_states[1:] if states else ()
        last = said.last_hidden_state if plain else said.logits
        return [values.flatten(0, 1)[places] for values in (last, *blocks)]

    said, *blocks = _in_runs(at, input_ids, positions)
    return [causal_lm.get_output_embeddings()(said) if plain else said, *blocks]


def _in_runs(at: Callable[[Tensor, Tensor], list[Tensor]], input_ids: Tensor, positions: Tensor) -> list[Tensor]:
    """``at`` on rows of similar length at a time, where that saves more padding than another run of the model costs.

    Not on an accelerator, which a small batch does not fill anyway; nor in several processes, since split weights have
    to be run equally often by all.
    """
    if input_ids.device.type != "cpu" or processes() > 1:
        return at(input_ids, positions)
    seq = input_ids.shape[1]
    rows, columns = positions // seq, positions % seq
    # Up to the last labelled position: no label is predicted from the end-of-sequence or the padding.
    widths = torch.ones(len(input_ids), dtype=torch.long).scatter_reduce_(0, rows, columns + 1, "amax").tolist()
    runs = runs_of(widths, RUN_COST)
    if len(runs) == 1:
        return at(input_ids, positions)
    places = torch.tensor([row for part in runs for row in part]).argsort()[rows]
    found, labels, begin = [], [], 0
    for part in runs:
        width = widths[part[-1]]
        mine = torch.nonzero((begin <= places) & (places < begin + len(part))).flatten()
        found.append(at(input_ids[part, :width], (places[mine] - begin) * width + columns[mine]))
        labels.append(mine)
        begin += len(part)
    back = torch.cat(labels).argsort()
    return [torch.cat(parts)[back] for parts in zip(*found, strict=True)]


def runs_of(widths: Sequence[int], cost: int) -> list[list[int]]:
    """Split rows into runs of a model, each padded to its longest row, so that all cost the least.

    Args:
        widths: tokens of each row, at least one row.
        cost: of a run beside its padded tokens, in tokens.

    Returns:
        The rows of each run by rising width, the runs too: in that order the best split is one into neighbours.
    """
    order = sorted(range(len(widths)), key=lambda row: widths[row])
    least, begins = [0], []
    for end in range(1, len(order) + 1):
        width = widths[order[end - 1]]
        total, begin = min((least[k] + cost + (end - k) * width, k) for k in range(end))
        least.append(total)
        begins.append(begin)
    runs, end = [], len(order)
    while end:
        runs.append(order[begins[end - 1] : end])
        end = begins[end - 1]
    return runs[::-1]


def has_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are exactly its output embedding applied to its last hidden state."""
    causal_lm: Any = model
    known: bool | None = getattr(model, "_alkn_plain_head", None)
    if known is None:
        device = next(model.parameters()).device
        probe = torch.arange(4, device=device).unsqueeze(0)
        training = model.training
        model.eval()
        head: nn.Module = causal_lm.get_output_embeddings()
        # A cap does not bend the small logits of an untrained model, so the probe makes them large.
        enlarged = head.register_forward_hook(lambda _module, _inputs, output: output * 1000)
        try:
            with torch.no_grad():
                direct: Tensor = head(causal_lm.base_model(input_ids=probe, use_cache=False).last_hidden_state)
                whole: Tensor = causal_lm(input_ids=probe, use_cache=False).logits
        finally:
            enlarged.remove()
        known = torch.allclose(direct, whole, rtol=1e-3, atol=1e-4)
        model.train(training)
        causal_lm._alkn_plain_head = known
    return known
