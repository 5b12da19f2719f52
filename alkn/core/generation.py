"""Greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alkn.core.distributed import dealt, is_main, is_split, sum_
from alkn.core.limits import context_of, text_config_of
from alkn.core.scoring import Progress, bucketed, no_progress

BATCH = (16_384, 128)
"""Padded tokens of prompts and answers, and prompts, that are written at once where nothing more is known."""
GPU_CACHE, GPU_SHARE, GPU_PROMPTS = 8 << 30, 1 / 8, 1024
"""Bytes of keys and values, but no more than this share of the GPU's memory, and prompts: there a token costs hardly
more for many prompts than for one."""


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    eos: int,
    max_new_tokens: int,
    max_tokens: int | None = None,
    progress: Progress = no_progress,
) -> list[list[int]]:
    """Greedy continuations: left-padded batches of similar length, with a key-value cache.

    Args:
        model: a transformers causal language model.
        prompts: token ids, each ``[length]``, at least one token.
        eos: end-of-sequence id; a continuation ends before it.
        max_new_tokens: longest continuation, cut so that it stays in the model's context.
        max_tokens: padded prompt and answer tokens a batch at the most; ``None``: as many as the device is good for.
        progress: told before the first batch and after every one.

    Returns:
        New token ids a prompt, without the end-of-sequence token.
    """
    context = context_of(model)
    by_room: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        room = max_new_tokens if context is None else min(max_new_tokens, context - prompt.numel())
        by_room.setdefault(room, []).append(i)
    # A batch ends for all its prompts at once, so those with the same room go together.
    tokens, records = at_once(model, _memory(next(model.parameters()).device))
    parts = [
        (room, [members[i] for i in part])
        for room, members in by_room.items()
        if room > 0
        for part in bucketed(
            [prompts[i].numel() + room for i in members], max_tokens=max_tokens or tokens, max_records=records
        )
    ]
    done = len(prompts) - sum(len(rows) for _, rows in parts)
    progress("generate", done, len(prompts))
    found = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long)
    # Split weights are gathered token by token, so all processes have to write the same answers.
    share = [(part, is_main()) for part in parts] if is_split(model) else dealt(parts)
    for (room, rows), counts in share:
        for i, new in zip(rows, _continued(model, [prompts[i] for i in rows], eos, room), strict=True):
            own = new[: new.index(eos)] if eos in new else new
            if counts:
                found[i, : len(own)] = torch.tensor(own, dtype=torch.long) + 1
        done += len(rows)
        progress("generate", done, len(prompts))
    return [[token - 1 for token in row if token] for row in sum_(found).tolist()]


def at_once(model: nn.Module, memory: int | None) -> tuple[int, int]:
    """Padded tokens and prompts of a batch; the same on every machine with as much memory.

    Args:
        model: who writes.
        memory: bytes that the GPU has in all; ``None`` on a CPU.
    """
    if memory is None:
        return BATCH
    a_token = cache_bytes(model)
    if a_token is None:
        return BATCH
    return int(min(GPU_CACHE, memory * GPU_SHARE)) // a_token, GPU_PROMPTS


def cache_bytes(model: nn.Module) -> int | None:
    """Bytes of the keys and values of one token, in the precision of the weights; ``None``: the model does not tell."""
    config = text_config_of(model)
    try:
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        return int(2 * config.num_hidden_layers * kept * width * next(model.parameters()).element_size())
    except AttributeError:
        # A model without attention, or one whose layers differ.
        return None


def _memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _continued(model: nn.Module, prompts: Sequence[Tensor], eos: int, room: int) -> list[list[int]]:
    """One left-padded batch, at most ``room`` new tokens each."""
    device = next(model.parameters()).device
    width = max(p.numel() for p in prompts)
    ids = torch.full((len(prompts), width), eos)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.numel() :] = prompt
        mask[row, width - prompt.numel() :] = 1
    causal_lm: Any = model
    own = causal_lm.generation_config
    # A published model's own settings (penalties, sampling, other ends) would make the answer not greedy.
    causal_lm.generation_config = type(own)(eos_token_id=eos, pad_token_id=eos)
    try:
        generated: Tensor = causal_lm.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
        )
    finally:
        causal_lm.generation_config = own
    return [row[width:].tolist() for row in generated]
