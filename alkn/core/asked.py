"""The question behind a forgotten record, so that it can be asked in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from alkn.core.scoring import Example, Progress, no_progress, score
from alkn.errors import InputError

Turn = tuple[str, str]
"""A question and its answer."""


class Encode(Protocol):
    """Encodes a record with another question, after other records, or with another answer."""

    def __call__(self, question: str, before: Sequence[Turn] = (), answer: str | None = None) -> Example | None:
        """The example, or ``None`` if it is longer than the model's context."""


@dataclass(frozen=True)
class Asked:
    """A record as text; it is held in memory only and never shown, not even in an error.

    Attributes:
        question: what is asked: the question, the prompt, or the user's last message.
        answer: the right answer.
        paraphrase: the question in other words, where the record has it.
        paraphrased_answer: the answer in other words, where the record has it.
        encode: as the record itself is encoded, with what is changed.
    """

    question: str = field(repr=False)
    answer: str = field(repr=False)
    encode: Encode = field(repr=False)
    paraphrase: str | None = field(default=None, repr=False)
    paraphrased_answer: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Variants:
    """Records that can be asked in every one of their variants.

    Attributes:
        owners: the request of each record.
        examples: per record its variants, the first one as the record stands.
        left_out: how many records have a variant that does not fit into the model's context, or no question.
        missing: request -> why none of its records is there.
    """

    owners: Sequence[str]
    examples: Sequence[Sequence[Example]]
    left_out: int
    missing: Mapping[str, str]

    @property
    def most(self) -> int:
        """The largest number of variants beside the first."""
        return max(len(row) for row in self.examples) - 1


def variants(
    asked: Mapping[str, Sequence[Asked | None]], make: Callable[[str, int, Asked], Sequence[Example | None]]
) -> Variants:
    """Every record's variants.

    Args:
        asked: request -> its records; ``None`` for a record without a question.
        make: request, number of the record, the record -> its variants, the first one as it stands.

    Raises:
        InputError: if there is no record that can be asked.
    """
    owners: list[str] = []
    examples: list[list[Example]] = []
    left_out, missing = 0, {}
    for name, records in asked.items():
        found = 0
        for number, record in enumerate(records):
            made = [] if record is None else make(name, number, record)
            whole = [example for example in made if example is not None]
            if record is None or len(whole) < len(made):
                left_out += 1
                continue
            owners.append(name)
            examples.append(whole)
            found += 1
        if not found:
            missing[name] = "no record has a question that fits into the model's context in every variant"
    if not examples:
        raise InputError("no record has a question that fits into the model's context in every variant")
    return Variants(owners, examples, left_out, missing)


def worst_so_far(
    model: nn.Module,
    rows: Sequence[Sequence[Example]],
    number: int,
    *,
    progress: Progress = no_progress,
    label: str = "asking",
) -> list[tuple[Tensor, Tensor]]:
    """P and exact memorization of each record, the largest over its first variants.

    Args:
        model: a causal language model on its device.
        rows: per record its variants, at least one; a record with fewer stays at its last value.
        number: how many variants beside the first are looked at.
        progress: told about every variant.
        label: what the progress shows.

    Returns:
        For 0, 1, ..., ``number`` variants beside the first: (P, exact memorization), ``[records]`` each, float64.
    """
    first = score(model, [row[0] for row in rows])
    p, hits = first.probability.clone(), first.exact_memorization.clone()
    found = [(p.clone(), hits.clone())]
    for place in range(1, number + 1):
        progress(label, place, number + 1)
        having = [i for i, row in enumerate(rows) if len(row) > place]
        if having:
            now = score(model, [rows[i][place] for i in having])
            p[having] = torch.maximum(p[having], now.probability)
            hits[having] = torch.maximum(hits[having], now.exact_memorization)
        found.append((p.clone(), hits.clone()))
    progress(label, number + 1, number + 1)
    return found
