"""RMU, SKU, WAGLE, SOUL and training without the records: what holds for every one of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from baseline_cases import DESCENDING, SHORT, SMALL, Finished, call
from method_cases import NEVER, STOP, changes, forgetting_of, p_of, task_of
from pydantic import ValidationError

from alkn.core.scoring import score
from alkn.core.unlearning import Forgetting, StopRule
from alkn.errors import InputError
from alkn.registry import methods


@pytest.mark.parametrize("name", SMALL)
def test_each_forgets_what_it_is_asked_to(name: str, memorised: Any, full_forward: Any, finished: Finished) -> None:
    """Both targets, by full forwards; the last row is what the model is; SKU alone loses the retain set."""
    task, outcome = finished(name)
    assert outcome.reached and STOP.met(forgetting_of(task.model, memorised.forget, full_forward))
    first, last = outcome.history[0], outcome.history[-1]
    assert first["p"] == p_of(memorised.trained, memorised.forget) > 0.9
    now = Forgetting.of(score(task.model, memorised.forget))
    assert (last["p"], last["exact_memorization"]) == (now.p, now.exact_memorization)
    assert all(math.isfinite(value) for row in outcome.history for value in row.values())
    assert outcome.state == {} and outcome.passes > 0
    assert (p_of(task.model, memorised.retain) > 0.9) is (name != "sku")


@pytest.mark.parametrize("name", ["wagle", "second_order"])
def test_npo_as_the_forget_loss(name: str, memorised: Any) -> None:
    """It forgets too, by another way than gradient difference, and β counts."""
    ends = []
    for values in ({"loss": "npo"}, {"loss": "npo", "npo_beta": 1.0}, {"loss": "gradient_difference"}):
        task = task_of(memorised, stop=NEVER)
        outcome = call(name, task, steps=10, check_every=10, **values)
        ends.append(outcome.history[-1]["p"])
    assert max(ends) < 0.9 and len(set(ends)) == 3


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_bits(name: str, memorised: Any) -> None:
    """Whatever the global random state is; another seed gives other weights."""
    runs = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        task = task_of(memorised, stop=NEVER, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            outcome = call(name, task, **SHORT[name])
        runs.append((outcome, task.copy_weights()))
    same = [all(torch.equal(w, runs[0][1][n]) for n, w in weights.items()) for _, weights in runs]
    assert same == [True, True, False]
    assert runs[0][0] == runs[1][0]


@pytest.mark.parametrize("name", SMALL)
def test_the_weights_fit_the_stored_precision(name: str, memorised: Any) -> None:
    task = task_of(memorised, stop=NEVER, stored=torch.bfloat16)
    call(name, task, **SHORT[name])
    assert all(torch.equal(w, w.bfloat16().float()) and w.dtype == torch.float32 for w in task.weights().values())


@pytest.mark.parametrize("name", [name for name in SMALL if name != "retrain"])
def test_what_is_forgotten_already_is_left_alone(name: str, memorised: Any) -> None:
    task = task_of(memorised, stop=StopRule(1.0, 1.0))
    outcome = call(name, task)
    assert outcome.reached and len(outcome.history) == 1 and outcome.passes == 0
    assert not any(bool(c.any()) for c in changes(task, memorised).values())


OFF: dict[str, dict[str, float]] = {"retain_batch": {"retain_batch": 0}, "weight": {"retain_weight": 0.0}}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("name", ["rmu", "wagle", "second_order", "sku"])
def test_no_retain_mode_touches_no_retain_record(name: str, off: str, memorised: Any) -> None:
    """Without retain term, by either key, the result does not depend on the retain set, which may be empty."""
    values = {"preservation_weight": 0.0} if (name, off) == ("sku", "weight") else OFF[off]
    weights = []
    for retain in (memorised.retain, memorised.second, []):
        task = task_of(memorised, stop=NEVER, retain=retain)
        call(name, task, **SHORT[name], **values)
        weights.append(task.copy_weights())
    assert any(bool(c.any()) for c in changes(task, memorised).values())
    assert all(torch.equal(w, other[n]) for other in weights[1:] for n, w in weights[0].items())


@pytest.mark.parametrize("name", ["rmu", "wagle", "second_order", "sku"])
def test_a_retain_term_without_retain_records_is_an_error(name: str, memorised: Any) -> None:
    with pytest.raises(InputError, match=r"method\.retain_batch: there is no retain record.*0 switches"):
        call(name, task_of(memorised, retain=[]))


@pytest.mark.parametrize("name", DESCENDING)
def test_record_passes_are_counted(name: str, memorised: Any) -> None:
    """Six steps of 4 + 3; WAGLE adds forget once and retain twice, SOUL 4 + 3 at steps 0, 2 and 4."""
    more = {"rmu": 0, "wagle": 6 + 12 + 12, "second_order": 3 * (4 + 3)}[name]
    outcome = call(name, task_of(memorised, stop=NEVER), **SHORT[name], batch_size=4, retain_batch=3)
    assert outcome.passes == 6 * (4 + 3) + more and not outcome.reached


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("wagle", {"share": 0.0}),
        ("wagle", {"loss": "ascent"}),
        ("second_order", {"momentum": 1.0}),
        ("second_order", {"estimator": "fisher"}),
        ("rmu", {"layer": -1}),
        ("rmu", {"coefficient": 0.0}),
        ("sku", {"answers": 0}),
        ("retrain", {"until": 1.5}),
    ],
)
def test_values_out_of_range_are_refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        methods[name].params(**values)
