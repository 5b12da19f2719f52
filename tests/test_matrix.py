"""The regression matrix on a chain of small models: its numbers, samples, what it keeps and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alkn import score_cache
from alkn.encoding import Encoder
from alkn.errors import ChainBroken, InputError
from alkn.files import keyed_digest_of, read_json, read_jsonl, write_yaml
from alkn.manifest import write_manifest
from alkn.matrix import Matrix, regression_matrix
from alkn.models import load_model, load_tokenizer, save_model
from alkn.project import Project
from alkn.record_sets import by_domain, load_split
from alkn.requests.ledger import Entry, Ledger, save_ledger
from alkn.settings import Settings, validate_settings

REQUESTS = ("r001", "r002")


@pytest.fixture(scope="module")
def settled(
    tiny_ground: Project, tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Project, Settings]:
    """Two accepted requests; the model of each is its parent with noise on every weight. Read only."""
    project = Project(tmp_path_factory.mktemp("settled") / "p")
    shutil.copytree(tiny_ground.root, project.root)
    settings = validate_settings(tiny_values, project.params)
    tokenizer, model, entries, previous = load_tokenizer(project.base.model), load_model(project.base.model), {}, "base"
    generator = torch.Generator().manual_seed(0)
    for name in REQUESTS:
        step = project.step(name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
        save_model(model, tokenizer, step.model)
        write_yaml(step.params, settings.of_step())
        inputs = {"request": keyed_digest_of(project.request(name), project.key())}
        write_manifest(step, inputs=inputs, outputs=(step.model,), seed=0, facts={"accepted": True})
        entries[name] = Entry(received="2026-01-01", records=4, digest=inputs["request"], previous=previous)
        previous = name
    save_ledger(project, Ledger(accepted=entries))
    return project, settings


@pytest.fixture
def chain(settled: tuple[Project, Settings], tmp_path: Path) -> tuple[Project, Settings]:
    """A copy that a test may change."""
    shutil.copytree(settled[0].root, tmp_path / "p")
    return Project(tmp_path / "p"), settled[1]


@contextmanager
def counted_calls(vocab_size: int) -> Iterator[list[str]]:
    """Every call of any module of any model, by a hook on all of them; that of a language-model head as ``head``."""
    calls: list[str] = []

    def count(module: nn.Module, _given: Any, _said: Any) -> None:
        is_head = isinstance(module, nn.Linear) and module.out_features == vocab_size
        calls.append("head" if is_head else type(module).__name__)

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def one_by_one(project: Project, model_id: str, records: list[dict[str, Any]], settings: Settings) -> dict[str, float]:
    """P and exact memorization, a record at a time through the plain forward."""
    folder = project.step(model_id).model
    model, encoder = load_model(folder), Encoder(load_tokenizer(folder), settings.data, context=512)
    p, hits = [], []
    for example in encoder.examples("records", records):
        with torch.no_grad():
            logits = model(input_ids=example.tokens[None]).logits[0, example.answer_start - 1 : -1]
        answer = example.tokens[example.answer_start :]
        p.append(float(torch.exp(-nn.functional.cross_entropy(logits, answer))))
        hits.append(float((logits.argmax(-1) == answer).float().mean()))
    return {"probability": sum(p) / len(p), "exact_memorization": sum(hits) / len(hits)}


def test_every_model_on_every_request_and_domain(chain: tuple[Project, Settings]) -> None:
    project, settings = chain
    found = regression_matrix(project, settings)
    content = found.content
    assert content["models"] == ["base", *REQUESTS] and content["requests"] == list(REQUESTS)
    assert read_json(project.root / "reports" / "matrix.json") == content and content["missing"] == {}
    utility = by_domain(load_split(project, "utility"))
    for model in content["models"]:
        for request in REQUESTS:
            cell = content["cells"][model][request]
            expected = one_by_one(project, model, read_jsonl(project.request(request)), settings)
            assert {name: cell[name] for name in expected} == pytest.approx(expected, abs=1e-5)
            assert (cell["records"], cell["of"], cell["error"], cell["confidence"]) == (4, 4, 0.0, 1.0)
        for domain, records in utility.items():
            expected = one_by_one(project, model, records, settings)
            assert content["utility"][model][domain] == pytest.approx(expected["probability"], abs=1e-5)
            hits = content["utility_exact_memorization"][model][domain]
            assert hits == pytest.approx(expected["exact_memorization"], abs=1e-5)
    base = read_json(project.base.evaluation)["sets"]
    assert content["cells"]["base"]["r001"]["probability"] == pytest.approx(base["known/r001"]["probability"], abs=1e-6)
    assert content["cells"]["r002"]["r001"]["probability"] < content["cells"]["base"]["r001"]["probability"]
    words = {word for row in read_jsonl(project.request("r001")) for word in row["answer"].split() if len(word) > 4}
    assert words and not any(word in json.dumps(content) for word in words)


def test_asked_again_no_model_is_run(chain: tuple[Project, Settings]) -> None:
    project, settings = chain
    vocab_size = load_model(project.base.model).config.vocab_size
    with counted_calls(vocab_size) as calls:
        first = regression_matrix(project, settings)
    assert calls.count("head") == 3 * 3, "a model: one batch of all records, and two passes to look at its head"
    with counted_calls(vocab_size) as calls:
        second = regression_matrix(project, settings)
    assert calls == [] and second.content == first.content
    assert (first.kept, second.scored) == (0, 0) and first.scored == second.kept > 0
    files = sorted((project.private / "cache").iterdir())
    assert len(files) == 3 * len(second.content["digests"]["records"])
    assert all(len(path.stem) == 40 and "r00" not in path.name for path in files)


def test_a_sample_has_its_bound_and_more_is_measured_on_demand(chain: tuple[Project, Settings]) -> None:
    project, settings = chain
    few = settings.model_copy(update={"verification": settings.verification.model_copy(update={"records": 2})})
    sampled = regression_matrix(project, few)
    exact = regression_matrix(project, few, exact=True)
    for model in exact.content["models"]:
        for request in REQUESTS:
            part, whole = sampled.content["cells"][model][request], exact.content["cells"][model][request]
            assert (part["records"], part["of"], part["confidence"]) == (2, 4, 0.95) and whole["error"] == 0.0
            for name in ("probability", "exact_memorization"):
                low, high = part["intervals"][name]
                assert low <= whole[name] <= high
                assert max(high - part[name], part[name] - low) <= part["error"] <= 0.5 + 1e-9
    assert exact.scored == 3 * 2 * 2, "the records that the sample had not"
    assert regression_matrix(project, few).content == sampled.content, "the same sample again, from what was kept"


@pytest.mark.parametrize("damage", ["half", "number"])
def test_a_damaged_file_of_the_cache_is_told_and_made_again(
    chain: tuple[Project, Settings], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    project, settings = chain
    first = regression_matrix(project, settings)
    path = min((project.private / "cache").iterdir())
    raw = path.read_bytes()
    sealed = json.loads(raw)
    number = next(iter(sealed["content"]["records"]))
    sealed["content"]["records"][number][0] = 0.0
    path.write_bytes({"half": raw[: len(raw) // 2], "number": json.dumps(sealed).encode()}[damage])
    second = regression_matrix(project, settings)
    fault = "was changed after it was written" if damage == "number" else "is damaged"
    assert second.told == (f"{path.name} {fault}",)
    assert path.name in caplog.text and 0 < second.scored < first.scored
    again = json.loads(path.read_bytes())["content"]["records"]
    for number, scores in json.loads(raw)["content"]["records"].items():
        assert again[number] == pytest.approx(scores, abs=1e-6), "another batch, another last bit"
    assert regression_matrix(project, settings).told == ()


def test_a_changed_model_or_request_is_refused(chain: tuple[Project, Settings]) -> None:
    project, settings = chain
    shutil.copy(project.base.model / "model.safetensors", project.step("r001").model / "model.safetensors")
    with pytest.raises(ChainBroken, match="steps/r001/model was changed"):
        regression_matrix(project, settings)
    shutil.copy(project.request("r001"), project.request("r002"))
    with pytest.raises(ChainBroken, match=r"data/requests/r002.jsonl is not the file"):
        regression_matrix(project, settings)


def test_a_model_that_is_gone(chain: tuple[Project, Settings]) -> None:
    """What was kept of it still counts; without that the reason stands in its place."""
    project, settings = chain
    before = regression_matrix(project, settings)
    shutil.rmtree(project.step("r001").model)
    assert regression_matrix(project, settings).content == before.content
    shutil.rmtree(project.private / "cache")
    after: Matrix = regression_matrix(project, settings)
    assert after.content["cells"]["r001"] == {} and "r001.request/r002" in after.content["missing"]
    assert after.content["cells"]["r002"] == before.content["cells"]["r002"]


def test_without_a_base_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no base model yet"):
        regression_matrix(Project(tmp_path), Settings())


def test_the_command(chain: tuple[Project, Settings], tiny_values: dict[str, Any]) -> None:
    """Tables for people, the file's content for machines; nothing of a record's text."""
    from click.testing import CliRunner

    from flows.cli import cli

    project, _ = chain
    write_yaml(project.params, {**tiny_values, "verification": {"records": 3}})
    here = Path.cwd()
    try:
        shown = CliRunner().invoke(cli, ["-C", str(project.root), "evaluate"])
        again = CliRunner().invoke(cli, ["-C", str(project.root), "evaluate", "--exact", "--json"])
    finally:
        os.chdir(here)
    assert shown.exit_code == again.exit_code == 0, shown.output + again.output
    assert "0 known from before" in shown.output and "±" in shown.output and "customers" in shown.output
    content = json.loads(again.stdout)
    assert content == read_json(project.root / "reports" / "matrix.json")
    assert content["cells"]["base"]["r001"]["records"] == content["cells"]["base"]["r001"]["of"] == 4


def test_what_is_kept_rests_on_every_file_that_a_score_comes_from() -> None:
    """Scoring and what it imports of the core; but not what only several processes use."""
    package, todo, found = Path(score_cache.__file__).parent, ["core/scoring.py"], set()
    while todo:
        name = todo.pop()
        found.add(name)
        imported = re.findall(r"^from alkn\.core\.(\w+) import", (package / name).read_text(), re.MULTILINE)
        todo += [path for module in imported if (path := f"core/{module}.py") not in found]
    assert found - {"core/distributed.py"} <= set(score_cache.SOURCES)
