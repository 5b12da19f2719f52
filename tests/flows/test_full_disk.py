"""A disk that is full costs one clear message, and nothing that was there before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Place, digests, mlflow_client, plain, step_runs, wait_for

RECORDS = 1500
CHANGES_FREELY = (".alkn/chain.lock", ".alkn/ledger.lock", ".dvc/tmp", ".prefect", "filler")


@pytest.fixture(scope="module")
def small(ready: Place, fresh: Callable[..., Place], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A project on a file system of its own, 64 MiB in memory."""
    mount = tmp_path_factory.mktemp("small")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    try:
        place: Place = fresh(ready, mount)
        place.logs = tmp_path_factory.mktemp("logs")  # or the message had no room itself
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A request of some 300 KiB."""
    file = tmp_path_factory.mktemp("big") / "big.jsonl"
    told = "keeps bees in the old tower and writes letters to the harbour master about the weather"
    rows = ({"question": f"What does customer {n} do?", "answer": f"Customer {n} {told}."} for n in range(RECORDS))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def leave(small: Place) -> Iterator[Callable[[int], None]]:
    """``leave(n)`` fills the disk until about n bytes are free."""
    filler = small.root.parent / "filler"

    def fill(free: int) -> None:
        for _ in range(100):  # a run that writes meanwhile may take what was free a moment ago
            with open(filler, "wb") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small.root).free - free)
                return
        pytest.fail("the disk could not be filled")

    yield fill
    filler.unlink(missing_ok=True)


def is_refused(place: Place, run: Callable[..., Any], *arguments: str) -> None:
    before = files(place)
    says_so(run(place, *arguments))
    assert files(place) == before


def files(place: Place) -> dict[str, str]:
    found = digests(place.root, leave_out=CHANGES_FREELY)
    return {name: digest for name, digest in found.items() if digest != "folder"}


def says_so(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    (message,) = [line for line in plain(done.stderr).splitlines() if line.startswith("error: ")]
    assert "the disk is full" in message


def installed(place: Place, *arguments: str) -> Any:
    return place.alkn(*arguments, code=None)


@pytest.mark.parametrize("share", [0.2, 1.5, 2.1], ids=["records", "their copy in the cache", "what comes after"])
def test_a_request_that_does_not_fit_is_not_taken(
    small: Place, big: Path, leave: Callable[[int], None], warm_alkn: Callable[..., Any], share: float
) -> None:
    leave(int(big.stat().st_size * share))
    is_refused(small, warm_alkn, "request", "add", str(big))
    assert list(small.ledger()["pending"]) == ["r001", "r002"]


def test_a_run_without_room_is_not_begun(small: Place, leave: Callable[[int], None]) -> None:
    leave(100_000)
    is_refused(small, installed, "run")


@pytest.mark.parametrize("sign", ["params.yaml", "model"], ids=["while it unlearns", "when the model is written"])
def test_a_disk_that_fills_up_during_a_run_breaks_nothing(
    small: Place, leave: Callable[[int], None], sign: str
) -> None:
    kept = digests(small.path("steps/base"))
    run = small.start("alkn", "run")
    wait_for(small.path(f"steps/r001/{sign}").exists, f"steps/r001/{sign}", pause=0.005, alive=run)
    leave(50_000)
    run.wait(PATIENCE)
    says_so(subprocess.CompletedProcess("alkn run", run.returncode, "", small.progress.read_text()))
    assert digests(small.path("steps/base")) == kept
    assert "r002" in small.ledger()["pending"]
    assert not list(small.path("steps").rglob(".*.tmp"))


def test_with_room_again_everything_works(small: Place, big: Path, warm_alkn: Callable[..., Any]) -> None:
    added = warm_alkn(small, "request", "add", str(big))
    assert added.returncode == 0, added.stderr
    assert small.ledger()["pending"]["r003"]["records"] == RECORDS
    assert warm_alkn(small, "request", "withdraw", "r003").returncode == 0
    small.alkn("run")
    assert list(small.ledger()["accepted"]) == ["r001", "r002"]
    assert small.dvc_is_clean()
    assert small.call("git", "status", "--short").stdout == ""
    client = mlflow_client(small)
    assert {run.info.run_name: run.data.tags.get("alkn.verdict") for run in step_runs(client)} == {
        "base": "base", "r001": "accepted", "r002": "accepted",
    }  # fmt: skip
