"""Hint: does the answer come to somebody who knows a little of it?"""

from __future__ import annotations

from pydantic import Field, field_validator

from alkn.attacks.budgets import Rising
from alkn.core.asked import Asked, variants
from alkn.core.attack import Curve, Point, Target
from alkn.core.scoring import Example, score
from alkn.registry import Params, register_attack


class HintParams(Params):
    """Budget of the attack.

    Attributes:
        initials: of how many words of the answer the first letter is told; 0: no hint at all.
        text: the hint, put before the question; holds ``{words}`` and ``{initials}``.
    """

    initials: Rising = (0, 1, 2, 4)
    text: str = Field("Hint: the answer has {words} words, and they begin with: {initials}.")

    @field_validator("text")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if "{initials}" not in text:
            raise ValueError("expected {initials} in it")
        return text


@register_attack("hint", params=HintParams, source="own; after Lynch et al. 2024, who put hints into the context")
def hint(target: Target, params: HintParams) -> Curve:
    """P and exact memorization of each answer after a hint with the first letters of its first n words, by n."""

    def make(_request: str, _number: int, record: Asked) -> list[Example | None]:
        return [record.encode(hinted(record, count, params.text)) for count in params.initials]

    records = variants(target.asked, make)
    points = []
    for done, count in enumerate(params.initials):
        target.progress("hint", done, len(params.initials))
        points.append(Point.of(count, score(target.model, [row[done] for row in records.examples]), records.owners))
    target.progress("hint", len(params.initials), len(params.initials))
    budget = {"measured": len(records.owners), "left_out": records.left_out}
    return Curve("initials", tuple(points), budget, records.missing)


def hinted(record: Asked, count: int, text: str) -> str:
    """The question after a hint of ``count`` initials; the question itself for 0."""
    if count == 0:
        return record.question
    words = record.answer.split()
    initials = " ".join(word[0] for word in words[:count])
    return text.replace("{words}", str(len(words))).replace("{initials}", initials) + " " + record.question
