"""The TOFU and records loaders: on small files of our own in the same shapes, and on the real data where it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alkn.benchmarks.records import RecordsParams, records
from alkn.benchmarks.tofu import TofuParams, tofu
from alkn.errors import InputError
from alkn.project import Project
from alkn.record_sets import build_splits, generic_text, known_records, load_split
from alkn.settings import Settings

Rows = list[dict[str, Any]]


def rows(count: int, tag: str) -> Rows:
    return [
        {"question": f"{tag} {i}?", "answer": f"{tag} is {i}.", "perturbed_answer": [f"{tag} is {i + 1}."]}
        for i in range(count)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_file(name: str, content: Rows) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def tofu_folder(write: Callable[..., Path], tmp_path: Path) -> Path:
    sizes = {
        "forget10_perturbed": 9, "retain_perturbed": 5, "real_authors_perturbed": 3, "world_facts_perturbed": 2,
        "holdout10": 4, "retain90": 6,
    }  # fmt: skip
    for name, count in sizes.items():
        write(f"{name}.jsonl", rows(count, name))
    return tmp_path


def test_tofu_is_cut_in_order_and_halved_by_position(tofu_folder: Path) -> None:
    splits = tofu(TofuParams(path=str(tofu_folder), requests=2, records_per_request=4), seed=0)
    wanted = rows(9, "forget10_perturbed")
    assert {name: list(part) for name, part in splits.forget.items()} == {"tofu_1": wanted[:4], "tofu_2": wanted[4:8]}
    drawn = [(r["domain"], r["question"]) for r in splits.retain]
    never = [(r["domain"], r["question"]) for r in splits.utility]
    assert drawn == [
        ("retain", "retain_perturbed 0?"),
        ("retain", "retain_perturbed 2?"),
        ("retain", "retain_perturbed 4?"),
        ("real_authors", "real_authors_perturbed 0?"),
        ("real_authors", "real_authors_perturbed 2?"),
        ("world_facts", "world_facts_perturbed 0?"),
    ]
    assert never == [
        ("retain", "retain_perturbed 1?"),
        ("retain", "retain_perturbed 3?"),
        ("real_authors", "real_authors_perturbed 1?"),
        ("world_facts", "world_facts_perturbed 1?"),
    ]
    assert len(splits.holdout) == 4 and len(splits.generic) == 6
    assert not any("forget10" in text for text in splits.generic)


def test_tofu_refuses_what_is_not_there(tofu_folder: Path) -> None:
    with pytest.raises(InputError, match="holds 9 records, and 10 are asked for"):
        tofu(TofuParams(path=str(tofu_folder), requests=5, records_per_request=2), seed=0)
    (tofu_folder / "holdout10.jsonl").unlink()
    with pytest.raises(InputError, match=r"holdout10\.jsonl: no such file"):
        tofu(TofuParams(path=str(tofu_folder), requests=1, records_per_request=2), seed=0)
    assert (
        tofu(TofuParams(path=str(tofu_folder), requests=1, records_per_request=2, holdout=None), seed=0).holdout == ()
    )


def test_tofu_requests_and_retain_records_can_come_from_one_configuration(tofu_folder: Path) -> None:
    both = {"forget": "forget10_perturbed", "retain": "forget10_perturbed", "generic": None}
    params = TofuParams(path=str(tofu_folder), skip=5, requests=2, records_per_request=2, retain_records=5, **both)
    splits, every = tofu(params, seed=0), rows(9, "forget10_perturbed")
    assert {name: list(part) for name, part in splits.forget.items()} == {"tofu_1": every[5:7], "tofu_2": every[7:9]}
    drawn = [r["question"] for r in splits.retain if r["domain"] == "retain"]
    never = [r["question"] for r in splits.utility if r["domain"] == "retain"]
    assert (drawn, never) == ([r["question"] for r in every[0:5:2]], [r["question"] for r in every[1:5:2]])
    assert splits.generic == []
    with pytest.raises(InputError, match=r"1 of the retain records are requested too"):
        tofu(params.model_copy(update={"retain_records": 6}), seed=0)
    with pytest.raises(InputError, match="forget10_perturbed holds 9 records, and 10 are asked for"):
        tofu(params.model_copy(update={"retain_records": 10, "skip": 0}), seed=0)


@pytest.mark.skipif(not os.environ.get("ALKN_DATA"), reason="ALKN_DATA is not set: the real TOFU files are elsewhere")
def test_tofu_as_published_has_the_sizes_of_the_protocol() -> None:
    splits = tofu(TofuParams(), seed=0)
    assert {name: len(part) for name, part in splits.forget.items()} == {f"tofu_{i}": 80 for i in range(1, 6)}
    assert (len(splits.retain), len(splits.utility), len(splits.holdout)) == (309, 308, 400)
    assert not {r["question"] for r in splits.retain} & {r["question"] for part in splits.forget.values() for r in part}


def test_records_are_the_users_own_files(write: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "generic.txt"
    text.write_text("one line\nanother\n", encoding="utf-8")
    made = records(
        RecordsParams(
            retain=str(write("keep.jsonl", [{**row, "id": f"user-{i}"} for i, row in enumerate(rows(3, "keep"))])),
            utility=str(write("measure.jsonl", rows(2, "measure"))),
            forget={"ada": str(write("ada.jsonl", rows(1, "ada")))},
            generic=str(text),
        ),
        seed=0,
    )
    assert list(made.retain) == rows(3, "keep"), "the user's own ids are not kept"
    assert list(made.utility) == rows(2, "measure") and list(made.forget["ada"]) == rows(1, "ada")
    assert list(made.generic) == ["one line", "another"] and made.holdout == ()


def test_relative_paths_are_those_of_the_project_folder(
    write: Callable[..., Path], tofu_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the working folder is, where a file of the same name must not be taken; absolute ones stay."""
    elsewhere = tmp_path / "elsewhere"
    project = Project(tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (elsewhere, project.root / "files"):
        folder.mkdir(parents=True)
        for name in ("keep.jsonl", "ada.jsonl", "never.jsonl"):
            (folder / name).write_text(json.dumps({"question": f"{folder.name}?", "answer": name}) + "\n")
    (project.root / "files" / "generic.txt").write_text("a line\n")
    monkeypatch.chdir(elsewhere)
    files = {
        "retain": "files/keep.jsonl", "utility": str(write("measure.jsonl", rows(2, "absolute"))),
        "holdout": "files/never.jsonl", "forget": {"ada": "files/ada.jsonl", "home": "~/measure.jsonl"},
        "generic": "files/generic.txt",
    }  # fmt: skip
    settings = Settings.model_validate({"benchmark": {"name": "records", **files}})
    build_splits(project, settings)
    assert settings.of_data()["benchmark"]["retain"] == "files/keep.jsonl", "what is frozen can be moved"
    assert [row["question"] for row in load_split(project, "retain")] == ["files?"]
    assert [row["answer"] for row in load_split(project, "holdout")] == ["never.jsonl"]
    assert [row["question"] for row in load_split(project, "utility")] == ["absolute 0?", "absolute 1?"]
    assert {name: len(part) for name, part in known_records(project).items()} == {"ada": 1, "home": 2}
    assert generic_text(project) == ["a line"]

    for path in ("../", str(tofu_folder)):
        tofu_settings = {"name": "tofu", "path": path, "requests": 1, "records_per_request": 2}
        build_splits(project, Settings.model_validate({"benchmark": tofu_settings}))
        assert len(load_split(project, "retain")) == 6
    with pytest.raises(InputError, match="project/nowhere/forget10_perturbed.jsonl: no such file"):
        build_splits(project, Settings.model_validate({"benchmark": {"name": "tofu", "path": "nowhere"}}))


def test_records_refuse_bad_ids_and_bad_files(write: Callable[..., Path]) -> None:
    good = str(write("keep.jsonl", rows(1, "keep")))
    with pytest.raises(InputError, match="request id 'base' is taken"):
        records(RecordsParams(retain=good, utility=good, forget={"base": good}), seed=0)
    bad = str(write("bad.jsonl", [{"question": "q", "answer": " "}]))
    with pytest.raises(InputError, match=r"bad\.jsonl: line 1: field 'answer'"):
        records(RecordsParams(retain=bad, utility=good, forget={}), seed=0)
