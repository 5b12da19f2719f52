"""The embedded benchmark: invented customers and common knowledge, generated from a seed.

Nobody in it exists. E-mail addresses end in reserved top-level domains, and phone numbers have an
exchange that begins with 0, which ten-digit North American numbers never do. Word tables, phrasings,
facts and the neutral sentences lie beside this file in ``people_facts.jsonl``, one JSON object a line
whose ``kind`` says which of these it is; all of it was written for this project.

The benchmark is only of use when a model that never saw a customer cannot guess the answers. Hence
answers are mostly drawn values, the slots come in another order in each phrasing, and words are
dealt from a shuffled deck, so that a trained customer's word seldom completes a held-out one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any

from pydantic import Field, model_validator

from alkn.registry import Params, register_benchmark
from alkn.splits import Splits

WRONG_ANSWERS = 3

_PLACEHOLDER = re.compile(r"\{(\w+)\}|[#^$?]")
_SIGNS = {"#": "0123456789", "^": "123456789", "$": "ABCDEFGHJKLMNPRSTUVWXYZ", "?": "abcdefghjkmnprstuvwxyz"}


@dataclass(frozen=True)
class _Attribute:
    """Something known about a customer: how its values are drawn, asked for and told."""

    name: str
    slots: Mapping[str, str]
    questions: Sequence[str]
    answers: Sequence[str]


@dataclass(frozen=True)
class _Tables:
    """What ``people_facts.jsonl`` holds."""

    words: Mapping[str, Sequence[str]]
    attributes: Sequence[_Attribute]
    facts: Sequence[Mapping[str, Any]]
    generic: Sequence[str]


def _load() -> _Tables:
    text = files("alkn.benchmarks").joinpath("people_facts.jsonl").read_text(encoding="utf-8")
    rows: dict[str, list[dict[str, Any]]] = {}
    # Not str.splitlines: it would also cut at separators that JSON allows inside a string.
    for line in filter(None, text.split("\n")):
        row = json.loads(line)
        rows.setdefault(row.pop("kind"), []).append(row)
    return _Tables(
        words={row["name"]: row["words"] for row in rows["words"]},
        attributes=[_Attribute(**row) for row in rows["attribute"]],
        facts=rows["fact"],
        generic=[row["text"] for row in rows["generic"]],
    )


_TABLES = _load()
_MOST_CUSTOMERS = len(_TABLES.words["last_a"]) * len(_TABLES.words["last_b"])


class PeopleParams(Params):
    """Size of the generated world."""

    requests: int = Field(default=3, ge=1, le=200, description="Requests for forgetting.")
    customers_per_request: int = Field(default=3, ge=1, le=200, description="Customers that one request names.")
    records_per_customer: int = Field(
        default=6,
        ge=2,
        le=len(_TABLES.attributes),
        description="Attributes, and so records, of each customer.",
    )
    kept_customers: int = Field(
        default=18,
        ge=1,
        le=1000,
        description="Customers that stay; half of each one's records may be drawn on, the other half is utility.",
    )
    holdout_customers: int = Field(default=9, ge=1, le=500, description="Customers that no model is trained on.")
    facts: int = Field(
        default=30,
        ge=1,
        le=len(_TABLES.facts) // 2,
        description="General facts in retain, and as many in utility.",
    )

    @property
    def customers(self) -> int:
        """Customers of all splits together."""
        return self.requests * self.customers_per_request + self.kept_customers + self.holdout_customers

    @model_validator(mode="after")
    def _enough_names(self) -> PeopleParams:
        if self.customers > _MOST_CUSTOMERS:
            raise ValueError(f"{self.customers} customers asked for, only {_MOST_CUSTOMERS} surnames exist")
        return self


def _rng(seed: int, purpose: str) -> Random:
    """Make a generator for one purpose; text seeds are hashed alike on every machine."""
    return Random(f"{seed}:{purpose}")  # noqa: S311 - invented data, nothing is kept secret by it


class _Decks:
    """Deals each table's words in a shuffled order and repeats none before all were dealt."""

    def __init__(self, seed: int) -> None:
        self._rngs = {name: _rng(seed, f"deck:{name}") for name in _TABLES.words}
        self._left: dict[str, list[str]] = {}

    def deal(self, table: str) -> str:
        if not self._left.get(table):
            words = _TABLES.words[table]
            self._left[table] = self._rngs[table].sample(words, len(words))
        return self._left[table].pop()


def _fill(pattern: str, pick: Callable[[str], str], rng: Random) -> str:
    """Replace ``{table}`` by a word and ``#``, ``^``, ``$``, ``?`` by a digit, 1-9, a capital, a letter."""

    def drawn(match: re.Match[str]) -> str:
        return pick(match[1]) if match[1] else rng.choice(_SIGNS[match[0]])

    return _PLACEHOLDER.sub(drawn, pattern)


def _values(
    attribute: _Attribute, pick: Callable[[str], str], rng: Random, taken: Iterable[Mapping[str, str]] = ()
) -> dict[str, str]:
    """Draw a value for each slot, unlike the other slots' and unlike the same slot's in ``taken``."""
    values: dict[str, str] = {}
    for slot, pattern in attribute.slots.items():
        barred = {*values.values(), *(other[slot] for other in taken)}
        while (value := _fill(pattern, pick, rng)) in barred:
            pass
        values[slot] = value
    return values


def _tell(phrasing: str, values: Mapping[str, str]) -> str:
    """Put values into a phrasing: "an" before vowels, a capital first unless an e-mail address is first."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", phrasing.format(**values))
    return text if "@" in text.split()[0] else text[0].upper() + text[1:]


def _record(name: str, attribute: _Attribute, decks: _Decks, rng: Random) -> dict[str, Any]:
    asked, asked_again = rng.sample(attribute.questions, 2)
    told, told_again = rng.sample(attribute.answers, 2)
    known = [_values(attribute, decks.deal, rng)]
    for _ in range(WRONG_ANSWERS):
        # Not dealt: wrong answers would use up the decks and make words of customers repeat.
        known.append(_values(attribute, lambda table: rng.choice(_TABLES.words[table]), rng, known))
    return {
        "question": asked.format(name=name),
        "answer": _tell(told, known[0]),
        "paraphrased_question": asked_again.format(name=name),
        "paraphrased_answer": _tell(told_again, known[0]),
        # Worded like the paraphrase: neither is trained on, so a comparison of the two is of values only.
        "perturbed_answer": [_tell(told_again, wrong) for wrong in known[1:]],
        "domain": "customers",
    }


def _fact(row: Mapping[str, Any]) -> dict[str, Any]:
    right, *wrong = row["values"]
    return {
        "question": row["question"],
        "answer": row["answer"],
        "paraphrased_question": row["paraphrased_question"],
        "paraphrased_answer": row["paraphrased_answer"].format(right),
        "perturbed_answer": [row["paraphrased_answer"].format(value) for value in wrong],
        "domain": "facts",
    }


def _names(count: int, decks: _Decks, seed: int) -> list[str]:
    """Full names whose surnames are all different; first names repeat only when they run out."""
    words = _TABLES.words
    surnames = [head + tail for head in words["last_a"] for tail in words["last_b"]]
    return [f"{decks.deal('first')} {last}" for last in _rng(seed, "surnames").sample(surnames, count)]


@register_benchmark("people", params=PeopleParams, source="generated; own work")
def people(params: PeopleParams, *, seed: int) -> Splits:
    """Generate the world of one seed.

    Args:
        params: how many customers, records and facts.
        seed: the same seed gives the same bytes on every machine.

    Returns:
        Splits whose facts are disjoint, and whose customers are too, but for retain and utility: as in
        TOFU's protocol those two halve the records of the same customers, even and odd by position.
        ``holdout`` has customers only.

    """
    decks = _Decks(seed)
    names = iter(_names(params.customers, decks, seed))

    def customers(side: str, count: int) -> list[dict[str, Any]]:
        records = []
        for index in range(count):
            rng = _rng(seed, f"{side}:{index}")
            name = next(names)
            chosen = rng.sample(_TABLES.attributes, params.records_per_customer)
            records += [_record(name, attribute, decks, rng) for attribute in chosen]
        return records

    requests = (f"r{number:03d}" for number in range(1, params.requests + 1))
    forget = {request: customers(request, params.customers_per_request) for request in requests}
    facts = [_fact(row) for row in _rng(seed, "facts").sample(_TABLES.facts, 2 * params.facts)]
    kept = customers("kept", params.kept_customers)
    return Splits(
        retain=kept[0::2] + facts[: params.facts],
        utility=kept[1::2] + facts[params.facts :],
        holdout=customers("holdout", params.holdout_customers),
        forget=forget,
        generic=list(_TABLES.generic),
    )
