"""Baselines that work on likelihoods: their settings, their refusals, and what each does to a real model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from likelihood_cases import ALL, WITH_RETAIN, run
from method_cases import NEVER, p_of
from method_cases import task_of as plain_task
from scipy.special import expit
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alkn.core.refused import refused_examples
from alkn.core.scoring import score
from alkn.core.unlearning import StopRule, Task
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.refusals import REFUSALS
from alkn.registry import methods
from alkn.settings import Data

STOP = StopRule(p=0.01, exact_memorization=0.3)


# Settings


PAPERS: dict[str, dict[str, Any]] = {
    "gradient_ascent": {},
    "gradient_difference": {"retain_weight": 1.0},
    "kl_minimization": {"retain_weight": 1.0},
    "npo": {"beta": 0.1, "regularizer": "retain", "retain_weight": 1.0},
    "simnpo": {"beta": 4.5, "gamma": 0.0, "forget_weight": 0.125, "retain_weight": 1.0},
    "dpo": {"beta": 0.1, "retain_weight": 1.0},
    "idk": {"retain_weight": 1.0},
    "undial": {"strength": 10.0, "retain_weight": 0.0},
    "wga": {"alpha": 1.0, "retain_weight": 1.0},
    "satimp": {"saturation": 5.0, "importance": 1.0, "forget_weight": 0.1, "retain_weight": 1.0},
}


@pytest.mark.parametrize("name", ALL)
def test_defaults_are_those_of_the_sources(name: str) -> None:
    """What a method has beside the keys of the loop, with the values of its paper or its authors' code."""
    loop = {"lr": 1e-4, "steps": 400, "decay_steps": 0, "lr_floor": 0.1, "check_every": 5, "batch_size": 16}
    loop |= {"weight_decay": 0.0, "clip": 1.0}
    loop |= {} if name == "gradient_ascent" else {"retain_batch": 16}
    assert methods[name].params().model_dump() == loop | PAPERS[name]


# Refusals


def test_refusals_are_encoded_like_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, Data(), context=512)
    assert len(set(REFUSALS)) == len(REFUSALS) >= 20
    for text in REFUSALS:
        whole = encoder.examples("forget", [{"id": 0, "question": "Where?", "answer": text}])[0]
        assert torch.equal(encoder.answer(text), whole.tokens[whole.answer_start :])
        assert encoder.answer(text)[-1] == tokenizer.eos_token_id


def test_one_refusal_a_record_drawn_from_the_seed(memorised: Any, refusals: list[Tensor]) -> None:
    def drawn(seed: int) -> list[list[int]]:
        task = task_of(memorised, refusals, seed=seed)
        made = refused_examples(task)
        for record, other in zip(task.forget, made, strict=True):
            assert other.answer_start == record.answer_start
            assert torch.equal(other.tokens[: other.answer_start], record.tokens[: record.answer_start])
        return [e.tokens[e.answer_start :].tolist() for e in made]

    known = [r.tolist() for r in refusals]
    assert all(one in known for one in drawn(0)) and len({tuple(one) for one in drawn(0)}) > 1
    assert drawn(0) == drawn(0) and any(drawn(0) != drawn(seed) for seed in (1, 2))


def test_refusals_that_do_not_fit_are_not_drawn(memorised: Any) -> None:
    """The fixture's context is 64 tokens; the error tells a place and lengths, no text."""
    longest = 64 - max(record.answer_start for record in memorised.forget)
    fits, does_not = torch.ones(longest, dtype=torch.long), torch.ones(64, dtype=torch.long)
    made = refused_examples(task_of(memorised, [does_not, fits, does_not]))
    assert all(torch.equal(e.tokens[e.answer_start :], fits) for e in made)
    with pytest.raises(InputError, match=r"no refusal fits after the prompt of forget record 0 \(\d tokens\)"):
        refused_examples(task_of(memorised, [does_not]))
    for name in ("dpo", "idk"):
        with pytest.raises(InputError, match="there is no refusal to teach"):
            run(name, task_of(memorised, []))


# On a model that knows its records


@pytest.fixture(scope="module")
def refusals() -> list[Tensor]:
    """Three made-up refusals of different lengths, each with end-of-sequence."""
    return [torch.tensor([*range(10 * n, 11 * n), 0]) for n in (3, 4, 5)]


def task_of(memorised: Any, refusals: Sequence[Tensor], *, stop: StopRule = STOP, **more: Any) -> Task:
    return plain_task(memorised, stop=stop, refusals=refusals, **more)


SMALL: dict[str, Any] = {"lr": 3e-3, "steps": 60, "batch_size": 6}
SOFTER: dict[str, dict[str, Any]] = {
    "simnpo": {"beta": 0.5, "forget_weight": 1.0},
    "satimp": {"saturation": 1.0, "forget_weight": 1.0},
}
"""With their sources' constants the weight of a token vanishes long before these targets; these reach them."""


def small(name: str, **more: Any) -> dict[str, Any]:
    """Settings for a model of 30,000 parameters and six records."""
    return SMALL | ({} if name == "gradient_ascent" else {"retain_batch": 6}) | SOFTER.get(name, {}) | more


FORGETS = tuple(name for name in ALL if name not in ("idk", "undial"))


@pytest.mark.parametrize("name", FORGETS)
def test_stops_at_the_first_measurement_that_meets_the_target_and_the_retain_term_keeps(
    name: str, memorised: Any, refusals: list[Tensor]
) -> None:
    """Same target with and without the retain term: with it, much more of the retain records is left."""
    task = task_of(memorised, refusals)
    outcome = run(name, task, **small(name, check_every=2))
    met = [row["p"] <= STOP.p and row["exact_memorization"] <= STOP.exact_memorization for row in outcome.history]
    assert outcome.reached and met == [False] * (len(met) - 1) + [True]
    assert [row["round"] for row in outcome.history] == list(range(0, 2 * len(met), 2))
    assert outcome.history[0]["p"] == pytest.approx(p_of(memorised.trained, memorised.forget))
    assert outcome.history[-1]["p"] == pytest.approx(p_of(task.model, memorised.forget))
    steps = outcome.history[-1]["round"]
    assert outcome.passes == steps * {"gradient_ascent": 6, "dpo": 18}.get(name, 12)

    alone = task_of(memorised, refusals, retain=[])
    off = {} if name == "gradient_ascent" else {"retain_batch": 0}
    ended = run(name, alone, **small(name, check_every=2) | off)
    assert ended.reached and ended.passes == ended.history[-1]["round"] * (12 if name == "dpo" else 6)
    lost, kept = p_of(alone.model, memorised.retain), p_of(task.model, memorised.retain)
    assert lost == kept < 0.5 if name == "gradient_ascent" else kept > lost + 0.3


def test_gradient_ascent_has_no_retain_batch() -> None:
    with pytest.raises(ValueError, match="retain_batch"):
        methods["gradient_ascent"].params.model_validate({"retain_batch": 4})


@pytest.mark.parametrize("name", [name for name in WITH_RETAIN if name != "undial"])
def test_a_retain_term_without_retain_records_is_an_error(name: str, memorised: Any, refusals: list[Tensor]) -> None:
    with pytest.raises(InputError, match="method.retain_batch: there is no retain record to draw"):
        run(name, task_of(memorised, refusals, retain=[]))


def test_idk_teaches_the_refusal(memorised: Any, refusals: list[Tensor]) -> None:
    """The refusals get likely and the answers less so, the retain records stay; the stop rule may be out of reach."""
    task = task_of(memorised, refusals, stop=NEVER)
    refused_records = refused_examples(task)
    before = p_of(task.model, refused_records)
    outcome = run("idk", task, **small("idk", steps=30))
    assert not outcome.reached and len(outcome.history) == 7
    assert before < 0.01 and p_of(task.model, refused_records) > 0.8
    assert p_of(task.model, memorised.forget) < 0.2 and p_of(task.model, memorised.retain) > 0.9


def test_undial_ends_at_the_level_of_its_teacher(memorised: Any, refusals: list[Tensor]) -> None:
    """The log-odds of the forget tokens end near those of θ_{t-1} less the strength, and not below."""
    before = [np.asarray(p, dtype=np.float64) for p in score(memorised.trained, memorised.forget).token_probs]
    ends = {}
    for strength in (8.0, 14.0):
        task = task_of(memorised, refusals, stop=NEVER)
        history = run("undial", task, **small("undial", strength=strength, check_every=30)).history
        level = np.mean([np.exp(np.log(expit(np.log(p / (1 - p)) - strength)).mean()) for p in before])
        ends[strength] = history[-1]["p"]
        assert level / 1.5 < ends[strength] < history[0]["p"] / 2
    assert ends[14.0] < ends[8.0] / 5


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_bytes(name: str, memorised: Any, refusals: list[Tensor]) -> None:
    """Whatever the global random state; another seed draws other batches."""
    ends = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        task = task_of(memorised, refusals, stop=NEVER, seed=seed)
        outcome = run(name, task, **small(name, steps=3, batch_size=4, check_every=1))
        ends.append((task.weights(), outcome))
    (one, first), (two, again), (other, _) = ends
    assert all(torch.equal(w, two[n]) for n, w in one.items()) and first.history == again.history
    assert any(not torch.equal(w, other[n]) for n, w in one.items())


def test_a_request_that_is_forgotten_already_costs_nothing(memorised: Any, refusals: list[Tensor]) -> None:
    for name in ALL:
        task = task_of(memorised, refusals, stop=StopRule(p=1.0, exact_memorization=1.0))
        outcome = run(name, task, **small(name))
        assert outcome.reached and outcome.passes == 0 and len(outcome.history) == 1
        start = dict(memorised.trained.named_parameters())
        assert all(torch.equal(w, start[n]) for n, w in task.weights().items())
