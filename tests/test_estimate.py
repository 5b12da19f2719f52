"""What a run is judged to cost: the memory of methods that hold more copies of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alkn.errors import InputError
from alkn.estimate import check_disk, estimate
from alkn.manifest import write_manifest
from alkn.project import Project
from alkn.requests.ledger import Entry, Ledger
from alkn.settings import validate_settings


def test_an_adversary_and_adapters_change_the_memory(tiny_ground: Project, tiny_values: dict[str, Any]) -> None:
    """In float32 copies of the stored model: 8, 6 more for the adversary's weights, 3 where adapters are trained."""
    size = sum(path.stat().st_size for path in tiny_ground.base.model.iterdir())

    def copies(**changes: Any) -> float:
        settings = validate_settings({**tiny_values, **changes}, tiny_ground.params)
        return estimate(tiny_ground, settings, Ledger()).memory / size

    assert copies() == 8
    assert copies(method={"name": "alkn", "preset": "resistant"}) == 14
    assert copies(method={"name": "alkn", "preset": "resistant"}, lora={"rank": 2}) == 3
    assert copies(method="npo") == 8


def test_disk_and_time_grow_with_what_is_pending(
    tiny_project: Callable[..., Project], tiny_values: dict[str, Any]
) -> None:
    """Five models on disk a step; a record takes what it took the steps so far, here 10 s for 4."""
    project = tiny_project()
    settings = validate_settings(tiny_values, project.params)
    size = sum(path.stat().st_size for path in project.base.model.iterdir())
    entry = Entry(received="2026-01-01", records=4)
    step = project.step("r001")
    step.folder.mkdir(parents=True)
    write_manifest(step, inputs={}, outputs=(), seed=0, facts={"seconds": {"unlearn": 7.0, "evaluate": 3.0}})
    two = {"r002": entry, "r003": entry.model_copy(update={"records": 6})}
    found = estimate(project, settings, Ledger(accepted={"r001": entry}, pending=two))
    assert (found.disk, found.seconds) == (2 * 5 * size, 25.0)


def test_a_step_is_not_begun_on_a_full_disk(
    tiny_project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs is five models and a mebibyte."""
    project = tiny_project()
    needed = 5 * sum(path.stat().st_size for path in project.base.model.iterdir()) + 2**20
    monkeypatch.setattr("alkn.estimate.free_bytes", lambda path: needed)
    check_disk(project)
    monkeypatch.setattr("alkn.estimate.free_bytes", lambda path: needed - 1)
    with pytest.raises(InputError, match="the disk is full"):
        check_disk(project)
