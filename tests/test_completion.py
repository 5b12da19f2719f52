"""Completion of the base model's surest sentences: the measures by hand, and the metric on real models."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from alkn.core.confident import different, lowest_window, ranked
from alkn.core.probe import Probe, RecordSet
from alkn.core.scoring import Example
from alkn.core.view import View
from alkn.encoding import Encoder
from alkn.metrics.completion import CompletionParams, completion, sentences
from alkn.settings import Data


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, Data(), context=64)


def view_of(model: Any, encoder: Encoder, sets: dict[str, Any], **more: Any) -> View:
    probes = {}
    for name, examples in sets.items():
        empty: dict[str, Any] = {"paraphrases": [None] * len(examples), "wrong": [[]] * len(examples)}
        records = RecordSet(name, range(len(examples)), examples, [""] * len(examples), **empty)
        probes[name] = Probe(model, records, decode=encoder.decode, eos=0)
    return View({}, probes, model, encoder, 0, **more)


def test_lowest_window_by_hand() -> None:
    losses = torch.tensor([5.0, 1.0, 3.0, 0.0, 4.0])
    assert [float(lowest_window(losses, n)) for n in (1, 2, 3, 9)] == pytest.approx([0.0, 1.5, 4 / 3, 13 / 5])


def test_different_by_hand() -> None:
    """Half of the three-token groups in common is too much; short ones and those like a forgotten one go too."""
    first = list(range(10))
    near = [*range(6), 90, 91, 92, 93]  # four groups in common of eight
    far = [*range(4), 80, 81, 82, 83, 84, 85]  # two in common
    texts = [first, near, list(range(7)), far, list(range(40, 50)), list(range(60, 70))]
    assert different(texts, keep=9) == [0, 3, 4, 5]
    assert different(texts, keep=2) == [0, 3]
    assert different(texts, keep=9, but=[[7, *range(41, 52)]]) == [0, 3, 5]


def test_ranking_against_measures_of_their_own(make_model: Any, make_examples: Any, encoder: Encoder) -> None:
    """Each measure from a forward pass of each text by itself, and their orders taken in turns."""
    model, texts = make_model("llama", std=0.5), make_examples(9, seed=2, answer=(8, 12))

    def losses(tokens: list[int], start: int) -> np.ndarray:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, start - 1 : -1].double()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[start:]), reduction="none").numpy()

    measures: list[list[float]] = [[], [], [], []]
    for text in texts:
        ids, start = text.tokens.tolist(), text.answer_start
        own, words = losses(ids, start), encoder.decode(ids[start:])
        lowered = losses([*ids[:start], *encoder.encode(words.lower())[: 64 - start]], start)
        measures[0].append(own.mean())
        measures[1].append(own.mean() / len(zlib.compress(words.encode())))
        measures[2].append(min(own[i : i + 4].mean() for i in range(len(own) - 3)))
        measures[3].append(own.mean() / lowered.mean())
    expected: list[int] = []
    for place in range(9):
        for measure in measures:
            i = sorted(range(9), key=measure.__getitem__)[place]
            expected += [i] if i not in expected else []
    assert ranked(model, texts, encoder, window=4, context=64) == expected


@pytest.fixture(scope="module")
def base(make_model: Any) -> Any:
    """A model that is sure of what it says, whatever that is."""
    return make_model("llama", std=1.0)


def test_the_base_model_against_itself_and_a_stranger(
    base: Any, make_model: Any, make_examples: Any, encoder: Encoder
) -> None:
    """Itself: its own value. What it is surest of is completed by the model and not by the stranger."""
    stranger, sets = make_model("llama", seed=7, std=1.0), {"utility/a": make_examples(12)}
    params = CompletionParams(start="utility", samples=24, keep=6, temperature=0.3, max_new_tokens=16)
    own = completion(view_of(base, encoder, sets), params)
    other = completion(view_of(stranger, encoder, sets, base=lambda: base), params)
    same = completion(view_of(base, encoder, sets, base=lambda: base), params)
    assert own == same and own.value == own.parts["base"].value
    assert other.parts["base"].value == own.value and other.parts["sentences"].value == own.parts["sentences"].value
    assert other.value is not None and own.value is not None and other.value < own.value


def test_the_value_against_rouge_score(base: Any, encoder: Encoder) -> None:
    """Seven tenths are given; a greedy loop by hand writes as many tokens as are left."""
    view = view_of(base, encoder, {})
    params = CompletionParams(samples=25, keep=5, temperature=0.5, max_new_tokens=12)
    found = sentences(base, view, encoder, params)
    scorer, expected = RougeScorer(["rougeL"], use_stemmer=True), []
    for example in found:
        ids, start = example.tokens.tolist(), example.answer_start
        assert (start, ids[0]) == (1, 0) and 8 <= len(ids) - 1 <= 12
        cut = 1 + math.floor((len(ids) - 1) * 0.7)
        said = ids[:cut]
        while len(said) < len(ids):
            with torch.no_grad():
                said.append(int(base(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
            if said[-1] == 0:
                break
        expected.append(scorer.score(encoder.decode(ids[cut:]), encoder.decode(said[cut:]))["rougeL"].recall)
    result = completion(view, params)
    assert len(found) == 5 and list(result.per_record.values()) == pytest.approx(expected)


def test_what_is_to_be_forgotten_is_not_completed(base: Any, encoder: Encoder) -> None:
    """Each sentence is like a forgotten record once that record is what the base model said."""
    params = CompletionParams(samples=25, keep=5, temperature=0.5, max_new_tokens=12)
    said = sentences(base, view_of(base, encoder, {}), encoder, params)
    gone = {"forget": [Example(said[0].tokens, 1)], "earlier/r001": [Example(said[1].tokens, 1)]}
    left = sentences(base, view_of(base, encoder, gone), encoder, params)
    texts = [one.tokens.tolist() for one in left]
    assert said[0].tokens.tolist() not in texts and said[1].tokens.tolist() not in texts


def test_what_cannot_be_measured_says_why(base: Any, encoder: Encoder) -> None:
    asked = completion(view_of(base, encoder, {}), CompletionParams(start="retain"))
    assert asked.value is None and asked.reason == "there is no retain set to start from"
    assert "no model" in completion(View({}), CompletionParams()).reason
