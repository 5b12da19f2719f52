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
    assert similarity(torch.tensor([2, 3, 3, 1, 8])).tolist() == pytest.approx(expected, abs=1e-12)


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
        np.testing.assert_allclose(similarity(prompts[i]).numpy(), expected, atol=1e-12)


def test_a_question_gets_the_answer_of_the_nearest_kept_one() -> None:
    kept = [record([1, 2, 3, 4], [40, 0]), record([1, 2, 3, 5], [50, 0]), record([1, 6, 7, 8], [60, 0])]
    asked = [record([1, 2, 9, 5], [11, 12, 0]), record([9, 9, 7, 8], [13, 0])]
    found = alternatives(asked, kept, vocab_size=70)
    assert [one.tokens.tolist() for one in found if one] == [[1, 2, 9, 5, 50, 0], [9, 9, 7, 8, 60, 0]]
    assert [one.answer_start for one in found if one] == [4, 4]


def test_the_same_answer_is_no_alternative() -> None:
    """Of a nearer record that is answered in the same words the next one is taken; where all are, there is none."""
    kept = [record([1, 2, 3, 4], [40, 0]), record([1, 2, 8, 9], [50, 0]), record([1, 5, 6, 7], [60, 0])]
    asked = [record([1, 2, 3, 4], [40, 0]), record([1, 2, 3, 4], [41, 0])]
    found = alternatives(asked, kept, vocab_size=61)
    assert [one.tokens.tolist()[4:] for one in found if one] == [[50, 0], [40, 0]]
    turned = [record([1, 2, 3, 4], [41, 40, 40, 0]), *kept[1:]]
    (found_one,) = alternatives([record([1, 2, 3, 4], [40, 41, 0])], turned, vocab_size=61)
    assert found_one is not None and found_one.tokens.tolist()[4:] == [50, 0]
    assert alternatives(asked[:1], kept[:1], vocab_size=60) == [None]


def test_what_has_nothing_in_common_is_no_alternative() -> None:
    """A token that all kept prompts have, or none of them, makes no question alike."""
    kept = [record([1, 2, 3, 4], [40, 0]), record([1, 5, 6, 7], [50, 0])]
    assert alternatives([record([1, 8, 8, 9], [41, 0])], kept, vocab_size=60) == [None]


def test_an_answer_that_does_not_fit_is_no_alternative() -> None:
    kept = [record([1, 2, 3, 4], [40, 41, 42, 0]), record([1, 2, 8, 9], [50, 0]), record([1, 5, 5, 5], [60, 0])]
    asked = [record([1, 2, 3, 4, 6, 7], [11, 0])]
    for context, answer in ((10, [40, 41, 42, 0]), (9, [50, 0])):
        (found,) = alternatives(asked, kept, vocab_size=60, context=context)
        assert found is not None and found.tokens.tolist()[6:] == answer
    assert alternatives(asked, kept, vocab_size=60, context=7) == [None]


def test_plain_text_has_no_alternative() -> None:
    """It asks nothing: neither is it given one, nor is it one."""
    text, question = record([1], [2, 3, 4, 5]), record([1, 2, 3, 4], [40, 0])
    assert alternatives([text, question], [text, question], vocab_size=60) == [None, None]
    assert alternatives([question], [], vocab_size=60) == [None]
    assert alternatives([text], [question], vocab_size=60) == [None]


def task_of(make_model: Any, examples: list[Example], **more: Any) -> Task:
    given = {"forget": examples[:3], "retain": examples[3:8]} | more
    return Task(make_model("llama", std=0.5), stop=StopRule(0.0, 0.0), seed=1, **given)


def term_of(task: Task, *, batch_size: int, weight: float = 1.0, share: float = 1.0) -> AlternativeTerm:
    return AlternativeTerm(task, batch_size=batch_size, weight=weight, share=lambda _: share)


def test_the_term_is_the_weighted_cross_entropy(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """A batch as large as both requests: of each the mean over its alternatives' tokens, times weight and share."""
    examples = make_examples(20)
    task = task_of(make_model, examples, retain=examples[3:18], earlier=examples[18:])
    config: Any = task.model.config
    expected, count = 0.0, 0
    for asked in (task.forget, task.earlier):
        chosen = [one for one in alternatives(asked, task.retain, vocab_size=config.vocab_size) if one is not None]
        expected += float(torch.cat([full_forward(task.model, one)[0] for one in chosen]).mean().detach())
        count += len(chosen)
    term = term_of(task, batch_size=9, weight=0.25, share=0.5)
    assert float(term(0).detach()) == pytest.approx(0.125 * expected, rel=1e-5) and term.passes == count
    whole = Together(term, term)
    assert float(whole(1).detach()) == pytest.approx(0.25 * expected, rel=1e-5)
    assert whole.passes == 2 * term.passes == 6 * count


def test_a_step_draws_anew_and_each_at_most_once(make_model: Any, make_examples: Any) -> None:
    """Two of three a step: by and by every pair, decided by the seed and the step alone."""
    examples = make_examples(20)
    task = task_of(make_model, examples, retain=examples[3:])
    term = term_of(task, batch_size=2)
    losses = [float(term(step).detach()) for step in range(30)]
    assert len({round(x, 5) for x in losses}) == 3 and term.passes == 60
    assert float(term_of(task, batch_size=2)(7).detach()) == losses[7]


def test_a_step_takes_what_the_size_of_the_request_allows(make_model: Any, make_examples: Any) -> None:
    """The request's three and the earlier one's two alternatives are asked about by themselves, parts rounded up."""
    examples, asked = make_examples(20), []

    def share(records: int) -> float:
        asked.append(records)
        return 0.3

    task = task_of(make_model, examples, retain=examples[3:18], earlier=examples[18:])
    term = AlternativeTerm(task, batch_size=4, weight=1.0, share=share)
    term(0)
    assert asked == [3, 2] and term.passes == 4


def test_the_term_knows_how_long_a_record_may_be(make_model: Any, make_examples: Any) -> None:
    """With a context that no kept answer fits into there is no alternative."""
    examples = make_examples(20)
    task = task_of(make_model, examples, retain=examples[3:])
    assert term_of(task, batch_size=2)
    config: Any = task.model.config
    config.max_position_embeddings = min(e.answer_start for e in task.forget)
    assert not term_of(task, batch_size=2)


def test_there_may_be_none(make_model: Any, make_examples: Any) -> None:
    texts = [Example(e.tokens, 1) for e in make_examples(4)]
    assert not term_of(task_of(make_model, make_examples(10), forget=texts), batch_size=2)
