"""The report on a chain's last model: its parts are the attacks and tests themselves, and what is missing says why."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from scipy.stats import ks_2samp

from alkn import registry
from alkn.core.attack import Target
from alkn.core.probe import RecordSet
from alkn.core.scoring import Example
from alkn.core.truth_ratio import TruthRatios, truth_ratios
from alkn.final import final_report, forget_quality


def record_set(name: str, right: Sequence[Example], wrong: Sequence[Example] | None = None) -> RecordSet:
    n = len(right)
    others = [[] for _ in right] if wrong is None else [wrong[i::n] for i in range(n)]
    return RecordSet(name, list(range(n)), right, [""] * n, right if wrong else [None] * n, others)


def test_the_parts_are_the_real_ones(memorised, make_model, make_examples) -> None:
    """Attacks as called by hand; p-values as scipy's on truth ratios computed apart."""
    model, first, second = memorised.model(), make_model("llama", seed=1), make_model("llama", seed=2)
    sets = {
        "a": record_set("a", memorised.forget, make_examples(12, seed=30)),
        "b": record_set("b", memorised.second, make_examples(12, seed=31)),
    }
    references = {
        name: {request: truth_ratios(each, records) for request, records in sets.items()}
        for name, each in (("sha256:1", first), ("sha256:2", second))
    }
    attacks = {"relearning": {"steps": [0, 2], "share": 0.25}, "quantization": {"bits": [4]}}
    utility = {"general": record_set("general", memorised.retain)}
    report = final_report(model, sets, references, utility=utility, attacks=attacks)
    assert report["missing"] == {}
    target = Target(model, {"a": memorised.forget, "b": memorised.second}, {"general": memorised.retain})
    for name, values in attacks.items():
        entry = registry.attacks[name]
        assert report[name] == entry.call(target, entry.params.model_validate(values)).as_dict()
    for request, records in sets.items():
        row = report["forget_quality"][request]
        reference = references["sha256:1"][request].values
        assert row["p_value"] == pytest.approx(ks_2samp(truth_ratios(model, records).values, reference).pvalue)
        honest = ks_2samp(references["sha256:2"][request].values, reference).pvalue
        assert row["honest"] == {"sha256:2": pytest.approx(honest)}
        assert row["against"] == "sha256:1" and row["mode"] == "exact" and row["records"] == 6
    json.dumps(report, allow_nan=False)


def test_a_model_that_knows_is_told_from_one_that_does_not(memorised, make_model, make_examples) -> None:
    records = record_set("a", [*memorised.forget, *memorised.second], make_examples(24, seed=30))
    fresh, other = (truth_ratios(make_model("llama", seed=seed), records) for seed in (1, 2))
    knows, _ = forget_quality({"a": truth_ratios(memorised.model(), records)}, {"r": {"a": fresh}})
    itself, _ = forget_quality({"a": fresh}, {"r": {"a": fresh}, "s": {"a": other}})
    assert knows["a"]["p_value"] < 1e-4
    assert itself["a"]["p_value"] == 1.0 and itself["a"]["honest"]["s"] > 0.01


def test_what_cannot_be_computed_says_why(memorised) -> None:
    report = final_report(
        memorised.model(), {"a": record_set("a", memorised.forget[:1])}, {}, attacks={"relearning": {}}
    )
    assert set(report) == {"missing"}
    assert report["missing"]["forget_quality"] == "there is no reference model"
    assert "no record is left" in report["missing"]["relearning"]
    some, none = TruthRatios({0: 1.0}), TruthRatios({}, {0: "no perturbed_answer"})
    endless = TruthRatios({0: float("inf")})
    found, missing = forget_quality({"a": none, "b": some, "c": some}, {"r": {"a": none, "b": some, "c": endless}})
    assert set(found) == {"b"}
    assert missing["forget_quality.a"].startswith("the model: no record has both")
    assert missing["forget_quality.c"] == "r: a truth ratio is not a finite number"
