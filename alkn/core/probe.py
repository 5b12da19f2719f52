"""A model before one set of records: everything metrics read, computed once and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from alkn.core.generation import greedy
from alkn.core.scoring import Example, Progress, Scores, no_progress, score


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
