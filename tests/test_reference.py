"""Reference models of a tiny project: what they never saw, the level they reach, and when they are found again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from alkn.against import ReferenceModels
from alkn.base import make_base, trained_on
from alkn.core.scoring import score
from alkn.encoding import Encoder
from alkn.errors import AlknError, ChainBroken, InputError
from alkn.files import read_json, write_jsonl, write_yaml
from alkn.models import load_model, load_tokenizer
from alkn.project import Project
from alkn.record_sets import build_splits, known_records, load_split
from alkn.reference import adopt_reference, make_reference, plan_reference, reference_ratios, request_records
from alkn.settings import Settings
from flows.cli import cli

SETTINGS = Settings.model_validate(
    {
        "benchmark": {
            "name": "people", "requests": 2, "customers_per_request": 2, "records_per_customer": 4,
            "kept_customers": 4, "holdout_customers": 2, "facts": 4,
        },
        "base": {
            "architecture": {"vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "layers": 2},
            "training": {"epochs": 60, "batch_size": 8, "lr": 0.01, "warmup": 10, "until": 0.9},
        },
        "evaluation": {"metrics": ["probability", "exact_memorization"], "generate": []},
        "run": {"threads": 1},
    }
)  # fmt: skip


def with_training(**changes: Any) -> Settings:
    training = SETTINGS.base.training.model_copy(update=changes)
    return SETTINGS.model_copy(update={"base": SETTINGS.base.model_copy(update={"training": training})})


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def p_of(model: Path, records: list[dict[str, Any]]) -> torch.Tensor:
    encoder = Encoder(load_tokenizer(model), SETTINGS.data, context=512)
    return score(load_model(model), encoder.examples("records", records)).probability


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Splits and a base model. Read only."""
    project = Project(tmp_path_factory.mktemp("ground"))
    build_splits(project, SETTINGS)
    make_base(project, SETTINGS)
    return project


@pytest.fixture(scope="module")
def asked(ground: Project) -> list[str]:
    return sorted(known_records(ground))


@pytest.fixture(scope="module")
def made(ground: Project, asked: list[str]) -> Any:
    """The reference without the first request."""
    return make_reference(ground, SETTINGS, without=asked[:1])


def test_it_knows_all_but_what_was_left_out(ground: Project, asked: list[str], made: Any) -> None:
    known = known_records(ground)
    assert not made.cached
    assert float(p_of(ground.base.model, known[asked[0]]).mean()) > 0.9
    assert float(p_of(made.model, known[asked[0]]).mean()) < 0.1
    assert float(p_of(made.model, known[asked[1]]).mean()) > 0.9
    assert float(p_of(made.model, load_split(ground, "utility")).mean()) > 0.9


def test_it_reaches_the_base_models_level_on_retain(ground: Project, made: Any) -> None:
    base = read_json(ground.base.evaluation)["sets"]
    for domain in {record["domain"] for record in load_split(ground, "retain")}:
        records = [record for record in load_split(ground, "retain") if record["domain"] == domain]
        level = float(p_of(made.model, records).mean())
        assert level >= base[f"retain/{domain}"]["probability"] - 0.005
        assert made.manifest["retain"][domain] == pytest.approx(level, abs=1e-4)


def test_the_manifest_says_what_was_done(ground: Project, asked: list[str], made: Any) -> None:
    known = known_records(ground)
    assert made.manifest["without"] == asked[:1]
    assert made.manifest["left_out"] == len(known[asked[0]])
    assert made.manifest["records"] == sum(map(len, trained_on(ground).values())) - len(known[asked[0]])
    forgotten = made.manifest["forgotten"][asked[0]]
    assert forgotten["probability"] == pytest.approx(float(p_of(made.model, known[asked[0]]).mean()), abs=1e-4)
    text = (made.folder / "manifest.json").read_text()
    assert not any(record["answer"] in text for record in known[asked[0]])


def test_the_tokenizer_is_the_base_models(ground: Project, made: Any) -> None:
    assert sha(made.model / "tokenizer.json") == sha(ground.base.model / "tokenizer.json")


def test_asked_again_it_is_found(ground: Project, asked: list[str], made: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    again = make_reference(ground, SETTINGS, without=asked[:1])
    assert again.cached and again.folder == made.folder and again.digest == made.digest
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before


def test_the_same_records_under_another_id_are_the_same_reference(ground: Project, asked: list[str], made: Any) -> None:
    """A request's stored file has other numbers and a salt; what decides is which records are left out."""
    records = [{**record, "id": 50 - i} for i, record in enumerate(known_records(ground)[asked[0]])]
    write_jsonl(ground.request("r001"), records[::-1])
    assert make_reference(ground, SETTINGS, without=["r001"]).folder == made.folder
    assert request_records(ground, "r001")[0]["id"] == 50 - len(records) + 1


def test_what_decides_changes_the_digest(ground: Project, asked: list[str], made: Any) -> None:
    """Seed, settings and requests, each on its own; what only decides the metrics does not."""

    def folder(settings: Settings = SETTINGS, without: Sequence[str] = asked[:1], seed: int = 0) -> Path:
        return plan_reference(ground, settings, without=without, seed=seed).step.folder

    assert folder() == made.folder == folder(with_training(lr=SETTINGS.base.training.lr))
    assert folder(SETTINGS.model_copy(update={"seed": 7})) == made.folder
    others = [folder(seed=1), folder(without=asked), folder(without=asked[1:]), folder(with_training(lr=0.011))]
    assert len({made.folder, *others}) == 5


def test_another_seed_is_another_model(ground: Project, asked: list[str], made: Any, tmp_path: Path) -> None:
    """Weights differ from the first seed's and from the base model's, which has a seed of its own."""
    project = Project(tmp_path / "copy")
    shutil.copytree(ground.root, project.root)
    other = make_reference(project, SETTINGS, without=asked[:1], seed=1)
    first, second, base = (
        load_file(path / "model.safetensors") for path in (made.model, other.model, ground.base.model)
    )
    assert not any(torch.equal(first[name], second[name]) or torch.equal(first[name], base[name]) for name in first)


def test_a_changed_file_is_told(ground: Project, asked: list[str], made: Any, tmp_path: Path) -> None:
    project = Project(tmp_path / "copy")
    shutil.copytree(ground.root, project.root)
    weights = project.root / "reference" / made.folder.name / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ChainBroken, match=f"reference/{made.folder.name}/model is missing or was changed"):
        make_reference(project, SETTINGS, without=asked[:1])
    save_file(tensors, project.base.model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ChainBroken, match="steps/base/model was changed"):
        make_reference(project, SETTINGS, without=asked[:1])


def test_a_level_out_of_reach_is_an_error(ground: Project, asked: list[str], tmp_path: Path) -> None:
    project = Project(tmp_path / "copy")
    shutil.copytree(ground.root, project.root, ignore=shutil.ignore_patterns("reference"))
    with pytest.raises(AlknError, match=r"the reference has P 0\.\d+ on retain/\w+, and the base model 0\.9"):
        make_reference(project, with_training(epochs=1), without=asked)
    assert not list((project.root / "reference").rglob("manifest.json"))


def test_wrong_requests(ground: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nobody' has no records"):
        make_reference(ground, SETTINGS, without=["nobody"])
    with pytest.raises(InputError, match="none was named"):
        make_reference(ground, SETTINGS, without=[])
    write_jsonl(ground.request("alien"), [{"id": 0, "question": "Where is it?", "answer": "Nowhere at all."}])
    with pytest.raises(InputError, match="'alien' holds no record that the base model was trained on"):
        make_reference(ground, SETTINGS, without=["alien"])


def test_a_model_of_the_users(ground: Project, made: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(made.model, own)
    project = Project(tmp_path / "project")
    taken = adopt_reference(project, own)
    assert not taken.cached and taken.digest == made.digest and taken.model.is_symlink()
    assert adopt_reference(project, own).cached
    (own / "extra.txt").write_text("changed")
    assert adopt_reference(project, own).folder != taken.folder
    with pytest.raises(InputError, match="no such model folder"):
        adopt_reference(project, tmp_path / "nothing")
    outside = Project(tmp_path / "outside")
    shutil.copytree(ground.splits, outside.splits)
    settings = SETTINGS.model_copy(update={"base": SETTINGS.base.model_copy(update={"model": str(made.model)})})
    make_base(outside, settings)
    with pytest.raises(InputError, match="was not trained here"):
        make_reference(outside, settings, without=["any"])


def test_truth_ratios_under_it(ground: Project, asked: list[str], made: Any) -> None:
    """Who never saw the answers prefers the truth less than who did."""
    records = {asked[0]: request_records(ground, asked[0])}
    found = reference_ratios(made, records, SETTINGS)[asked[0]]
    assert set(found.per_record) == {record["id"] for record in records[asked[0]]} and not found.left_out


def test_the_command(ground: Project, asked: list[str], made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the settings that the base model was made with, so it finds what the library made."""
    monkeypatch.chdir(ground.root)
    write_yaml(ground.params, {"seed": 5})
    write_yaml(ground.base.params, SETTINGS.of_base())
    entries = {name: {"received": "2026-01-01", "records": 8} for name in asked}
    write_yaml(ground.ledger, {"accepted": {}, "pending": entries, "rejected": {}, "withdrawn": {}})

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["reference", *arguments])

    for without in (asked[0], "1"):
        answer = json.loads(call("--without", without, "--json").stdout)
        assert answer["cached"] and answer["digest"] == made.digest and answer["path"] == str(made.model)
        assert answer["forgotten"][asked[0]]["probability"] < 0.1
    shown = call("--path", str(made.model)).stdout
    assert made.digest in shown and str(ground.root / "reference") in shown
    assert "expected 1 to 2" in str(call("--without", "3").exception)
    assert "no request is accepted yet" in str(call().exception)
    ground.base.manifest.rename(ground.base.folder / "away")
    try:
        assert "no base model yet" in str(call("--without", "1").exception)
    finally:
        (ground.base.folder / "away").rename(ground.base.manifest)


def test_each_set_is_held_against_references_that_never_saw_it(ground: Project, asked: list[str], made: Any) -> None:
    """Made without the first request alone: it says nothing about the second, whichever of the two is the new one."""
    first, second = asked
    evaluation = SETTINGS.evaluation.model_copy(update={"references": (made.folder.name,)})
    models = ReferenceModels(ground, SETTINGS.model_copy(update={"evaluation": evaluation}), request=second)
    known, missing = models.of(f"earlier/{first}"), models.of("forget")
    assert missing.first is None and missing.reason.endswith(f"was made without {second}")
    assert list(known.probes) == [made.digest] and known.first is not None
    expected = p_of(made.model, known_records(ground)[first])
    assert sorted(known.first.scores.probability.tolist()) == pytest.approx(sorted(expected.tolist()), rel=1e-5)
    other = ReferenceModels(ground, SETTINGS.model_copy(update={"evaluation": evaluation}), request=first)
    assert other.of("forget").first is not None and other.of(f"earlier/{second}").first is None
