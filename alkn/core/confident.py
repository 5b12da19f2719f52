"""What a model says when nobody asks, and is surest of: a test of usefulness that needs no data."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from alkn.core.scoring import Example, score
from alkn.core.view import Text

SHORTEST = 8
"""Tokens below which a text is no sentence."""
LEAST = 1e-9
"""In place of a loss of 0, where a ratio divides by it."""


def ranked(model: nn.Module, texts: Sequence[Example], tokens: Text, *, window: int, context: int | None) -> list[int]:
    """Indices of texts that a model wrote, those first that it is surest of by any of four measures.

    The measures, each better when lower: mean NLL; mean NLL over the bytes of the text compressed by zlib; the lowest
    mean NLL of ``window`` tokens in a row; mean NLL over that of the text in lower case. Their orders are taken in
    turns, the best of each, then the second of each, and so on.

    Args:
        model: the model that wrote them.
        texts: what stood before and what was written; the latter is what counts.
        tokens: of the model.
        window: tokens in a row.
        context: the model's longest input; ``None``: no bound.

    Source: Carlini et al. 2021, sections 5.1 and 5.2.
    """
    scores = score(model, texts)
    words = [tokens.decode(text.tokens[text.answer_start :].tolist()) for text in texts]
    lowered = score(
        model, [_again(text, tokens.encode(said.lower()), context) for text, said in zip(texts, words, strict=True)]
    )
    nll = scores.nll
    orders = [
        nll,
        nll / torch.tensor([len(zlib.compress(said.encode())) for said in words]),
        torch.stack([lowest_window(-logs, window) for logs in scores.token_log_probs]),
        nll / lowered.nll.clamp(min=LEAST),
    ]
    turns = zip(*(order.argsort(stable=True).tolist() for order in orders), strict=True)
    return list(dict.fromkeys(i for turn in turns for i in turn))


def lowest_window(losses: Tensor, window: int) -> Tensor:
    """The lowest mean of ``window`` losses in a row, of all where there are fewer; 0-d."""
    return losses.double().unfold(0, min(window, losses.numel()), 1).mean(-1).min()


def different(texts: Iterable[Sequence[int]], *, keep: int, but: Iterable[Sequence[int]] = ()) -> list[int]:
    """Indices of the first ``keep`` texts that are long enough and not like one before, or like one of ``but``.

    Two texts are alike if at least half of the three-token groups of one stand in the other.

    Args:
        texts: token ids, the best first.
        keep: how many are wanted.
        but: token ids of texts that none may be like.

    Source: Carlini et al. 2021, section 5.2; ``but`` is our own.
    """
    others = [_groups(ids) for ids in but]
    kept: list[int] = []
    for i, ids in enumerate(texts):
        if len(kept) == keep:
            break
        own = _groups(ids)
        if len(ids) < SHORTEST or any(_alike(own, other) for other in others):
            continue
        kept.append(i)
        others.append(own)
    return kept


def _alike(a: set[tuple[int, ...]], b: set[tuple[int, ...]]) -> bool:
    return bool(a and b) and 2 * len(a & b) >= min(len(a), len(b))


def _groups(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + 3]) for i in range(len(ids) - 2)}


def _again(text: Example, ids: list[int], context: int | None) -> Example:
    """Other tokens after the same beginning; at least one, and as many as fit."""
    begun = text.tokens[: text.answer_start]
    room = len(ids) if context is None else context - begun.numel()
    written = torch.tensor(ids[:room] or text.tokens[text.answer_start : text.answer_start + 1].tolist())
    return Example(torch.cat([begun, written]), text.answer_start)
