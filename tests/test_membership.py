"""Membership attacks, PrivLeak and forget quality, on a model that knows its records and one that never saw them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from torch import nn

from alkn.core.measured import Measured
from alkn.core.probe import Probe, RecordSet, References
from alkn.core.scoring import Example
from alkn.registry import metrics

FREE = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm")


def measure(name: str, probe: Probe, **params: Any) -> Measured:
    entry = metrics[name]
    result = entry.call(probe, entry.params.model_validate(params))
    assert isinstance(result, Measured)
    return result


def records(name: str, examples: Sequence[Example], **more: Any) -> RecordSet:
    empty: dict[str, Any] = {
        "ids": range(len(examples)),
        "references": [f"answer {i}" * (i + 1) for i in range(len(examples))],
        "paraphrases": [None] * len(examples),
        "wrong": [[]] * len(examples),
    }
    return RecordSet(name, examples=examples, **empty | more)


def probe_of(model: nn.Module, name: str, examples: Sequence[Example], **more: Any) -> Probe:
    passed = {key: more.pop(key) for key in ("holdout", "references") if key in more}
    return Probe(model, records(name, examples, **more), decode=str, eos=0, **passed)


@pytest.fixture(scope="module")
def compared(memorised: Any, make_model: Any, make_examples: Any) -> Probe:
    """Six records known by heart, seven that nobody saw, and a reference that saw none of them."""
    unseen, model = make_examples(7, seed=8), memorised.model()
    stranger = make_model("llama", seed=4, std=0.3)
    reference = probe_of(stranger, "forget", memorised.forget, holdout=probe_of(stranger, "holdout", unseen))
    return probe_of(
        model,
        "forget",
        memorised.forget,
        holdout=probe_of(model, "holdout", unseen),
        references=lambda: References({"sha256:one": reference}),
    )


def log_probs(model: nn.Module, examples: Sequence[Example], full_forward: Any) -> list[np.ndarray]:
    with torch.no_grad():
        return [-full_forward(model, example)[0].double().numpy() for example in examples]


def lowest(values: np.ndarray, share: float) -> float:
    return float(np.sort(values)[: max(1, int(len(values) * share))].mean())


@pytest.mark.parametrize("name", FREE)
def test_the_auc_of_the_records_scores_against_scikit_learn(name: str, compared: Probe) -> None:
    """A model that knows them gives them away; the value is the mean score, and the same call gives the same."""
    result, others = measure(name, compared), measure(name, compared.holdout)
    scores = [*result.per_record.values(), *others.per_record.values()]
    labels = [1] * len(result.per_record) + [0] * len(others.per_record)
    parts = {part: value.value for part, value in result.parts.items()}
    assert parts["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert parts["auc"] > 0.9 and parts["auc_low"] <= parts["auc"] <= parts["auc_high"]
    assert result.value == pytest.approx(np.mean(list(result.per_record.values())), rel=1e-12)
    assert measure(name, compared) == result and not others.parts


def test_scores_by_hand(compared: Probe, full_forward: Any) -> None:
    """LOSS, zlib and Min-K % from single forward passes."""
    logs = log_probs(compared.model, compared.records.examples, full_forward)
    texts = compared.records.references
    expected = {
        "loss": [float(each.mean()) for each in logs],
        "zlib": [float(each.sum()) / len(zlib.compress(t.encode())) for each, t in zip(logs, texts, strict=True)],
    }
    for name, values in expected.items():
        assert list(measure(name, compared).per_record.values()) == pytest.approx(values, rel=1e-3, abs=1e-5)
    for share in (0.2, 0.6, 1.0):
        values = list(measure("min_k", compared, share=share).per_record.values())
        assert values == pytest.approx([lowest(each, share) for each in logs], rel=1e-3, abs=1e-5)


def test_a_model_that_never_saw_the_records_is_at_chance(make_model: Any, make_examples: Any) -> None:
    """The interval holds one half, for each attack."""
    model = make_model("llama", std=0.3)
    holdout = probe_of(model, "holdout", make_examples(40, seed=12))
    probe = probe_of(model, "forget", make_examples(40, seed=11), holdout=holdout)
    for name in FREE[:4]:
        parts = measure(name, probe, confidence=0.999).parts
        assert (parts["auc_low"].value or 1) <= 0.5 <= (parts["auc_high"].value or 0), name


@pytest.mark.parametrize("name", FREE)
def test_without_a_holdout_the_auc_says_so(name: str, memorised: Any) -> None:
    result = measure(name, probe_of(memorised.model(), "forget", memorised.forget))
    assert result.value is not None and result.parts["auc"].value is None
    assert "no holdout" in result.parts["auc"].reason


def test_the_reference_attack_by_hand(compared: Probe, full_forward: Any) -> None:
    """Difference of the mean log-probabilities; here both models cut the texts into the same tokens."""
    result, reference = measure("reference_loss", compared), compared.references.first
    values = {}
    for name, probe in (("forget", compared), ("holdout", compared.holdout)):
        pair = [log_probs(one.model, probe.records.examples, full_forward) for one in (probe, reference)]
        values[name] = [float(own.mean() - theirs.mean()) for own, theirs in zip(*pair, strict=True)]
    assert list(result.per_record.values()) == pytest.approx(values["forget"], rel=1e-3)
    expected = roc_auc_score([1] * 6 + [0] * 7, values["forget"] + values["holdout"])
    assert result.parts["auc"].value == pytest.approx(expected, abs=1e-12)


def test_privleak_by_hand(compared: Probe, full_forward: Any) -> None:
    """MUSE's labels: the holdout counts as members, so a model that knows the records is at −100 %."""
    found = []
    for model in (compared.model, compared.references.first.model):
        forget, holdout = (
            [lowest(each, 0.4) for each in log_probs(model, probe.records.examples, full_forward)]
            for probe in (compared, compared.holdout)
        )
        found.append(roc_auc_score([0] * len(forget) + [1] * len(holdout), forget + holdout))
    result = measure("privleak", compared)
    assert result.value == pytest.approx((found[0] - found[1]) / found[1] * 100, abs=1e-9)
    assert result.value == -100 and result.parts["auc"].value == 0
    assert result.parts["auc_reference"].value == pytest.approx(found[1], abs=1e-12)


@pytest.mark.parametrize("name", ["reference_loss", "privleak", "forget_quality"])
def test_without_a_reference_the_reason_is_told(name: str, memorised: Any) -> None:
    probe = probe_of(
        memorised.model(), "forget", memorised.forget, references=lambda: References(reason="none is named")
    )
    result = measure(name, probe)
    assert result.value is None and result.reason == "none is named"


def test_forget_quality_against_scipy(make_model: Any, make_examples: Any) -> None:
    """Truth ratios under the model and two references; the second reference shows what an honest model gets."""
    pool = make_examples(48, seed=3)
    more = {
        "paraphrases": pool[8:16],
        "wrong": [pool[16 + 4 * i : 20 + 4 * i] for i in range(8)],
    }
    models = [make_model("llama", seed=seed, std=1.0) for seed in (0, 1, 2)]
    own, first, second = [probe_of(model, "forget", pool[:8], **more) for model in models]
    probe = probe_of(
        models[0], "forget", pool[:8], **more, references=lambda: References({"sha256:a": first, "sha256:b": second})
    )
    result = measure("forget_quality", probe)
    ratios = [
        [
            float(torch.exp(right.double() - wrong.double().mean()))
            for right, wrong in zip(one.paraphrase_nll, one.wrong_nll, strict=True)
        ]
        for one in (own, first, second)
    ]
    parts = {name: part.value for name, part in result.parts.items()}
    assert list(result.per_record.values()) == pytest.approx(ratios[0], rel=1e-9)
    assert list(result.parts["reference"].per_record.values()) == pytest.approx(ratios[1], rel=1e-9)
    assert result.value == pytest.approx(ks_2samp(ratios[0], ratios[1]).pvalue, rel=1e-12)
    assert parts["honest_1"] == pytest.approx(ks_2samp(ratios[2], ratios[1]).pvalue, rel=1e-12)
    assert parts["statistic"] == pytest.approx(ks_2samp(ratios[0], ratios[1]).statistic, rel=1e-12)
    assert parts["log10"] == pytest.approx(np.log10(result.value)) and parts["records"] == 8


def test_forget_quality_without_wrong_answers(compared: Probe) -> None:
    result = measure("forget_quality", compared)
    assert result.value is None and "wrong answers" in result.reason


def test_what_is_attacked() -> None:
    """Utility and retain sets are no candidates: nobody asked to have them forgotten."""
    for name in (*FREE, "privleak", "reference_loss", "forget_quality"):
        assert metrics[name].looks_at("forget") and metrics[name].looks_at("earlier/r001")
        assert not metrics[name].looks_at("utility/facts") and not metrics[name].looks_at("retain/facts")
