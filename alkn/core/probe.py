"""A model before one set of records: everything metrics read, computed once and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from alkn.core.scoring import Example, Progress, Scores, bucketed, no_progress, score


@dataclass(frozen=True)
class RecordSet:
    """Encoded records of one set.

    Attributes:
        name: what the set is called in reports: ``forget``, ``utility/facts``, ...
        ids: the record number of each example; a long text gives several examples with one number.
        examples: prompt and answer.
        references: the answers' text, held in memory only.
        paraphrases: the question with the paraphrased answer, or ``None``.
        wrong: the question with each wrong answer of the same form.
    """

    name: str
    ids: Sequence[int]
    examples: Sequence[Example]
    references: Sequence[str]
    paraphrases: Sequence[Example | None]
    wrong: Sequence[Sequence[Example]]

    def __len__(self) -> int:
        return len(self.examples)


class Probe:
    """One model on one set. Scores and answers are computed at the first use and kept.

    Args:
        model: a transformers causal language model on its device.
        records: the set, with at least one example.
        decode: turns generated token ids into text.
        eos: end-of-sequence token id.
        max_new_tokens: longest greedy answer; ``None``: this set is not generated on.
        progress: told about long work.
    """

    def __init__(
        self,
        model: nn.Module,
        records: RecordSet,
        *,
        decode: Callable[[list[int]], str],
        eos: int,
        max_new_tokens: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.model, self.records = model, records
        self._decode, self._eos = decode, eos
        self._max_new_tokens, self._progress = max_new_tokens, progress

    @cached_property
    def scores(self) -> Scores:
        """Scores of the right answers."""
        return score(self.model, self.records.examples)

    @cached_property
    def paraphrase_nll(self) -> Tensor | None:
        """Mean token NLL of the paraphrased answer (the answer itself where a record has none), ``[records]``.

        ``None`` if no record has wrong answers to compare with.
        """
        if not all(self.records.wrong):
            return None
        pairs = zip(self.records.paraphrases, self.records.examples, strict=True)
        return score(self.model, [p if p is not None else e for p, e in pairs]).nll

    @cached_property
    def wrong_nll(self) -> list[Tensor] | None:
        """Mean token NLL of each wrong answer, one ``[wrong answers]`` tensor a record, or ``None``."""
        if not all(self.records.wrong):
            return None
        flat = [example for group in self.records.wrong for example in group]
        return list(score(self.model, flat).nll.split([len(group) for group in self.records.wrong]))

    @cached_property
    def generations(self) -> list[str] | None:
        """The model's greedy answers, or ``None`` if this set is not generated on."""
        if self._max_new_tokens is None:
            return None
        prompts = [e.tokens[: e.answer_start] for e in self.records.examples]
        return [
            self._decode(ids)
            for ids in greedy(
                self.model, prompts, eos=self._eos, max_new_tokens=self._max_new_tokens, progress=self._progress
            )
        ]


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    eos: int,
    max_new_tokens: int,
    max_tokens: int = 16_384,
    progress: Progress = no_progress,
) -> list[list[int]]:
    """Greedy continuations: left-padded batches of similar length, with a key-value cache.

    Args:
        model: a transformers causal language model.
        prompts: token ids, each ``[length]``, at least one token.
        eos: end-of-sequence id; a continuation ends before it.
        max_new_tokens: longest continuation, cut so that it stays in the model's context.
        max_tokens: padded prompt and answer tokens a batch at the most.
        progress: told after every batch.

    Returns:
        New token ids a prompt, without the end-of-sequence token.
    """
    causal_lm: Any = model
    context: int | None = getattr(causal_lm.config, "max_position_embeddings", None)
    by_room: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        room = max_new_tokens if context is None else min(max_new_tokens, context - prompt.numel())
        by_room.setdefault(room, []).append(i)
    out: list[list[int]] = [[] for _ in prompts]
    done = len(prompts) - sum(len(members) for room, members in by_room.items() if room > 0)
    # A batch ends for all its prompts at once, so those with the same room go together.
    for room, members in by_room.items():
        lengths = [prompts[i].numel() + room for i in members]
        for part in bucketed(lengths, max_tokens=max_tokens) if room > 0 else ():
            rows = [members[i] for i in part]
            for i, new in zip(rows, _continued(model, [prompts[i] for i in rows], eos, room), strict=True):
                out[i] = new[: new.index(eos)] if eos in new else new
            done += len(rows)
            progress("generate", done, len(prompts))
    return out


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
