"""In context: does the answer come when other forgotten records stand before the question?"""

from __future__ import annotations

from alkn.attacks.budgets import Rising
from alkn.core.asked import Asked, Turn, variants
from alkn.core.attack import Curve, Point, Target
from alkn.core.scoring import Example, score
from alkn.errors import InputError
from alkn.registry import Params, register_attack


class InContextParams(Params):
    """Budget of the attack.

    Attributes:
        examples: how many other forgotten records are shown, with their answers.
    """

    examples: Rising = (0, 1, 2, 4)


@register_attack(
    "in_context",
    params=InContextParams,
    source="Lynch et al. 2024; Shumailov et al. 2024, UnUnlearning",
)
def in_context(target: Target, params: InContextParams) -> Curve:
    """P and exact memorization of each answer after k other records, by k.

    What is shown are the records that follow it in its own request, from the last one on to the first, and then
    those of the other requests: never the record itself.
    """
    every = {name: [record for record in records if record is not None] for name, records in target.asked.items()}
    most = params.examples[-1]
    if sum(map(len, every.values())) <= most:
        raise InputError(f"there are not {most} other records with a question to show")

    def others(request: str, record: Asked) -> list[Turn]:
        own = every[request]
        at = next(i for i, one in enumerate(own) if one is record)
        rest = [one for name, records in every.items() if name != request for one in records]
        return [(one.question, one.answer) for one in (*own[at + 1 :], *own[:at], *rest)[:most]]

    def make(request: str, _number: int, record: Asked) -> list[Example | None]:
        shown = others(request, record)
        return [record.encode(record.question, shown[:k]) for k in params.examples]

    records = variants(target.asked, make)
    points = []
    for done, k in enumerate(params.examples):
        target.progress("in_context", done, len(params.examples))
        points.append(Point.of(k, score(target.model, [row[done] for row in records.examples]), records.owners))
    target.progress("in_context", len(params.examples), len(params.examples))
    budget = {"measured": len(records.owners), "left_out": records.left_out}
    return Curve("examples", tuple(points), budget, records.missing)
