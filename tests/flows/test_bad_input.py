"""Wrong input costs one clear message and exit status 2, and leaves every byte on disk as it was.

Most calls go through ``warm_alkn``: the same ``main`` in a process of its own, less the seconds of import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Place, digests
from filelock import FileLock

CANARY = "Quillonby-Zsarvexa"
GOOD = {"question": f"Who is {CANARY}?", "answer": f"{CANARY} keeps bees in the tower."}
CHANGES_FREELY = (".alkn/chain.lock", ".alkn/ledger.lock", ".dvc/tmp")


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture(scope="module")
def project(ready: Place, fresh: Callable[..., Place]) -> Place:
    """One copy for all cases: none may change it."""
    place = fresh(ready)
    place.edit(project={"name": "tiny"})
    return place


@pytest.fixture
def refused(warm_alkn: Callable[..., Any]) -> Callable[..., None]:
    """``refused(place, arguments, *wanted)``: exit 2, each wanted text in the errors, nothing else changed or told."""

    def check(place: Place, arguments: list[str], *wanted: str, run: Callable[..., Any] = warm_alkn) -> None:
        before = digests(place.root, leave_out=CHANGES_FREELY)
        done = run(place, *arguments)
        assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        first, *_ = errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert first and len(errors) < 10
        assert "Traceback" not in done.stderr
        for text in wanted:
            assert text in "\n".join(errors), f"{text!r} is not in:\n{done.stderr}"
        for word in CANARY.split("-"):
            assert word not in done.stderr + done.stdout
        assert done.stdout == ""
        assert digests(place.root, leave_out=CHANGES_FREELY) == before

    return check


FILES = {
    "missing": (None, ["no such file"]),
    "empty": ("", ["file is empty"]),
    "only blank lines": ("\n  \n", ["file is empty"]),
    "not UTF-8": (b'{"question": "\xff\xfe", "answer": "x"}\n', ["not UTF-8"]),
    "broken JSON": (lines(GOOD, GOOD, f'{{"question": "{CANARY}'), ["line 3: broken JSON"]),
    "no object": (lines(GOOD, [CANARY]), ["line 2: expected a JSON object, found list"]),
    "missing field": (lines(GOOD, {"question": CANARY}), ["line 2: field 'answer' is missing"]),
    "extra field": (lines({**GOOD, "adress": CANARY}), ["line 1: unknown field 'adress'"]),
    "text as field name": (lines({**GOOD, f"{CANARY} keeps bees": 1}), ["line 1: unknown field (its name is not"]),
    "no known field": (lines({"frage": CANARY}), ["line 1: no known fields", "question, answer"]),
    "empty answer": (lines({**GOOD, "answer": "  "}), ["line 1: field 'answer': expected text that is not empty"]),
    "number as answer": (lines(GOOD, {**GOOD, "answer": 7}), ["line 2: field 'answer'"]),
    "control character": (lines({**GOOD, "answer": CANARY + "\x00"}), ["field 'answer': expected no control char"]),
    "half a surrogate": ('{"question": "x", "answer": "\\ud800"}\n', ["field 'answer': expected valid Unicode"]),
    "ids twice": (lines({**GOOD, "id": CANARY}, {**GOOD, "id": CANARY}), ["line 2: field 'id': expected an id used"]),
    "chat without answer": (lines({"messages": [{"role": "user", "content": CANARY}]}), ["ending with the assistant"]),
    "all faults at once": (lines({"question": CANARY}, "{", {**GOOD, "answer": ""}), ["line 1:", "line 2:", "line 3:"]),
    "longer than the context": (
        lines(GOOD, {**GOOD, "answer": f"{CANARY} " * 200}),
        ["context of 512 tokens", "record 1 "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_of_records_is_refused(project: Place, refused: Any, tmp_path: Path, case: str) -> None:
    content, wanted = FILES[case]
    file = tmp_path / "records.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(project, ["request", "add", str(file)], "records.jsonl", *wanted)


YESTERDAY = (date.today() - timedelta(days=2)).isoformat()
OPTIONS = {
    "path as id": (["--id", "../../x"], ["'../../x'", "lower-case letter"]),
    "empty id": (["--id", ""], ["lower-case letter"]),
    "upper-case id": (["--id", "R003"], ["lower-case letter"]),
    "the base model's id": (["--id", "base"], ["'base' is taken"]),
    "a number as id": (["--id", "2024"], ["'2024'", "lower-case letter"]),
    "a word of YAML as id": (["--id", "on"], ["'on' is taken", "YAML"]),
    "an id that is too long": (["--id", "a" * 64], ["at most 62"]),
    "an id in use": (["--id", "r001"], ["'r001' is in use", "pending"]),
    "due in the past": (["--due", YESTERDAY], ["in the past"]),
    "due in another notation": (["--due", "31.12.2099"], ["YYYY-MM-DD"]),
    "no such day": (["--due", "2099-02-30"], ["YYYY-MM-DD"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_of_a_request_is_refused(project: Place, refused: Any, tmp_path: Path, case: str) -> None:
    options, wanted = OPTIONS[case]
    file = tmp_path / "records.jsonl"
    file.write_text(lines(GOOD))
    refused(project, ["request", "add", str(file), *options], *wanted)


def test_a_request_is_withdrawn_once(ready: Place, fresh: Any, refused: Any, warm_alkn: Any) -> None:
    place = fresh(ready)
    assert warm_alkn(place, "request", "withdraw", "r002").returncode == 0
    assert list(place.ledger()["withdrawn"]) == ["r002"]
    refused(place, ["request", "withdraw", "r002"], "'r002' is withdrawn already")
    refused(place, ["request", "withdraw", "nobody"], "no request 'nobody'")
    refused(place, ["request", "add", place.forget("r003"), "--id", "r002"], "'r002' is in use", "withdrawn")
    refused(place, ["request", "show", "nobody"], "no request 'nobody'")


SETTINGS = {
    "unknown key": ({"targest": {"p": 0.1}}, ["targest", "targets"]),
    "unknown key inside": ({"base": {"trainig": {"epochs": 3}}}, ["base.trainig", "training"]),
    "unknown key of a method": ({"method": {"name": "alkn", "epoch": 3}}, ["method.epoch", "epochs"]),
    "wrong type": ({"run": {"threads": "many"}}, ["run.threads", "'many'"]),
    "out of range": ({"targets": {"p": 1.5}}, ["targets.p", "1.5"]),
    "unknown method": ({"method": "aklm"}, ["aklm", "alkn"]),
    "unknown benchmark": ({"benchmark": {"name": "poeple"}}, ["poeple", "people"]),
    "unknown gate": ({"gates": {"utilty": {}}}, ["utilty", "utility"]),
    "unknown metric": ({"evaluation": {"metrics": ["probabilty"]}}, ["probabilty", "probability"]),
    "wrong setting of a gate": ({"gates": {"utility": {"base": "high"}}}, ["gates.utility.base", "'high'"]),
    "a gate as a word": ({"gates": {"utility": "never"}}, ["gates.utility"]),
    "a list": ([1, 2], ["expected a mapping"]),
    "no YAML": ("method: [", ["line 2", "not valid YAML"]),
}  # fmt: skip


@pytest.fixture
def params(project: Place) -> Iterator[Path]:
    path = project.path("params.yaml")
    kept = path.read_bytes()
    yield path
    path.write_bytes(kept)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_refused(project: Place, params: Path, refused: Any, case: str) -> None:
    change, wanted = SETTINGS[case]
    if isinstance(change, dict):
        params.write_text(yaml.safe_dump(yaml.safe_load(params.read_text()) | change))
    else:
        params.write_text(change + "\n" if isinstance(change, str) else yaml.safe_dump(change))
    refused(project, ["run"], "params.yaml", *wanted)
    refused(project, ["run", "--dry-run"], "params.yaml", *wanted)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("targets.q=0.1", ["targets.q"]),
        ("targets.p=much", ["targets.p", "'much'"]),
        ("targets.p", ["KEY=VALUE"]),
        ("=3", ["KEY=VALUE"]),
        ("method=npoo", ["npoo"]),
        ("targets.p=[", ["not valid YAML"]),
        ("seed.deep=3", ["seed"]),
    ],
)
def test_a_wrong_override_is_refused(project: Place, refused: Any, override: str, wanted: list[str]) -> None:
    refused(project, ["run", "--set", override], *wanted)


def model_folder(folder: Path, *files: str) -> Path:
    for name in files:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


INITS = {
    "folder in use": (["used"], ["used", "not empty"]),
    "file in the way": (["used/file"], ["not empty"]),
    "no model folder": (["new", "--model", "./nowhere", "--retain", "good.jsonl"], ["nowhere", "no such model folder"]),
    "no config": (["new", "--model", "bare", "--retain", "good.jsonl"], ["config.json is missing"]),
    "no weights": (["new", "--model", "empty", "--retain", "good.jsonl"], ["no weights in *.safetensors"]),
    "pickled weights": (["new", "--model", "pickled", "--retain", "good.jsonl"], ["pytorch_model.bin is a pickle"]),
    "no retain": (["new", "--model", "whole"], ["--retain"]),
    "retain not there": (["new", "--model", "whole", "--retain", "none.jsonl"], ["none.jsonl", "no such file"]),
    "retain broken": (["new", "--model", "whole", "--retain", "bad.jsonl"], ["bad.jsonl: line 1: broken JSON"]),
    "splits without a model": (["new", "--retain", "good.jsonl"], ["--model"]),
    "settings not there": (["new", "--params", "none.yaml"], ["none.yaml"]),
    "settings wrong": (["new", "--params", "bad.yaml"], ["bad.yaml", "targest"]),
}


@pytest.mark.parametrize("case", INITS)
def test_a_wrong_init_leaves_nothing_behind(env: dict[str, str], refused: Any, tmp_path: Path, case: str) -> None:
    arguments, wanted = INITS[case]
    model_folder(tmp_path / "used", "file")
    model_folder(tmp_path / "bare", "model.safetensors")
    model_folder(tmp_path / "empty", "config.json", "tokenizer.json")
    model_folder(tmp_path / "pickled", "config.json", "pytorch_model.bin")
    model_folder(tmp_path / "whole", "config.json", "model.safetensors")
    (tmp_path / "good.jsonl").write_text(lines(GOOD))
    (tmp_path / "bad.jsonl").write_text(f'{{"question": "{CANARY}\n')
    (tmp_path / "bad.yaml").write_text("targest: {p: 0.1}\n")
    refused(Place(tmp_path, env), ["init", *arguments], *wanted)


@pytest.mark.parametrize("command", [["run"], ["report"], ["request", "list"], ["champion"], ["serve"]])
def test_a_folder_that_is_no_project_is_refused(
    env: dict[str, str], refused: Any, tmp_path: Path, command: Any
) -> None:
    refused(Place(tmp_path, env), command, "not a project folder", "params.yaml is missing")
    refused(Place(tmp_path, env), ["-C", "nowhere", *command], "nowhere: no such folder")


def test_the_installed_command_says_the_same(project: Place, refused: Any) -> None:
    file = project.root.parent / "bad.jsonl"
    file.write_text(lines(GOOD, GOOD, f'{{"question": "{CANARY}'))
    refused(project, ["request", "add", str(file)], "bad.jsonl: line 3: broken JSON", run=installed)
    refused(project, ["run", "--set", "targets.q=1"], "targets.q", run=installed)


def installed(place: Place, *arguments: str) -> Any:
    return place.alkn(*arguments, code=None)


def test_a_second_run_at_the_same_time_is_refused(project: Place, refused: Any) -> None:
    with FileLock(project.path(".alkn/chain.lock")):
        refused(project, ["run"], "another 'alkn run' is at work", run=installed)


def test_serving_without_a_server_says_how_to_start_one(project: Place, refused: Any) -> None:
    refused(project, ["serve"], "no Prefect server answers at", "prefect server start", run=installed_alone)


def installed_alone(place: Place, *arguments: str) -> Any:
    alone = {name: value for name, value in place.env.items() if name != "PREFECT_API_URL"}
    return Place(place.root, alone).alkn(*arguments, code=None)
