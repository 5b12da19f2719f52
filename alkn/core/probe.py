"""A model before one set of records: everything metrics read, computed once and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from alkn.core.generation import greedy
from alkn.core.measured import Measured
from alkn.core.scoring import Example, Progress, Scores, no_progress, score

NOT_WRITTEN = "evaluation.generate does not name this set"


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


@dataclass(frozen=True)
class References:
    """One set under models that never saw it.

    Attributes:
        probes: digest of a reference model -> the set's records under it, encoded by its own tokenizer. What is
            measured is held against the first; the others show how far apart honest models are.
        reason: why there is none.
    """

    probes: Mapping[str, Probe] = field(default_factory=dict)
    reason: str = "there is no reference model"

    @property
    def first(self) -> Probe | None:
        """What is compared with."""
        return next(iter(self.probes.values()), None)


def no_references() -> References:
    """The default: there is none."""
    return References()


class Probe:
    """One model on one set. Scores and answers are computed at the first use and kept.

    Args:
        model: a transformers causal language model on its device, or what loads it at the first use.
        records: the set, with at least one example.
        decode: turns generated token ids into text.
        eos: end-of-sequence token id.
        max_new_tokens: longest greedy answer; ``None``: this set is not generated on.
        progress: told about long work.
        holdout: the same model on comparable records that no model saw; ``None``: there are none.
        references: gives the same set under reference models.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        records: RecordSet,
        *,
        decode: Callable[[list[int]], str],
        eos: int,
        max_new_tokens: int | None = None,
        progress: Progress = no_progress,
        holdout: Probe | None = None,
        references: Callable[[], References] = no_references,
    ) -> None:
        self.records, self.holdout = records, holdout
        self._model, self._references = model, references
        self._known: dict[str, Measured] = {}
        self._decode, self._eos = decode, eos
        self._max_new_tokens, self._progress = max_new_tokens, progress

    @cached_property
    def model(self) -> nn.Module:
        """The model."""
        return self._model if isinstance(self._model, nn.Module) else self._model()

    def once(self, what: str, compute: Callable[[], Measured]) -> Measured:
        """What ``compute`` gives, computed at the first call under this name."""
        if what not in self._known:
            self._known[what] = compute()
        return self._known[what]

    @cached_property
    def references(self) -> References:
        """The same set under models that never saw it."""
        return self._references()

    @cached_property
    def scores(self) -> Scores:
        """Scores of the right answers."""
        return score(self.model, self.records.examples)

    @cached_property
    def paraphrase_nll(self) -> Tensor | None:
        """Mean token NLL of the paraphrased answer (the answer itself where a record has none), ``[records]``.

        ``None`` unless every record has wrong answers to compare with.
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

    @property
    def writes(self) -> bool:
        """Whether the model writes answers on this set."""
        return self._max_new_tokens is not None

    def write(self, prompts: Sequence[Tensor], *, max_new_tokens: int | None = None) -> list[list[int]]:
        """Greedy continuations, token ids without the end-of-sequence token.

        Args:
            prompts: token ids, ``[length]`` each.
            max_new_tokens: longest one; ``None``: that of the set.
        """
        longest = max_new_tokens if max_new_tokens is not None else self._max_new_tokens
        if longest is None:
            raise ValueError("the model writes no answers on this set, and no length is given")
        return greedy(self.model, prompts, eos=self._eos, max_new_tokens=longest, progress=self._progress)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._decode(list(ids))

    @cached_property
    def written(self) -> list[list[int]] | None:
        """Token ids of the model's greedy answers, or ``None`` if this set is not generated on."""
        return self.write([e.tokens[: e.answer_start] for e in self.records.examples]) if self.writes else None

    @cached_property
    def generations(self) -> list[str] | None:
        """The model's greedy answers, or ``None`` if this set is not generated on."""
        return None if self.written is None else [self.decode(ids) for ids in self.written]
