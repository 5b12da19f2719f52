"""A request that begins: its file against the ledger, records of a benchmark, and what it has in common with others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alkn.errors import ChainBroken, InputError
from alkn.files import keyed_digest_of, read_jsonl, write_jsonl
from alkn.planning import plan_step
from alkn.project import Project
from alkn.requests.intake import begin_request, count_overlaps
from alkn.requests.ledger import Entry, Ledger, load_ledger, save_ledger
from alkn.settings import Settings, load_settings, validate_settings
from alkn.step import make_step

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()


def record(words: list[str], number: int = 0) -> dict[str, Any]:
    return {"id": number, "question": " ".join(words[:4]), "answer": " ".join(words[4:])}


def pending(project: Project, values: dict[str, Any]) -> Settings:
    """The benchmark's first request is pending and not there yet."""
    project.request("r001").unlink()
    entry = Entry(received="2026-01-01", records=1, source="data/splits/forget/r001.jsonl")
    save_ledger(project, Ledger(pending={"r001": entry}))
    return validate_settings(values, project.params)


def untracked(path: Path) -> None:
    """Stands for no part of ours: what puts the file under DVC is given by the caller."""


def test_a_benchmarks_request_is_taken_in_when_it_begins(
    tiny_project: Callable[..., Project], tiny_values: dict[str, Any]
) -> None:
    """Its records are counted, its file is salted, and the ledger attests that file."""
    project = tiny_project()
    settings = pending(project, tiny_values)
    entry = begin_request(project, settings, "r001", track=untracked)
    path = project.request("r001")
    assert entry.digest == keyed_digest_of(path, project.key()) and entry.records == 4
    assert load_ledger(project).pending["r001"] == entry
    given = read_jsonl(project.splits / "forget" / "r001.jsonl")
    assert [row["answer"] for row in read_jsonl(path)] == [row["answer"] for row in given]
    assert begin_request(project, settings, "r001", track=untracked) == entry, "and again: as it is"


def test_a_file_that_is_not_the_one_that_was_taken_in_is_refused(
    tiny_project: Callable[..., Project], tiny_values: dict[str, Any]
) -> None:
    project = tiny_project()
    settings = pending(project, tiny_values)
    begin_request(project, settings, "r001", track=untracked)
    path, whole = project.request("r001"), project.request("r001").read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[0])
    with pytest.raises(InputError, match=r"data/requests/r001\.jsonl was changed after intake"):
        begin_request(project, settings, "r001", track=untracked)
    path.unlink()
    with pytest.raises(InputError, match=r"data/requests/r001\.jsonl is missing"):
        begin_request(project, settings, "r001", track=untracked)


def test_no_step_is_planned_on_an_earlier_request_whose_file_was_changed(tiny_project: Callable[..., Project]) -> None:
    project = tiny_project("r001", "r002", method={"name": "gradient_ascent", "steps": 1})
    make_step(project, "r001", previous="base", earlier=())
    settings = load_settings(project.step("r002").params)

    def plan() -> object:
        return plan_step(project, "r002", previous="r001", earlier=("r001",), settings=settings)

    plan()
    write_jsonl(project.request("r001"), read_jsonl(project.request("r001"))[:-1])
    with pytest.raises(ChainBroken, match=r"data/requests/r001\.jsonl is not the file that steps/r001 was made from"):
        plan()


def test_overlaps_are_counted_by_runs_of_five_words() -> None:
    """Twelve runs in sixteen words. A changed word takes five with it: seven of twelve are half, two are not."""
    whole, other = record(WORDS), record([f"{word}x" for word in WORDS])
    once = record([*WORDS[:8], "else", *WORDS[9:]])
    twice = record([*WORDS[:5], "else", *WORDS[6:10], "else", *WORDS[11:]])
    loud = record([word.upper() for word in WORDS])
    assert [count_overlaps([one], [other, whole]) for one in (whole, loud, once, twice, other)] == [1, 1, 1, 0, 1]
    assert count_overlaps([whole, once, twice], [whole]) == 2 and count_overlaps([whole], [other]) == 0
