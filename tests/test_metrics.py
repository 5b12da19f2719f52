"""Metrics next to calculations of their own: by hand, numpy, scipy, a longest common subsequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import gmean, hmean
from torch import nn

from alkn.core.measured import Measured
from alkn.core.probe import Probe, RecordSet
from alkn.core.scoring import Example
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.core.view import View
from alkn.encoding import Encoder
from alkn.metrics.extraction_strength import strength
from alkn.models import Architecture, new_model
from alkn.registry import metrics
from alkn.settings import Data


def measure(name: str, *arguments: Any) -> Measured:
    result = metrics[name].call(*arguments, metrics[name].params())
    assert isinstance(result, Measured)
    return result


def probe_of(model: nn.Module, examples: Sequence[Example], *, name: str = "forget", **more: Any) -> Probe:
    empty: dict[str, Any] = {
        "ids": range(len(examples)),
        "references": [""] * len(examples),
        "paraphrases": [None] * len(examples),
        "wrong": [[]] * len(examples),
    }
    return Probe(model, RecordSet(name, examples=examples, **empty | more), decode=str, eos=0)


# Measured


def test_mean_over_records_by_hand() -> None:
    """The examples of one record are averaged first: (1 + 3) / 2 and 8 give 5, not 4."""
    result = Measured.mean([7, 7, 2], [1.0, 3.0, 8.0])
    assert (result.value, result.reason, dict(result.per_record)) == (5.0, "", {7: 2.0, 2: 8.0})


def test_mean_and_percentiles_against_numpy() -> None:
    """Random groups; a tensor in single precision is averaged in double."""
    generator = np.random.default_rng(0)
    ids, values = generator.integers(0, 9, 50), generator.random(50, dtype=np.float32)
    result = Measured.mean(ids.tolist(), torch.tensor(values))
    groups = [values[ids == i].astype(np.float64).mean() for i in np.unique(ids)]
    assert result.value == pytest.approx(np.mean(groups), rel=1e-12)
    for q in (0, 5, 37.5, 50, 95, 100):
        assert result.percentile(q) == pytest.approx(np.percentile(groups, q), rel=1e-12)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_a_value_that_is_no_number_is_a_reason(bad: list[float]) -> None:
    values = [0.5, *bad]
    result = Measured.mean(range(len(values)), values)
    assert result.value is None and result.reason == "a value is not a finite number" and not result.per_record


def test_every_value_belongs_to_a_record() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        Measured.mean([1, 2], [0.5])


# What teacher forcing says


def test_probability_against_full_forwards(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """The mean over records, where the first two examples are one record."""
    model, examples = make_model("llama", std=0.3), make_examples(4)
    result = measure("probability", probe_of(model, examples, ids=[5, 5, 6, 9]))
    with torch.no_grad():
        p = [math.exp(-full_forward(model, e)[0].mean()) for e in examples]
    assert result.per_record == pytest.approx({5: (p[0] + p[1]) / 2, 6: p[2], 9: p[3]}, rel=1e-4)
    assert result.value == pytest.approx(((p[0] + p[1]) / 2 + p[2] + p[3]) / 3, rel=1e-4)


@pytest.fixture(scope="module")
def hits_by_hand(make_model: Any) -> tuple[nn.Module, list[Example]]:
    """Answers in which a 1 is the model's own first choice and a 0 is not."""
    model = make_model("llama", std=0.3)
    examples = []
    for number, pattern in enumerate(([1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0], [1, 0, 1, 1])):
        tokens = [40 + number, 20]
        for hit in pattern:
            with torch.no_grad():
                choice = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(choice if hit else (choice + 1) % 300)
        examples.append(Example(torch.tensor(tokens), 2))
    return model, examples


def test_exact_memorization_by_hand(hits_by_hand: tuple[nn.Module, list[Example]]) -> None:
    result = measure("exact_memorization", probe_of(*hits_by_hand))
    assert result.per_record == pytest.approx({0: 1.0, 1: 0.6, 2: 0.0, 3: 0.75})
    assert result.value == pytest.approx((1.0 + 0.6 + 0.0 + 0.75) / 4)


def test_extraction_strength_by_hand(hits_by_hand: tuple[nn.Module, list[Example]]) -> None:
    """1 − prefix / length with the shortest prefix after which all is right: 0, 4 of 5, 2 of 2, 2 of 4."""
    result = measure("extraction_strength", probe_of(*hits_by_hand))
    assert result.per_record == pytest.approx({0: 1.0, 1: 0.2, 2: 0.0, 3: 0.5})
    assert result.value == pytest.approx((1.0 + 0.2 + 0.0 + 0.5) / 4)


def test_strength_of_all_short_patterns() -> None:
    """By trying every prefix of every pattern of up to six tokens."""
    for length in range(1, 7):
        for pattern in itertools.product([False, True], repeat=length):
            shortest = next(k for k in range(length + 1) if all(pattern[k:]))
            assert strength(torch.tensor(pattern)) == pytest.approx(1 - shortest / length)


# Truth ratio


@pytest.fixture(scope="module")
def judged(make_model: Any, make_examples: Any) -> dict[str, Any]:
    """Five records with 2 to 4 wrong answers each; two have no paraphrase."""
    pool = make_examples(40, seed=3)
    counts = [2, 3, 4, 2, 3]
    starts = [5 + sum(counts[:i]) for i in range(5)]
    return {
        "model": make_model("llama", std=1.0),
        "examples": pool[:5],
        "paraphrases": [pool[30], None, pool[31], None, pool[32]],
        "wrong": [pool[start : start + count] for start, count in zip(starts, counts, strict=True)],
    }


def ratios(judged: dict[str, Any], full_forward: Any) -> np.ndarray:
    """Geometric mean of the wrong answers' P over P of the paraphrase (or the answer itself)."""

    def p(example: Example) -> float:
        with torch.no_grad():
            return math.exp(-full_forward(judged["model"], example)[0].double().mean())

    right = [p(b or a) for a, b in zip(judged["examples"], judged["paraphrases"], strict=True)]
    wrong = [np.prod([p(e) for e in group]) ** (1 / len(group)) for group in judged["wrong"]]
    return np.array(wrong) / np.array(right)


@pytest.mark.parametrize("name", ["forget", "earlier/r001", "utility/facts", "retain/facts", "holdout"])
def test_truth_ratio_against_numpy(name: str, judged: dict[str, Any], full_forward: Any) -> None:
    """min(R, 1/R) where forgetting is wanted, max(0, 1 − R) elsewhere."""
    ratio = ratios(judged, full_forward)
    assert ratio.min() < 1 < ratio.max(), "both branches are needed"
    forgotten = name.split("/")[0] in ("forget", "earlier")
    expected = np.minimum(ratio, 1 / ratio) if forgotten else np.maximum(0, 1 - ratio)
    result = measure("truth_ratio", probe_of(judged["model"], judged["examples"], name=name, **{
        key: judged[key] for key in ("paraphrases", "wrong")
    }))  # fmt: skip
    assert list(result.per_record.values()) == pytest.approx(expected.tolist(), rel=1e-3)
    assert result.value == pytest.approx(expected.mean(), rel=1e-3)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_both_means_and_the_bounded_form_against_numpy(mean: str, judged: dict[str, Any], full_forward: Any) -> None:
    """P(right) / (P(right) + P(wrong)), the wrong answers' P averaged by its logarithm or as it is."""

    def p(example: Example) -> float:
        with torch.no_grad():
            return math.exp(-full_forward(judged["model"], example)[0].double().mean())

    right = np.array([p(b or a) for a, b in zip(judged["examples"], judged["paraphrases"], strict=True)])
    groups = [[p(e) for e in group] for group in judged["wrong"]]
    wrong = np.array([gmean(group) if mean == "geometric" else np.mean(group) for group in groups])
    probe = probe_of(judged["model"], judged["examples"], paraphrases=judged["paraphrases"], wrong=judged["wrong"])
    result = metrics["truth_ratio"].call(probe, metrics["truth_ratio"].params(mean=mean))
    assert list(result.per_record.values()) == pytest.approx(np.minimum(wrong / right, right / wrong), rel=1e-3)
    bounded = result.parts["prob_mean"]
    assert list(bounded.per_record.values()) == pytest.approx(right / (right + wrong), rel=1e-3)
    assert bounded.value == pytest.approx(np.mean(right / (right + wrong)), rel=1e-3)


def test_truth_ratio_without_wrong_answers_is_missing(judged: dict[str, Any]) -> None:
    """One record without them is enough."""
    wrong = [*judged["wrong"][:4], []]
    probe = probe_of(judged["model"], judged["examples"], paraphrases=judged["paraphrases"], wrong=wrong)
    result = measure("truth_ratio", probe)
    assert result.value is None and "perturbed_answer" in result.reason


# ROUGE-L

TOLD = {"cat?": "red cat and dog run far", "sun?": "we sat in the sun", "map?": "old map"}


@pytest.fixture(scope="module")
def writer(tokenizer: Any) -> tuple[nn.Module, Encoder]:
    """A tiny model that has learnt to answer three questions word by word."""
    architecture = Architecture(hidden_size=32, intermediate_size=64, layers=2, heads=4, vocab_size=300, context=64)
    model = new_model(architecture, vocab_size=300, eos_token_id=tokenizer.eos_token_id, seed=0)
    encoder = Encoder(tokenizer, Data(), context=64)
    records = [{"id": i, "question": q, "answer": a} for i, (q, a) in enumerate(TOLD.items())]
    hp = Hyperparameters(lr=1e-2, epochs=150, batch_size=3)
    fine_tune(
        model,
        encoder.examples("told", records),
        hp,
        loss=answer_loss(),
        generator=torch.Generator().manual_seed(0),
    )
    return model, encoder


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook recursion."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + common(a[:-1], b[:-1])
    return max(common(a[:-1], b), common(a, b[:-1]))


def asked(writer: tuple[nn.Module, Encoder], references: Sequence[str], *, generate: bool = True) -> Probe:
    model, encoder = writer
    records = [{"id": i, "question": q, "answer": a} for i, (q, a) in enumerate(zip(TOLD, references, strict=True))]
    return Probe(
        model,
        encoder.record_set("forget", records),
        decode=encoder.decode,
        eos=0,
        max_new_tokens=30 if generate else None,
    )


def test_the_writer_answers_as_it_was_told(writer: tuple[nn.Module, Encoder]) -> None:
    """Encoding, greedy decoding and decoding to text together."""
    assert [text.strip() for text in asked(writer, list(TOLD.values())).generations or ()] == list(TOLD.values())


def test_rouge_l_recall_against_an_own_lcs(writer: tuple[nn.Module, Encoder]) -> None:
    """Common words in order over the words of the reference, so that long answers are not punished."""
    references = ["the red dog and a cat run", "sun the in sat we", "an old torn map was not here"]
    expected = [
        common(r.split(), told.split()) / len(r.split()) for r, told in zip(references, TOLD.values(), strict=True)
    ]
    assert expected == pytest.approx([3 / 7, 1 / 5, 2 / 7])
    result = measure("rouge_l", asked(writer, references))
    assert list(result.per_record.values()) == pytest.approx(expected)
    assert result.value == pytest.approx(np.mean(expected))


def test_rouge_l_looks_at_stems_not_at_case_and_points(writer: tuple[nn.Module, Encoder]) -> None:
    """Dogs are dog, RUNNING is run; nothing in common is 0."""
    result = measure("rouge_l", asked(writer, ["Red CATS, and dogs running far!", "no", "Old maps."]))
    assert list(result.per_record.values()) == pytest.approx([1.0, 0.0, 1.0])


def test_rouge_l_where_nothing_is_written_is_missing(writer: tuple[nn.Module, Encoder]) -> None:
    result = measure("rouge_l", asked(writer, list(TOLD.values()), generate=False))
    assert result.value is None and "evaluation.generate" in result.reason


# Model utility


def domains(values: Sequence[Sequence[float]]) -> dict[str, dict[str, Measured]]:
    parts = ("probability", "rouge_l", "truth_ratio")
    return {
        f"domain{i}": {part: Measured(v) for part, v in zip(parts, row, strict=True)} for i, row in enumerate(values)
    }


def utility_of(given: dict[str, dict[str, Measured]]) -> Measured:
    """Beside sets that do not count."""
    others = {"forget": {"probability": Measured(0.0)}, "retain/domain0": {"rouge_l": Measured.missing("not asked")}}
    return measure("model_utility", View({f"utility/{name}": row for name, row in given.items()} | others))


def test_model_utility_against_scipy() -> None:
    """Harmonic mean of all nine numbers of three domains; other metrics do not count."""
    values = np.random.default_rng(1).uniform(0.05, 1, (3, 3))
    given = domains(values.tolist())
    given["domain0"]["exact_memorization"] = Measured(0.0)
    assert utility_of(given).value == pytest.approx(hmean(values.reshape(-1)), rel=1e-12)


def test_model_utility_is_zero_where_one_part_is() -> None:
    assert utility_of(domains([[0.9, 0.9, 0.9], [0.9, 0.0, 0.9]])).value == 0.0


def test_model_utility_says_what_is_missing() -> None:
    """A part without a value, a part that is not measured, no domain at all."""
    given = domains([[0.9, 0.9, 0.9], [0.9, 0.9, 0.9]])
    given["domain1"]["rouge_l"] = Measured.missing("evaluation.generate does not name this set")
    result = utility_of(given)
    assert result.value is None and result.reason.startswith("domain1: rouge_l: evaluation.generate")
    del given["domain1"]["rouge_l"]
    assert utility_of(given).reason == "evaluation.metrics does not name rouge_l"
    assert utility_of({}).reason == "there is no utility set"


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_the_perplexity_of_a_broken_model_is_missing(weight: float, make_model: Any, make_examples: Any) -> None:
    """exp of what is no number raises nothing; a number that is none has a reason instead."""
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(weight)
    found = measure("perplexity", probe_of(model, make_examples(3), name="utility/facts"))
    assert found.value is None and found.reason == "a value is not a finite number"
