"""Gates: at their limits, beyond them, and closed where a number that was asked for is missing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from alkn.core.unlearning import StopRule
from alkn.evidence import Check, Evidence, GateParams, Verdict
from alkn.registry import gates

GATES = ("finite", "forgetting", "no_return", "target_reached", "utility")
LIMITS = StopRule(p=0.01, exact_memorization=0.13)
FORGOTTEN = {"probability": 0.01, "probability_p95": 0.05, "exact_memorization": 0.13}
SETS: dict[str, dict[str, Any]] = {
    "forget": dict(FORGOTTEN),
    "earlier/r001": dict(FORGOTTEN),
    "earlier/r002": dict(FORGOTTEN),
    "retain/facts": {"probability": 0.0},
    "utility/facts": {"probability": 0.6},
    "utility/people": {"probability": 0.3},
}
PARENT = {"utility/facts": {"probability": 1.0}, "utility/people": {"probability": 0.5}}
BASE = {"utility/facts": {"probability": 1.0}, "utility/people": {"probability": 1.0}}


def evidence(changes: dict[str, float | None] | None = None, *, drop: tuple[str, ...] = (), **more: Any) -> Evidence:
    """Numbers exactly at every limit, changed by ``set.metric``; ``None`` takes a number out."""
    places = {"step": copy.deepcopy(SETS), "parent": copy.deepcopy(PARENT), "base": copy.deepcopy(BASE)}
    for path, value in (changes or {}).items():
        where, name, metric = path.split(".")
        if value is None:
            del places[where][name][metric]
        else:
            places[where][name][metric] = value
    for name in drop:
        del places["step"][name]
    rows = {where: {"sets": sets, "model": {}, "missing": {}} for where, sets in places.items()}
    return Evidence(**rows, limits=LIMITS, **{"reached": True, "finite_weights": True} | more)


def judge(name: str, given: Evidence, **params: Any) -> Verdict:
    entry = gates[name]
    verdict = entry.call(given, entry.params(**params))
    assert isinstance(verdict, Verdict)
    return verdict


def test_the_gates_there_are() -> None:
    """Each with parameters that can switch it on and off."""
    assert set(GATES) <= set(gates)
    assert all(issubclass(entry.params, GateParams) and entry.source for entry in gates.values())


@pytest.mark.parametrize("name", GATES)
def test_every_gate_passes_at_its_limit(name: str) -> None:
    verdict = judge(name, evidence())
    assert verdict.passed is True and verdict.reason == "" and verdict.checks


@pytest.mark.parametrize(
    ("gate", "changes", "named"),
    [
        ("forgetting", {"step.forget.probability": 0.0101}, "P, mean 0.0101, limit 0.01"),
        ("forgetting", {"step.forget.probability_p95": 0.0501}, "P, 95th percentile 0.0501, limit 0.05"),
        ("forgetting", {"step.forget.exact_memorization": 0.1301}, "exact memorization 0.1301, limit 0.13"),
        ("no_return", {"step.earlier/r002.probability": 0.0101}, "P of r002 0.0101, limit 0.01"),
        (
            "no_return",
            {"step.earlier/r001.exact_memorization": 0.2},
            "exact memorization of r001 0.2, limit 0.13",
        ),
        ("utility", {"step.utility/facts.probability": 0.599}, "facts kept of parent 0.599, limit 0.6"),
        ("utility", {"step.utility/people.probability": 0.299}, "people kept of base 0.299, limit 0.3"),
        ("utility", {"parent.utility/people.probability": 0.51}, "people kept of parent 0.5882, limit 0.6"),
    ],
)
def test_beyond_a_limit(gate: str, changes: dict[str, float | None], named: str) -> None:
    """The reason names the number and its limit; the other gates do not mind."""
    verdict = judge(gate, evidence(changes))
    assert verdict.passed is False and named in verdict.reason
    failed = [check for check in verdict.checks if not check.passed]
    assert len(failed) == verdict.reason.count("limit")
    assert all(judge(other, evidence(changes)).passed for other in GATES if other != gate)


@pytest.mark.parametrize("enabled", [None, True])
@pytest.mark.parametrize(
    ("gate", "missing"),
    [
        ("forgetting", "step.forget.probability"),
        ("forgetting", "step.forget.probability_p95"),
        ("forgetting", "step.forget.exact_memorization"),
        ("no_return", "step.earlier/r001.probability"),
        ("no_return", "step.earlier/r002.exact_memorization"),
        ("utility", "step.utility/facts.probability"),
        ("utility", "base.utility/facts.probability"),
        ("utility", "parent.utility/people.probability"),
        ("finite", "step.retain/facts.probability"),
    ],
)
def test_a_number_that_could_not_be_computed_fails(gate: str, missing: str, enabled: bool | None) -> None:
    """The set is there, so the gate is asked, and closed."""
    verdict = judge(gate, evidence({missing: None}), enabled=enabled)
    assert verdict.passed is False
    assert "could not be computed" in verdict.reason or "computed 0" in verdict.reason


@pytest.mark.parametrize("enabled", [None, True])
def test_no_forget_set_fails(enabled: bool | None) -> None:
    """There always is one; where it is not, nothing may pass."""
    verdict = judge("forgetting", evidence(drop=("forget",)), enabled=enabled)
    assert verdict.passed is False and verdict.reason.count("could not be computed") == 3


@pytest.mark.parametrize(("enabled", "passed"), [(None, None), (True, False)])
def test_no_utility_set(enabled: bool | None, passed: bool | None) -> None:
    """Not judged where none was given, closed where the gate was switched on."""
    nothing: dict[str, Any] = {"sets": {}, "model": {}, "missing": {}}
    given = replace(evidence(drop=("utility/facts", "utility/people")), parent=nothing, base=nothing)
    verdict = judge("utility", given, enabled=enabled)
    assert (verdict.passed, verdict.reason, verdict.checks) == (passed, "there is no utility set", ())


@pytest.mark.parametrize("drop", [("utility/facts",), ("utility/facts", "utility/people")])
def test_a_domain_that_is_no_longer_measured_fails(drop: tuple[str, ...]) -> None:
    """Base and parent have it: whoever takes records away does not open the gate."""
    verdict = judge("utility", evidence(drop=drop))
    assert verdict.passed is False and verdict.reason.count("could not be computed") == 2 * len(drop)


def test_the_first_request_has_nothing_to_return() -> None:
    verdict = judge("no_return", evidence(drop=("earlier/r001", "earlier/r002")))
    assert (verdict.passed, verdict.reason) == (None, "there is no earlier request")


def test_a_domain_that_the_base_did_not_have_or_not_know_fails() -> None:
    """A share of nothing is no number."""
    assert judge("utility", evidence({"base.utility/facts.probability": 0.0})).passed is False
    given = evidence()
    del given.base["sets"]["utility/facts"]
    assert judge("utility", given).passed is False


def test_parameters_move_the_limits() -> None:
    assert judge("forgetting", evidence({"step.forget.probability_p95": 0.1}), p95=10).passed is True
    assert judge("forgetting", evidence(), p95=4.9).passed is False
    drifted = {"step.earlier/r001.probability": 0.02, "step.earlier/r001.exact_memorization": 0.26}
    assert judge("no_return", evidence(drifted), slack=2).passed is True
    assert judge("no_return", evidence(drifted), slack=1.9).passed is False
    assert judge("utility", evidence(), parent=0.61).passed is False
    assert judge("utility", evidence(), base=0.31).passed is False
    assert judge("utility", evidence({"step.utility/people.probability": 0.0}), base=0, parent=0).passed is True


def test_limits_never_exceed_one() -> None:
    """P of 1 is full knowledge: a factor on a target of 0.5 does not go beyond it."""
    given = evidence()
    lax = Evidence(given.step, given.parent, given.base, StopRule(0.5, 0.5), reached=True, finite_weights=True)
    assert judge("forgetting", lax).checks[1].limit == 1.0
    assert {check.limit for check in judge("no_return", lax, slack=5).checks} == {1.0}


def test_target_not_reached() -> None:
    verdict = judge("target_reached", evidence(reached=False))
    assert verdict.passed is False and verdict.reason == "stop rule met 0, limit 1"


def test_weights_that_are_no_numbers() -> None:
    verdict = judge("finite", evidence(finite_weights=False))
    assert verdict.passed is False and verdict.reason.startswith("finite weights 0")
    assert {check.what for check in verdict.checks} == {"finite weights"} | {f"P of {name} computed" for name in SETS}


def test_checks_by_hand() -> None:
    """Limits are inclusive, and what is no number never passes."""
    nan = float("nan")
    assert [Check.at_most("x", v, 0.5).passed for v in (0.5, 0.51, nan, None)] == [True, False, False, False]
    assert [Check.at_least("x", v, 0.5).passed for v in (0.5, 0.49, nan, None)] == [True, False, False, False]


def test_a_verdict_without_checks_fails() -> None:
    verdict = Verdict.of([])
    assert verdict.passed is False and verdict.reason == "nothing to check"


def test_all_failed_checks_are_named() -> None:
    checks = [Check.at_most("a", 2, 1), Check.at_most("b", 0, 1), Check.at_most("c", None, 1)]
    assert Verdict.of(checks).reason == "a 2, limit 1; c could not be computed, limit 1"
