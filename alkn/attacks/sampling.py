"""Sampling: does the answer come when the model is asked many times?"""

from __future__ import annotations

import re

import torch
from pydantic import Field

from alkn.attacks.budgets import Rising
from alkn.core.attack import Curve, Point, Target
from alkn.core.sampled import sample
from alkn.core.scoring import score
from alkn.core.unlearning import seed_of
from alkn.errors import InputError
from alkn.registry import Params, register_attack


class SamplingParams(Params):
    """Budget of the attack.

    Attributes:
        samples: how many answers are drawn for each question; the first of many are those of few.
        temperature: of the drawing; 1 is the model's own distribution.
        max_new_tokens: longest answer.
        seed: of the drawing.
    """

    samples: Rising = (1, 4, 16)
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)


@register_attack(
    "sampling",
    params=SamplingParams,
    source="after Scholten et al. 2024; the numbers are our own",
)
def sampling(target: Target, params: SamplingParams) -> Curve:
    """The best ROUGE-L recall, and whether an answer is contained, among the first n samples of each record, by n.

    ``rouge_l``: mean over records of the largest recall; ``contained``: share of records one of whose samples
    contains the whole right answer, whatever case and punctuation. P and exact memorization are the model's
    own at every point: drawing does not move them.
    """
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import

    if target.eos is None or not target.asked:
        raise InputError("the attack needs the records' text and was not given it")
    if params.samples[0] == 0:
        raise InputError("attacks.sampling.samples: expected numbers from 1 on")
    owners, prompts, answers, seeds, places = [], [], [], [], []
    for name, records in target.asked.items():
        for number, record in enumerate(records):
            if record is None:
                continue
            example = target.forgotten[name][number]
            owners.append(name)
            prompts.append(example.tokens[: example.answer_start])
            answers.append(record.answer)
            seeds.append(seed_of(params.seed, "sampling", name, number))
            places.append(example)
    if not prompts:
        raise InputError("no record has a question")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    drawn = sample(
        target.model, prompts, count=params.samples[-1], temperature=params.temperature, seeds=seeds,
        eos=target.eos, max_new_tokens=params.max_new_tokens, progress=target.progress,
    )  # fmt: skip
    said = [[target.decode(ids) for ids in rows] for rows in drawn]
    recall = torch.tensor(
        [
            [scorer.score(answer, text)["rougeL"].recall for text in texts]
            for answer, texts in zip(answers, said, strict=True)
        ],
        dtype=torch.float64,
    )
    whole = torch.tensor(
        [[contains(text, answer) for text in texts] for answer, texts in zip(answers, said, strict=True)]
    ).double()
    now = score(target.model, places)
    points = tuple(
        Point.of_values(
            n, now.probability, now.exact_memorization, owners,
            more={"rouge_l": recall[:, :n].amax(dim=1), "contained": whole[:, :n].amax(dim=1)},
        )
        for n in params.samples
    )  # fmt: skip
    budget = {
        "temperature": params.temperature, "max_new_tokens": params.max_new_tokens, "measured": len(owners),
        "left_out": sum(map(len, target.asked.values())) - len(owners),
    }  # fmt: skip
    missing = {name: "no record has a question" for name in target.asked if name not in owners}
    return Curve("samples", points, budget, missing, about=("rouge_l", "contained"))


def contains(text: str, answer: str) -> bool:
    """Whether the words of the answer stand in the text one after another, whatever case and punctuation."""
    words, wanted = (" ".join(["", *re.findall(r"\w+", part.lower()), ""]) for part in (text, answer))
    return wanted in words
