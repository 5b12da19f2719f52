"""The generated customers: the same on every run, disjoint between splits and of the asked size."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from alkn.benchmarks.people import PeopleParams, people
from alkn.registry import benchmarks
from alkn.splits import Splits

SEEDS = (0, 1, 20)
NAME = re.compile(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b")


def as_bytes(splits: Splits) -> bytes:
    """Write the splits out, order included."""
    return json.dumps(dataclasses.asdict(splits), ensure_ascii=False).encode()


def groups(splits: Splits) -> dict[str, list[Mapping[str, Any]]]:
    """List the records of each split and request under its name."""
    parts = {"retain": splits.retain, "utility": splits.utility, "holdout": splits.holdout, **splits.forget}
    return {name: list(records) for name, records in parts.items()}


def every(splits: Splits) -> list[Mapping[str, Any]]:
    """List the records of all splits."""
    return [record for records in groups(splits).values() for record in records]


def names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """List one full name a record; a customers' question holds exactly one."""
    found = [NAME.findall(record["question"]) for record in records if record["domain"] == "customers"]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


@pytest.fixture(scope="module", params=SEEDS)
def splits(request: pytest.FixtureRequest) -> Splits:
    """Generate the default world of one seed."""
    made: Splits = people(PeopleParams(), seed=request.param)
    return made


def test_registered_with_its_parameters() -> None:
    """The registry finds the benchmark under its name."""
    entry = benchmarks["people"]
    assert entry.call is people
    assert entry.params is PeopleParams


def test_same_seed_same_bytes_and_global_random_is_untouched() -> None:
    """Only the seed decides, and nobody else's random numbers change."""
    random.seed(1)
    state = random.getstate()
    first = as_bytes(people(PeopleParams(), seed=7))
    assert random.getstate() == state
    random.seed(2)
    assert as_bytes(people(PeopleParams(), seed=7)) == first
    assert as_bytes(people(PeopleParams(), seed=8)) != first


def test_same_bytes_under_another_hash_seed() -> None:
    """Another process with other string hashes writes the same bytes."""
    code = (
        "import dataclasses, hashlib, json\n"
        "from alkn.benchmarks.people import PeopleParams, people\n"
        "splits = dataclasses.asdict(people(PeopleParams(), seed=7))\n"
        "text = json.dumps(splits, ensure_ascii=False)\n"
        "assert hashlib.sha256(text.encode()).hexdigest() == '%s'\n"
    )
    digest = hashlib.sha256(as_bytes(people(PeopleParams(), seed=7))).hexdigest()
    for hash_seed in ("1", "2"):
        done = subprocess.run(  # noqa: S603 - this interpreter, on the text above
            [sys.executable, "-c", code % digest],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_default_counts(splits: Splits) -> None:
    """The defaults give the documented sizes."""
    assert {name: len(records) for name, records in groups(splits).items()} == {
        "retain": 84,
        "utility": 84,
        "holdout": 54,
        "r001": 18,
        "r002": 18,
        "r003": 18,
    }
    assert 60 <= len(splits.generic) <= 100


def test_counts_follow_the_parameters() -> None:
    """Every parameter changes the size that it names."""
    params = PeopleParams(
        requests=11,
        customers_per_request=2,
        records_per_customer=4,
        kept_customers=5,
        holdout_customers=1,
        facts=7,
    )
    made = people(params, seed=0)
    assert list(made.forget) == [f"r{number:03d}" for number in range(1, 12)]
    assert {len(records) for records in made.forget.values()} == {8}
    assert (len(made.retain), len(made.utility), len(made.holdout)) == (5 * 2 + 7, 5 * 2 + 7, 4)


def test_domains(splits: Splits) -> None:
    """Both domains are in retain and utility; requests and holdout are customers only."""
    assert {record["domain"] for record in splits.retain} == {"customers", "facts"}
    assert {record["domain"] for record in splits.utility} == {"customers", "facts"}
    assert {record["domain"] for record in splits.holdout} == {"customers"}
    assert all({r["domain"] for r in records} == {"customers"} for records in splits.forget.values())


def test_full_names_are_unique_and_customers_disjoint(splits: Splits) -> None:
    """A full name belongs to one customer; retain and utility halve the records of the same ones."""
    half = PeopleParams().records_per_customer // 2
    kept = {side: names(getattr(splits, side)) for side in ("retain", "utility")}
    assert set(kept["retain"]) == set(kept["utility"])
    assert all({found.count(name) for name in found} == {half} for found in kept.values())
    of_group = {group: names(records) for group, records in groups(splits).items() if group not in kept}
    of_group["kept"] = kept["retain"] + kept["utility"]
    for found in of_group.values():
        assert {found.count(name) for name in found} == {PeopleParams().records_per_customer}
    distinct = [name for found in of_group.values() for name in set(found)]
    assert len(distinct) == len(set(distinct)) == PeopleParams().customers


def test_names_stay_unique_in_a_large_world() -> None:
    """Names stay unique when first names have run out."""
    params = PeopleParams(requests=20, customers_per_request=5, records_per_customer=2, kept_customers=200)
    made = people(params, seed=0)
    found = names(every(made))
    assert len(found) == 2 * len(set(found)) == 2 * params.customers


def test_facts_are_disjoint(splits: Splits) -> None:
    """No fact is both drawn on and measured."""
    keys = ("question", "paraphrased_question")
    retain, utility = (
        {record[key] for record in side if record["domain"] == "facts" for key in keys}
        for side in (splits.retain, splits.utility)
    )
    assert len(retain) == len(utility) == 2 * PeopleParams().facts
    assert not retain & utility


def test_no_question_twice(splits: Splits) -> None:
    """No question has two answers, in its first or its second wording."""
    asked = [record[key] for record in every(splits) for key in ("question", "paraphrased_question")]
    assert len(asked) == len(set(asked))


def test_paraphrases_and_wrong_answers_differ(splits: Splits) -> None:
    """All five answers of a record are different texts without leftover placeholders."""
    for record in every(splits):
        wrong = record["perturbed_answer"]
        assert len(wrong) == 3
        told = [record["answer"], record["paraphrased_answer"], *wrong]
        assert len(set(told)) == 5, record
        assert not any("{" in text or "}" in text for text in told)


def test_customer_answers_are_short_and_do_not_give_the_name(splits: Splits) -> None:
    """Copying the question's name never helps to guess an answer."""
    for record in every(splits):
        if record["domain"] == "facts":
            continue
        (name,) = NAME.findall(record["question"])
        for answer in (record["answer"], record["paraphrased_answer"], *record["perturbed_answer"]):
            assert 5 <= len(answer.split()) <= 15, answer
            assert not set(name.split()) & set(re.findall(r"\w+", answer)), answer


def test_customers_have_different_attributes(splits: Splits) -> None:
    """Which attributes a customer has is drawn for each."""
    asked: dict[str, set[str]] = {}
    for record, name in zip(splits.holdout, names(splits.holdout), strict=True):
        asked.setdefault(name, set()).add(record["question"].replace(name, ""))
    assert len({frozenset(kinds) for kinds in asked.values()}) > 1


def test_contact_details_reach_nobody(splits: Splits) -> None:
    """E-mail addresses end in reserved domains."""
    text = as_bytes(splits).decode()
    domains = re.findall(r"@[\w-]+\.(\w+)", text)
    assert domains
    assert set(domains) <= {"example", "test", "invalid"}


def test_generic_names_no_customer(splits: Splits) -> None:
    """The tokenizer's neutral text holds no part of a customer's name."""
    words = set(re.findall(r"\w+", " ".join(splits.generic).lower()))
    for name in names(every(splits)):
        assert not set(name.lower().split()) & words


@pytest.mark.parametrize(
    "setting",
    [
        {"records_per_customer": 15},
        {"records_per_customer": 0},
        {"requests": 0},
        {"facts": 43},
        {"requests": 200, "customers_per_request": 200},
        {"customers": 4},
    ],
)
def test_impossible_sizes_are_refused(setting: dict[str, int]) -> None:
    """Sizes that the tables cannot fill are errors, as are unknown settings."""
    with pytest.raises(ValidationError):
        PeopleParams(**setting)


def test_every_attribute_at_once() -> None:
    """A customer can have all attributes."""
    made = people(PeopleParams(records_per_customer=14), seed=3)
    assert len(made.holdout) == 9 * 14
    asked = [record[key] for record in every(made) for key in ("question", "paraphrased_question")]
    assert len(asked) == len(set(asked))
