"""Metrics of what the model writes, next to rouge-score itself, to counting, and to a bigram table of their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from alkn.core.measured import Measured
from alkn.core.probe import Probe, RecordSet
from alkn.core.scoring import Example
from alkn.core.view import View
from alkn.encoding import Encoder
from alkn.metrics.knowmem import before_stop
from alkn.metrics.repetition import repeated
from alkn.models import Architecture, new_model
from alkn.registry import metrics
from alkn.settings import Data


class Parrot(Probe):
    """A probe whose model says what it is told to; all else is real."""

    def __init__(self, records: RecordSet, answers: Sequence[str], encoder: Encoder, model: Any, **more: Any) -> None:
        super().__init__(model, records, decode=encoder.decode, eos=0, **{"max_new_tokens": 9} | more)
        self.answers, self.encoder, self.asked = list(answers), encoder, []

    def write(self, prompts: Sequence[torch.Tensor], *, max_new_tokens: int | None = None) -> list[list[int]]:
        self.asked.append(([p.tolist() for p in prompts], max_new_tokens))
        return [self.encoder.encode(answer) for answer in self.answers]


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, Data(), context=64)


@pytest.fixture(scope="module")
def model() -> Any:
    architecture = Architecture(hidden_size=16, intermediate_size=32, layers=1, heads=2, vocab_size=300, context=64)
    return new_model(architecture, vocab_size=300, eos_token_id=0, seed=0)


TRUTHS = ["the baker lives in the small house", "red cat and dog", "far away"]
SAID = ["the baker sleeps in a house", "", "far away far away far away far away"]


def told(encoder: Encoder, model: Any, answers: Sequence[str] = SAID, **more: Any) -> Parrot:
    rows = [{"id": i, "question": f"what is {i}?", "answer": text} for i, text in enumerate(TRUTHS)]
    return Parrot(encoder.record_set("forget", rows), answers, encoder, model, **more)


def measure(name: str, of: Any, **params: Any) -> Measured:
    result = metrics[name].call(of, metrics[name].params.model_validate(params))
    assert isinstance(result, Measured)
    return result


def rouge(truth: str, said: str) -> Any:
    return RougeScorer(["rougeL"], use_stemmer=False).score(truth, said)["rougeL"]


def test_knowmem_against_rouge_score(encoder: Encoder, model: Any) -> None:
    """F1 and recall, no stems; what comes after the model's own next question does not count."""
    answers = [*SAID[:2], SAID[2] + "\nQuestion: who?\nAnswer: far"]
    result = measure("knowmem", told(encoder, model, answers))
    scores = [rouge(truth, said) for truth, said in zip(TRUTHS, SAID, strict=True)]
    assert list(result.per_record.values()) == pytest.approx([one.fmeasure for one in scores])
    assert result.parts["recall"].value == pytest.approx(np.mean([one.recall for one in scores]))
    assert scores[0].fmeasure == pytest.approx(2 * 4 / (7 + 6)), "the, baker, in, house of 7 and 6 words"
    assert [before_stop(t) for t in ("a\n\nb", "Question: x", "a b", "x\nQuestion y")] == ["a", "", "a b", "x"]


def test_knowmem_needs_a_question(encoder: Encoder, model: Any) -> None:
    probe = Parrot(encoder.record_set("forget", [{"id": 0, "text": "a small house"}]), ["x"], encoder, model)
    assert "no question" in measure("knowmem", probe).reason


@pytest.mark.parametrize(("given", "limit"), [(3, 5), (100, 128), (0, 2)])
def test_verbmem_against_rouge_score(given: int, limit: int, encoder: Encoder, model: Any) -> None:
    """The model gets the question and the answer's first tokens, and is compared on as many as it may write."""
    probe = told(encoder, model)
    result = measure("verbmem", probe, given=given, max_new_tokens=limit)
    ((prompts, longest),) = probe.asked
    assert longest == limit
    for i, example in enumerate(probe.records.examples):
        ids = example.tokens.tolist()
        cut = example.answer_start + min(given, (len(ids) - example.answer_start - 1) // 2)
        assert prompts[i] == ids[:cut]
        truth = encoder.decode(ids[cut : cut + limit])
        assert result.per_record[i] == pytest.approx(rouge(truth, SAID[i]).fmeasure)


def test_verbmem_of_a_text_that_is_known_by_heart(memorised: Any) -> None:
    """With a real model: it goes on as it learnt, and the word is the token's number."""
    empty: dict[str, Any] = {"references": [""] * 6, "paraphrases": [None] * 6, "wrong": [[]] * 6}
    records = RecordSet("forget", ids=range(6), examples=memorised.forget, **empty)
    words = {"decode": lambda ids: " ".join(f"w{i}" for i in ids if i), "eos": 0}
    probe = Probe(memorised.model(), records, max_new_tokens=9, **words)
    assert measure("verbmem", probe, given=2).value == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["knowmem", "verbmem", "repetition"])
def test_where_nothing_is_written_the_reason_is_told(name: str, encoder: Encoder, model: Any) -> None:
    assert "evaluation.generate" in measure(name, told(encoder, model, max_new_tokens=None)).reason


def test_repetition_by_counting(encoder: Encoder, model: Any) -> None:
    """far away four times: of 7 pairs 2 are different; of 14 words in all 8 are different; one answer is empty."""
    result = measure("repetition", told(encoder, model), n=2)
    assert list(result.per_record.values()) == pytest.approx([0.0, 0.0, 1 - 2 / 7])
    assert result.parts["distinct"].value == pytest.approx(8 / 14)
    assert result.parts["empty"].value == pytest.approx(1 / 3)
    assert repeated("a b c".split(), 4) == 0.0 and repeated("a a a a a".split(), 4) == 0.5
    assert measure("repetition", told(encoder, model, ["", "", ""])).parts["distinct"].value is None


def test_who_is_stuck_in_a_syllable_repeats_tokens(encoder: Encoder, model: Any) -> None:
    """One word of forty letters has no group of words, but few different groups of tokens; counted by hand."""
    said = ["z" * 40, "red cat and dog", ""]
    result = measure("repetition", told(encoder, model, said))
    assert result.value == 0.0
    shares = []
    for tokens in map(encoder.encode, said):
        groups = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        shares.append(1 - len({*groups}) / len(groups) if groups else 0.0)
    assert shares[0] > 0.5 > shares[1] == shares[2] == 0.0
    assert list(result.parts["tokens"].per_record.values()) == pytest.approx(shares)


def test_gibberish_against_an_own_bigram_table(encoder: Encoder, model: Any) -> None:
    """Witten-Bell by hand over the retain answers; the language of the answers is less surprising than noise."""
    rows = [{"id": i, "question": "what?", "answer": text} for i, text in enumerate([*TRUTHS, "in the house"])]
    kept = Probe(model, encoder.record_set("retain/a", rows), decode=encoder.decode, eos=0)
    probe = told(encoder, model)
    result = measure("gibberish", View({}, {"forget": probe, "retain/a": kept}))

    counts: dict[int, Counter[int]] = {}
    single: Counter[int] = Counter()
    for example in kept.records.examples:
        tokens = example.tokens.tolist()[example.answer_start - 1 :]
        for before, token in zip(tokens, tokens[1:], strict=False):
            counts.setdefault(before, Counter())[token] += 1
            single[token] += 1

    def loss(before: int, token: int) -> float:
        alone, after = (single[token] + 1) / (single.total() + 300), counts.get(before, Counter())
        return -math.log((after[token] + len(after) * alone) / (after.total() + len(after)) if after else alone)

    def surprise(example: Example, answer: list[int]) -> float:
        tokens = [int(example.tokens[example.answer_start - 1]), *answer]
        return float(np.mean([loss(v, w) for v, w in zip(tokens, tokens[1:], strict=False)]))

    examples = probe.records.examples
    expected = {i: surprise(examples[i], encoder.encode(SAID[i])) for i in (0, 2)}
    assert dict(result.per_record) == pytest.approx(expected)
    right = [surprise(e, e.tokens[e.answer_start : -1].tolist()) for e in examples]
    assert result.parts["right"].value == pytest.approx(np.mean(right))
    noise = measure("gibberish", View({}, {"forget": told(encoder, model, ["zq xv", "kk@", "q7"]), "retain/a": kept}))
    assert noise.value > 1.5 * result.parts["right"].value


def test_gibberish_says_what_it_lacks(encoder: Encoder, model: Any) -> None:
    probe, silent = told(encoder, model), told(encoder, model, ["", "", ""])
    kept = Probe(model, probe.records, decode=encoder.decode, eos=0)
    for probes, reason in (
        ({}, "no forget set"),
        ({"forget": probe}, "no retain set"),
        ({"forget": kept, "retain/a": kept}, "evaluation.generate"),
        ({"forget": silent, "retain/a": kept}, "empty"),
    ):
        assert reason in measure("gibberish", View({}, probes)).reason
