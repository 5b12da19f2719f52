"""What a chain rests on: splits that belong to their benchmark, or to the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alkn.chain import prepare_data
from alkn.errors import InputError
from alkn.files import digest_of
from alkn.project import Project
from alkn.record_sets import adopt_split, load_split
from alkn.requests.ledger import Ledger, save_ledger
from alkn.settings import Settings

SMALL = {
    "name": "people", "requests": 1, "customers_per_request": 1, "records_per_customer": 2, "kept_customers": 2,
    "holdout_customers": 1, "facts": 2,
}  # fmt: skip


def with_benchmark(**more: Any) -> Settings:
    return Settings.model_validate({"benchmark": {**SMALL, **more}})


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    save_ledger(made, Ledger())
    return made


def test_splits_are_built_once_and_again_for_other_settings(project: Project) -> None:
    """As long as nothing rests on them."""
    assert prepare_data(project, with_benchmark())
    first = digest_of(project.splits)
    assert not prepare_data(project, with_benchmark())
    assert prepare_data(project, with_benchmark(facts=3))
    assert digest_of(project.splits) != first


def test_a_benchmark_that_made_the_splits_cannot_be_removed(project: Project) -> None:
    prepare_data(project, with_benchmark())
    before = digest_of(project.root)
    with pytest.raises(InputError, match=r"params.yaml: benchmark: data/splits were made by 'people', and none is"):
        prepare_data(project, Settings())
    assert digest_of(project.root) == before


def test_a_benchmark_does_not_replace_the_users_own_splits(project: Project) -> None:
    """They are told apart by their pointer, which `alkn init` writes: splits that a killed build left have none."""
    adopt_split(project, "retain", [{"id": 0, "question": "q", "answer": "a"}])
    pointer = project.splits.with_name("splits.dvc")
    pointer.write_text("outs: []\n")
    assert not prepare_data(project, Settings())
    with pytest.raises(InputError, match="params.yaml: benchmark: data/splits are this project's own files"):
        prepare_data(project, with_benchmark())
    assert len(load_split(project, "retain")) == 1
    pointer.unlink()
    assert prepare_data(project, with_benchmark())
