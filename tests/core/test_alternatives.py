"""What a forgotten question may be answered with instead."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alkn.core.alternatives import AlternativeTerm, Similarity, alternatives
from alkn.core.descent import Together
from alkn.core.scoring import Example
from alkn.core.unlearning import StopRule, Task


def record(prompt: list[int], answer: list[int]) -> Example:
    return Example(torch.tensor([*prompt, *answer]), len(prompt))


def of(*prompts: list[int]) -> list[Tensor]:
    return [torch.tensor(prompt) for prompt in prompts]


def test_similarity_by_hand() -> None:
    """Token 1 is in all three and says nothing, 2 in two, 3 and 4 in one each; what comes twice counts once."""
    rare, common = math.log(3), math.log(3 / 2)
    similarity = Similarity(of([1, 2, 3], [1, 2, 2, 2], [1, 4, 4]), vocab_size=9)
    expected = [(common**2 + rare**2) / math.hypot(common, rare), common, 0.0]
    assert similarity.to(torch.tensor([2, 3, 3, 1, 8])).tolist() == pytest.approx(expected, abs=1e-12)


def test_similarity_against_numpy() -> None:
    """The cosine of dense vectors, up to the length of the question's own."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(20, (int(n),), generator=generator) for n in torch.randint(3, 9, (30,), generator=generator)
    ]
    sets = np.zeros((30, 20))
    for row, prompt in zip(sets, prompts, strict=True):
        row[prompt.numpy()] = 1
    weighted = sets * np.log(30 / np.maximum(sets.sum(0), 1)) * (sets.sum(0) > 0)
    similarity = Similarity(prompts, vocab_size=20)
    for i in (0, 7, 29):
        expected = weighted @ weighted[i] / np.linalg.norm(weighted, axis=1)
        np.testing.assert_allclose(similarity.to(prompts[i]).numpy(), expected, atol=1e-12)


def test_a_question_gets_the_answer_of_the_nearest_kept_one() -> None:
    kept = [record([1, 2, 3, 4], [40, 0]), record([1, 2, 3, 5], [50, 0]), record([1, 6, 7, 8], [60, 0])]
    asked = [record([1, 2, 9, 5], [11, 12, 0]), record([9, 9, 7, 8], [13, 0])]
    found = alternatives(asked, kept, vocab_size=70)
    assert [one.tokens.tolist() for one in found if one] == [[1, 2, 9, 5, 50, 0], [9, 9, 7, 8, 60, 0]]
    assert [one.answer_start for one in found if one] == [4, 4]


def test_the_same_answer_is_no_alternative() -> None:
    """Of a nearer record that is answered alike the next one is taken; where all are, there is none."""
    kept = [record([1, 2, 3, 4], [40, 0]), record([1, 2, 8, 9], [50, 0])]
    asked = [record([1, 2, 3, 4], [40, 0]), record([1, 2, 3, 4], [41, 0])]
    found = alternatives(asked, kept, vocab_size=60)
    assert [one.tokens.tolist()[4:] for one in found if one] == [[50, 0], [40, 0]]
    assert alternatives(asked[:1], kept[:1], vocab_size=60) == [None]


def test_a_long_answer_is_cut_to_the_context() -> None:
    kept, asked = [record([1, 2, 3, 4], [40, 41, 42, 0])], [record([1, 2, 9, 5, 6, 7], [11, 0])]
    (found,) = alternatives(asked, kept, vocab_size=60, context=8)
    assert found is not None and found.tokens.tolist() == [1, 2, 9, 5, 6, 7, 40, 41] and found.answer_start == 6


def test_plain_text_has_no_alternative() -> None:
    """It asks nothing: neither is it given one, nor is it one."""
    text, question = record([1], [2, 3, 4, 5]), record([1, 2, 3, 4], [40, 0])
    assert alternatives([text, question], [text, question], vocab_size=60) == [None, None]
    assert alternatives([question], [], vocab_size=60) == [None]
    assert alternatives([text], [question], vocab_size=60) == [None]


def task_of(make_model: Any, examples: list[Example], **more: Any) -> Task:
    given = {"forget": examples[:3], "retain": examples[3:8]} | more
    return Task(make_model("llama", std=0.5), stop=StopRule(0.0, 0.0), seed=1, **given)


def term_of(task: Task, *, portion: int, batch_size: int = 4, weight: float = 1.0) -> AlternativeTerm:
    return AlternativeTerm(task, portion=lambda _: portion, batch_size=batch_size, weight=weight)


def test_the_term_is_the_weighted_cross_entropy(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """All three of the request and both of what was forgotten earlier, each group as a part of a full batch of four."""
    examples = make_examples(10)
    task = task_of(make_model, examples, earlier=examples[8:])
    term = term_of(task, portion=5, weight=0.25)
    config: Any = task.model.config
    expected = 0.0
    for asked in (task.forget, task.earlier):
        chosen = [one for one in alternatives(asked, task.retain, vocab_size=config.vocab_size) if one is not None]
        nll = torch.cat([full_forward(task.model, one)[0] for one in chosen])
        expected += 0.25 * len(chosen) / 4 * float(nll.mean().detach())
    assert float(term(0).detach()) == pytest.approx(expected, rel=1e-5) and term.passes == 5
    whole = Together(term, term)
    assert float(whole(1).detach()) == pytest.approx(2 * expected, rel=1e-5)
    assert whole.passes == 2 * term.passes == 30


def test_a_step_draws_anew_and_each_at_most_once(make_model: Any, make_examples: Any) -> None:
    """Two of three a step: by and by every pair, decided by the seed and the step alone."""
    examples = make_examples(10)
    term = term_of(task_of(make_model, examples), portion=2)
    losses = [float(term(step).detach()) for step in range(30)]
    assert len({round(x, 5) for x in losses}) == 3 and term.passes == 60
    assert float(term_of(task_of(make_model, examples), portion=2)(7).detach()) == losses[7]


def test_a_step_takes_what_the_size_of_the_request_allows(make_model: Any, make_examples: Any) -> None:
    """The request's three and the earlier one's two records are asked about by themselves."""
    examples, asked = make_examples(10), []

    def portion(records: int) -> int:
        asked.append(records)
        return 1

    task = task_of(make_model, examples, earlier=examples[8:])
    term = AlternativeTerm(task, portion=portion, batch_size=4, weight=1.0)
    term(0)
    assert asked == [3, 2] and term.passes == 2


def test_there_may_be_none(make_model: Any, make_examples: Any) -> None:
    texts = [Example(e.tokens, 1) for e in make_examples(4)]
    assert not term_of(task_of(make_model, make_examples(10), forget=texts), portion=2)
