"""Attacks as part of a step: what is written, from which model, over which records, and the gate on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from alkn import registry
from alkn.attacking import attack_stored, run_attacks
from alkn.core.attack import Target
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import digest_of, read_json, read_jsonl
from alkn.gates.robustness import RobustnessParams
from alkn.models import context_length, load_model, load_tokenizer
from alkn.project import Project
from alkn.record_sets import by_domain, load_split
from alkn.settings import Settings, load_settings, validate_settings
from alkn.step import make_step

Make = Callable[..., Project]
SHORT = {"name": "gradient_ascent", "steps": 2}
"""Enough for a model that differs from its parent; such a step is rejected, and judged all the same."""


@pytest.fixture(scope="module")
def tiny_settings(tiny_values: dict[str, Any]) -> Callable[..., Settings]:
    def settings(**changes: Any) -> Settings:
        from pathlib import Path

        return validate_settings({**tiny_values, **changes}, Path("params.yaml"))

    return settings


def test_the_step_writes_what_the_attacks_say_of_its_stored_model(tiny_project: Make) -> None:
    """Both requests, utility by domain, the model read back; made again: the same bytes; nothing else is touched."""
    project = tiny_project("r001", "r002", method=SHORT)
    make_step(project, "r001", previous="base", earlier=())
    sealed = make_step(project, "r002", previous="r001", earlier=("r001",))
    step = project.step("r002")
    assert sealed.manifest["outputs"]["attacks.json"] == digest_of(step.attacks)
    settings = load_settings(step.params)
    encoder = Encoder(load_tokenizer(step.model), settings.data, context=context_length(step.model))
    target = Target(
        load_model(step.model),
        {name: encoder.examples(name, read_jsonl(project.request(name))) for name in ("r001", "r002")},
        {name: encoder.examples(name, rows) for name, rows in by_domain(load_split(project, "utility")).items()},
    )
    found = read_json(step.attacks)
    for name, params in settings.attacks.items():
        assert found[name] == json.loads(json.dumps(registry.attacks[name].call(target, params).as_dict())), name
    assert set(found["relearning"]["points"][0]["requests"]) == {"r001", "r002"}
    before = digest_of(step.folder)
    again = attack_stored(project, step, ("r001", "r002"), settings)
    assert json.dumps(again) == json.dumps(found) and digest_of(step.folder) == before
    for request in ("r001", "r002"):
        for record in read_jsonl(project.request(request)):
            assert record["answer"] not in step.attacks.read_text()


def test_switched_off(tiny_project: Make, tiny_settings: Callable[..., Settings]) -> None:
    project = tiny_project()
    found = attack_stored(project, project.base, ("r001",), tiny_settings(attacks={}))
    assert found == {"missing": dict.fromkeys(registry.attacks, "switched off in the settings")}
    found = attack_stored(project, project.base, ("r001",), tiny_settings(attacks={"quantization": None}))
    assert list(found) == ["quantization", "missing"] and "relearning" in found["missing"]
    assert [point["at"] for point in found["quantization"]["points"]] == [32, 8, 4]


def test_settings(tiny_settings: Callable[..., Settings]) -> None:
    assert {k: v.model_dump() for k, v in tiny_settings(attacks={"relearning": {"lr": 1}}).attacks.items()} == {
        "relearning": {**registry.attacks["relearning"].params().model_dump(), "lr": 1.0}
    }
    for wrong, said in (
        ({"relearnig": {}}, r"attacks.relearnig: unknown attack 'relearnig'. Did you mean 'relearning'\?"),
        ({"relearning": {"lrr": 1}}, r"attacks.relearning.lrr: unknown key 'lrr'"),
        ({"quantization": {"bits": [4, 8]}}, "attacks.quantization.bits: expected numbers of bits"),
        (None, "attacks: expected a mapping"),
        ({"quantization": False}, "attacks.quantization"),
    ):
        with pytest.raises(InputError, match=said):
            tiny_settings(attacks=wrong)


def test_a_number_that_is_not_finite_is_no_curve(memorised: Any) -> None:
    model = memorised.model()
    model.get_parameter("model.norm.weight").data.fill_(float("nan"))
    target = Target(model, {"a": memorised.forget})
    found = run_attacks(target, {"quantization": registry.attacks["quantization"].params()})
    assert found == {"missing": {"quantization": "a number at 32 bits is not finite"}}


def curve(*points: tuple[int, dict[str, float]], missing: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "unit": "steps",
        "points": [
            {"at": at, "requests": {n: {"probability": p, "exact_memorization": p / 2} for n, p in requests.items()}}
            for at, requests in points
        ],
        "missing": missing or {},
    }


CURVE = curve((0, {"r001": 0.01, "r002": 0.02}), (5, {"r001": 0.03, "r002": 0.3}), (9, {"r001": 0.1, "r002": 0.2}))
HALF = curve((0, {"a": 0.1}), missing={"b": "why"})


@pytest.mark.parametrize(
    ("params", "attacks", "passed", "said"),
    [
        ({}, {"relearning": CURVE}, None, "there is no limit"),
        ({"enabled": True}, {"relearning": CURVE}, False, "there is no limit"),
        ({"probability": {"relearning": 0.3}}, {"relearning": CURVE}, True, ""),
        ({"probability": {"relearning": 0.29}}, {"relearning": CURVE}, False, "worst: r002 at 5 steps 0.3, limit 0.29"),
        ({"exact_memorization": {"relearning": 0.1}}, {"relearning": CURVE}, False, "exact memorization after relea"),
        ({"probability": {"quantization": 1.0}}, {"relearning": CURVE}, False, "quantization could not be computed"),
        ({"probability": {"relearning": 1.0}}, {"missing": {"relearning": "why"}}, False, "could not be computed"),
        ({"probability": {"relearning": 1.0}}, {"relearning": HALF}, False, "of b"),
        ({"probability": {"relearning": 1.0}}, {"relearning": curve()}, False, "could not be computed"),
    ],
)  # fmt: skip
def test_the_gate(params: dict[str, Any], attacks: dict[str, Any], passed: bool | None, said: str) -> None:
    class Given:
        pass

    given = Given()
    given.attacks = attacks
    verdict = registry.gates["robustness"].call(given, RobustnessParams(**params))
    assert verdict.passed is passed and said in verdict.reason


def test_a_limit_names_an_attack_that_there_is(tiny_settings: Callable[..., Settings]) -> None:
    with pytest.raises(InputError, match=r"gates.robustness.probability: unknown attack 'quantisation'"):
        tiny_settings(gates={"robustness": {"probability": {"quantisation": 0.1}}})


def test_a_gate_that_fails_rejects_the_step(tiny_project: Make) -> None:
    gates = {"robustness": {"probability": {"quantization": 0.0}}}
    project = tiny_project("r001", method=SHORT, gates=gates)
    sealed = make_step(project, "r001", previous="base", earlier=())
    assert not sealed.accepted and "robustness: P after quantization, worst: r001 at" in sealed.reason
