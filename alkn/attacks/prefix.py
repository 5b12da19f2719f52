"""Prefix: does the rest of an answer come once its beginning is given?"""

from __future__ import annotations

from alkn.attacks.budgets import Rising
from alkn.core.attack import Curve, Point, Target, numbered
from alkn.core.scoring import Example, score
from alkn.errors import InputError
from alkn.registry import Params, register_attack


class PrefixParams(Params):
    """Budget of the attack.

    Attributes:
        tokens: how many tokens of the answer are given.
    """

    tokens: Rising = (0, 1, 2, 4)


@register_attack("prefix", params=PrefixParams, source="Carlini et al. 2023; MUSE (Shi et al. 2024)")
def prefix(target: Target, params: PrefixParams) -> Curve:
    """P and exact memorization of what follows the first n answer tokens, by n.

    The same records at every n: those with at least one token of their answer left after the longest prefix,
    the end of sequence not counted.
    """
    owners, records = numbered(target.forgotten)
    longest = params.tokens[-1]
    long_enough = [i for i, record in enumerate(records) if record.answer_length >= longest + 2]
    if not long_enough:
        raise InputError(f"no answer is longer than {longest} tokens; give a shorter prefix")
    kept = [owners[i] for i in long_enough]
    points = []
    for done, given in enumerate(params.tokens):
        target.progress("prefix", done, len(params.tokens))
        rest = [Example(records[i].tokens, records[i].answer_start + given) for i in long_enough]
        points.append(Point.of(given, score(target.model, rest), kept))
    target.progress("prefix", len(params.tokens), len(params.tokens))
    return Curve(
        "tokens",
        tuple(points),
        {"measured": len(kept), "left_out": len(records) - len(kept)},
        {name: f"no answer is longer than {longest} tokens" for name in target.forgotten if name not in kept},
    )
