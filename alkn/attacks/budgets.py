"""Settings that several attacks have: rising numbers, texts around a question."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def with_question(frames: tuple[str, ...]) -> tuple[str, ...]:
    """The frames, each of which holds the question once.

    Raises:
        ValueError: naming the first, by its number, that does not.
    """
    for number, frame in enumerate(frames):
        times = frame.count("{question}")
        if times != 1:
            raise ValueError(f"expected {{question}} once in each; entry {number} has it {times} times")
    return frames


Wordings = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(with_question)]
"""Frames around a question, at least one, ``{question}`` once in each."""


def _rising(counts: tuple[int, ...]) -> tuple[int, ...]:
    if not counts or any(n < 0 for n in counts) or any(a >= b for a, b in zip(counts, counts[1:], strict=False)):
        raise ValueError("expected numbers, each larger than the one before, none below 0")
    return counts


Rising = Annotated[tuple[int, ...], AfterValidator(_rising)]
"""Rising numbers from 0 on, at least one."""
