"""Answers drawn at random, as many a question as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from alkn.core.distributed import refuse_split
from alkn.core.limits import context_of
from alkn.core.scoring import Progress, no_progress


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    count: int,
    temperature: float,
    seeds: Sequence[int],
    eos: int,
    max_new_tokens: int,
    max_rows: int = 128,
    progress: Progress = no_progress,
) -> list[list[list[int]]]:
    """Draw ``count`` continuations of every prompt from softmax(logits / temperature).

    Prompts of one length go together, so nothing is padded. Each prompt has a generator of its own: what is
    drawn for it does not depend on the others, but for the rounding of a larger batch.

    Args:
        model: a transformers causal language model, in evaluation mode afterwards as before.
        prompts: token ids, each ``[length]``, at least one token.
        count: continuations a prompt.
        temperature: > 0; 1 is the model itself.
        seeds: one a prompt.
        eos: end-of-sequence id; a continuation ends before it.
        max_new_tokens: longest continuation, cut so that it stays in the model's context.
        max_rows: continuations at a time; at least those of one prompt.
        progress: told after every batch.

    Returns:
        Per prompt its continuations, without the end-of-sequence token.

    Raises:
        InputError: if the model's weights are split over processes.
    """
    refuse_split(model, "sampling")
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(prompt.numel(), []).append(i)
    found: list[list[list[int]]] = [[] for _ in prompts]
    training, done, step = model.training, 0, max(1, max_rows // count)
    model.eval()
    for members in by_length.values():
        for begin in range(0, len(members), step):
            part = members[begin : begin + step]
            generators = [Generator().manual_seed(seeds[i]) for i in part]
            drawn = _drawn(model, torch.stack([prompts[i] for i in part]), count, temperature, generators, eos,
                           max_new_tokens)  # fmt: skip
            for i, rows in zip(part, drawn, strict=True):
                found[i] = [row[: row.index(eos)] if eos in row else row for row in rows]
            done += len(part)
            progress("sampling", done, len(prompts))
    model.train(training)
    return found


def _drawn(
    model: nn.Module, prompts: Tensor, count: int, temperature: float, generators: Sequence[Generator], eos: int,
    max_new_tokens: int,
) -> list[list[list[int]]]:  # fmt: skip
    """``count`` continuations of each row of ``[prompts, length]``."""
    causal_lm: Any = model
    device = next(model.parameters()).device
    context = context_of(model)
    room = max_new_tokens if context is None else min(max_new_tokens, context - prompts.shape[1])
    ids, cache = prompts.repeat_interleave(count, dim=0).to(device), None
    written = torch.full((len(prompts) * count, max(room, 0)), eos)
    ended = torch.zeros(len(prompts) * count, dtype=torch.bool)
    for place in range(room):
        out = causal_lm(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = torch.softmax(out.logits[:, -1].double().cpu() / temperature, dim=-1)
        new = torch.cat(
            [
                torch.multinomial(rows, 1, generator=generator).squeeze(1)
                for rows, generator in zip(chances.split(count), generators, strict=True)
            ]
        )
        new[ended] = eos
        written[:, place] = new
        ended |= new == eos
        if bool(ended.all()):
            break
        ids = new.unsqueeze(1).to(device)
    return [rows.tolist() for rows in written.split(count)]
