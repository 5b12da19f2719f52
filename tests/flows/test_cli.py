"""The command line by itself: quick to answer, harmless where it says so, and not led on by a changed chain."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BIN, Place, digests

HEAVY = {"torch", "transformers", "prefect", "mlflow", "dvc", "pandas", "pandera", "datasets", "matplotlib", "pydantic"}
LOCKS = (".alkn/chain.lock", ".alkn/ledger.lock")


@pytest.fixture
def imported(env: dict[str, str], tmp_path: Path) -> Callable[..., set[str]]:
    """``imported(*arguments, code=0)``: top-level names of the modules that the installed ``alkn`` imports."""

    def call(*arguments: str, code: int = 0) -> set[str]:
        place = Place(tmp_path, env)
        done = place.call(sys.executable, "-X", "importtime", str(BIN / "alkn"), *arguments, code=code)
        names = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s*([\w.]+)$", done.stderr, re.MULTILINE)
        return {name.partition(".")[0] for name in names}

    return call


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["request", "add", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(imported: Callable[..., set[str]], arguments: list[str]) -> None:
    found = imported(*arguments)
    assert {"click", "flows"} <= found, "the list of imports was not read"
    assert found & HEAVY == set()


def test_heavy_imports_are_seen_where_there_are_any(imported: Callable[..., set[str]]) -> None:
    """So that the test above can fail."""
    assert {"torch", "transformers", "pydantic"} <= imported("report", code=2)


def everything(place: Place) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file, without exception."""
    found = digests(place.root)
    return {name: (digest, (place.root / name).lstat().st_mtime_ns) for name, digest in found.items()}


def test_a_dry_run_changes_nothing(ready: Place, fresh: Callable[..., Place], warm_alkn: Callable[..., Any]) -> None:
    """Neither in the copy of a project with two pending requests, nor in an empty home beside it."""
    place = fresh(ready)
    place.env["HOME"] = str(place.root.parent / "home")
    before = everything(place)
    assert len(before) > 50
    said = warm_alkn(place, "run", "--dry-run")
    assert (said.returncode, said.stderr) == (0, "")
    assert re.search(r"r001 .*base", said.stdout) and re.search(r"r002 .*r001", said.stdout)
    told = warm_alkn(place, "run", "--dry-run", "--json", "--set", "method.lr=0.1")
    assert (told.returncode, yaml.safe_load(told.stdout)["pending"]) == (0, ["r001", "r002"])
    installed = place.alkn("run", "--dry-run")
    free = re.compile(r"[\d,]+ MiB free")  # of the whole disk, on which others write too
    assert free.sub("", installed.stdout) == free.sub("", said.stdout) and free.search(said.stdout)
    assert everything(place) == before
    assert not Path(place.env["HOME"]).exists()


@pytest.fixture(scope="module")
def longer(chain: Place, fresh: Callable[..., Place], warm_alkn: Callable[..., Any]) -> Place:
    """The chain of two accepted steps, with a third request pending; a test puts back what it changes."""
    place = fresh(chain)
    added = warm_alkn(place, "request", "add", place.forget("r003"))
    assert added.returncode == 0, added.stderr
    return place


@pytest.fixture
def tampered(longer: Place) -> Iterator[Path]:
    """One bit of the newest accepted model's weights is another, in a file of its own: DVC's cache is left alone."""
    weights = longer.path("steps/r002/model/model.safetensors")
    kept = weights.read_bytes()
    changed = bytearray(kept)
    changed[-1] ^= 1
    for content, at in ((bytes(changed), None), (kept, "end")):
        new = weights.with_name("new")
        new.write_bytes(content)
        os.replace(new, weights)
        if at is None:
            yield weights


def test_a_tampered_parent_is_told_and_not_built_upon(longer: Place, tampered: Path) -> None:
    """A check failed, so the exit status is 1; the request stays pending, and git gets no record of it."""
    log = longer.call("git", "log", "--format=%s").stdout
    manifests = {step: longer.manifest(step) for step in ("base", "r001", "r002")}
    for command in (["run"], ["champion"]):
        done = longer.alkn(*command, code=1)
        assert "error: steps/r002/model was changed after it was made" in done.stderr
        assert "Traceback" not in done.stderr
    assert list(longer.ledger()["accepted"]) == ["r001", "r002"] and list(longer.ledger()["pending"]) == ["r003"]
    assert sorted(path.name for path in longer.path("steps/r003").iterdir()) == ["params.yaml"]
    assert {step: longer.manifest(step) for step in manifests} == manifests
    assert longer.call("git", "log", "--format=%s").stdout.replace("Record the chain\n", "") == log.replace(
        "Record the chain\n", ""
    )


def test_a_step_that_was_only_planned_is_no_record(longer: Place, warm_alkn: Callable[..., Any]) -> None:
    """What the failed plan of the test above left is not committed by a later run: only what is decided is."""
    assert longer.path("steps/r003/params.yaml").is_file()
    assert warm_alkn(longer, "request", "withdraw", "r003").returncode == 0
    assert longer.alkn("run").stdout.rstrip().endswith("nothing was pending")
    assert "Record r003" not in longer.call("git", "log", "--format=%s").stdout
    assert longer.call("git", "ls-files", "steps/r003").stdout == ""
    assert longer.call("git", "ls-files", "steps/r002").stdout.split() == [
        "steps/r002/manifest.json", "steps/r002/params.yaml",
    ]  # fmt: skip
    ledger = yaml.safe_load(longer.call("git", "show", "HEAD:data/ledger.yaml").stdout)
    assert list(ledger["withdrawn"]) == ["r003"], "the withdrawal itself is recorded"


CHANGED = {
    "seed": ({"seed": 1}, "data/splits no longer fits params.yaml (seed or benchmark changed)"),
    "benchmark changed": ({"benchmark": {"facts": 9}}, "data/splits no longer fits params.yaml"),
    "benchmark removed": ({"benchmark": None}, "benchmark: data/splits were made by 'people', and none is named"),
    "how records become text": ({"data": {"chunk_tokens": 99}}, "steps/base no longer fits params.yaml"),
    "the base model's training": ({"base": {"training": {"epochs": 3}}}, "steps/base no longer fits params.yaml"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_settings_that_a_chain_rests_on_cannot_change(
    chain: Place, fresh: Callable[..., Place], warm_alkn: Callable[..., Any], case: str
) -> None:
    """Exit status 2, and splits, base, steps and ledger are as they were."""
    place = fresh(chain)
    change, wanted = CHANGED[case]
    place.edit(**change)
    parts = ("data", "steps", "dvc.lock", "dvc.yaml")
    before = {part: digests(place.path(part)) or place.path(part).read_bytes() for part in parts}
    done = warm_alkn(place, "run")
    assert done.returncode == 2, done.stderr
    assert f"error: {wanted}" in done.stderr.replace("error: params.yaml: ", "error: ")
    assert "own with 'alkn init'" in done.stderr and "Traceback" not in done.stderr
    assert {part: digests(place.path(part)) or place.path(part).read_bytes() for part in parts} == before
    assert place.dvc_is_clean()


def test_settings_of_later_steps_can_change(chain: Place, fresh: Callable[..., Place]) -> None:
    place = fresh(chain)
    place.edit(method={"lr": 0.1}, targets={"p": 0.2}, gates={"utility": {"base": 0.5}}, evaluation={"generate": []})
    manifests = {step: place.manifest(step) for step in ("base", "r001", "r002")}
    assert place.alkn("run").stdout.rstrip().endswith("nothing was pending")
    assert {step: place.manifest(step) for step in manifests} == manifests
    assert place.dvc_is_clean()
