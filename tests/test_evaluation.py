"""The evaluation's two files, of a base model and of a step: numbers, and the value of each record."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp

from alkn.base import project_sets
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.evaluation import evaluate_model
from alkn.files import digest_of, read_json, read_jsonl, write_json, write_yaml
from alkn.manifest import read_manifest
from alkn.models import Architecture, context_length, load_model, load_tokenizer, new_model, save_model
from alkn.planning import plan_step
from alkn.project import Project, Step
from alkn.record_sets import by_domain, load_split
from alkn.reference import adopt_reference, open_reference, reference_ratios
from alkn.registry import metrics
from alkn.settings import Data, load_settings, validate_settings
from alkn.step import evaluate_step, make_step

METHOD = {"name": "gradient_ascent", "steps": 20}


@pytest.fixture(scope="module")
def stepped(tiny_ground: Project, tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Project:
    """The tiny project with one step made by a quick method."""
    project = Project(tmp_path_factory.mktemp("stepped") / "p")
    shutil.copytree(tiny_ground.root, project.root)
    settings = validate_settings({**tiny_values, "method": METHOD}, project.params)
    write_yaml(project.step("r001").params, settings.of_step())
    make_step(project, "r001", previous="base", earlier=())
    return project


@pytest.mark.parametrize("step", ["base", "r001"])
def test_the_records_values_have_the_evaluations_means(step: str, stepped: Project) -> None:
    """Every metric of every set whose value is a mean over records, and no record is missing."""
    numbers = read_json(stepped.step(step).evaluation)["sets"]
    records = read_json(stepped.step(step).per_record)
    assert set(records) == set(numbers)
    for name, measured in records.items():
        assert set(measured) <= set(numbers[name])
        for metric, values in measured.items():
            if metric == "perplexity" or metric.startswith("forget_quality"):
                continue  # not a mean of its records
            mean = math.fsum(values.values()) / len(values)
            assert numbers[name][metric] == pytest.approx(mean, rel=1e-12), f"{name}.{metric}"
    utility = by_domain(load_split(stepped, "utility"))
    for domain, rows in utility.items():
        assert set(records[f"utility/{domain}"]["probability"]) == {str(row["id"]) for row in rows}


def test_the_worst_records_are_those_with_the_largest_values(stepped: Project) -> None:
    step = stepped.step("r001")
    numbers, values = read_json(step.evaluation)["sets"]["forget"], read_json(step.per_record)["forget"]["probability"]
    order = sorted(values, key=lambda number: (-values[number], int(number)))
    assert numbers["worst_records"] == [int(number) for number in order[:5]]
    assert numbers["probability_worst"] == max(values.values())


@pytest.mark.parametrize("step", ["base", "r001"])
def test_the_records_values_are_an_output_without_text(step: str, stepped: Project) -> None:
    """Sealed in the manifest; numbers under names of sets and metrics only."""
    manifest = read_manifest(stepped.step(step))
    assert manifest is not None and "per_record.json" in manifest["outputs"]
    text = stepped.step(step).per_record.read_text()
    answers = [row["answer"] for row in read_jsonl(stepped.request("r001"))]
    assert not any(answer in text for answer in answers)
    for measured in read_json(stepped.step(step).per_record).values():
        for values in measured.values():
            assert all(number.isdecimal() and isinstance(value, float) for number, value in values.items())


def test_evaluated_again_the_bytes_are_the_same(stepped: Project) -> None:
    step = stepped.step("r001")
    files = (step.evaluation, step.per_record, step.metrics)
    before = [path.read_bytes() for path in files]
    plan = plan_step(stepped, "r001", previous="base", earlier=(), settings=load_settings(step.params))
    evaluate_step(stepped, plan)
    assert [path.read_bytes() for path in files] == before


CHEAP = [name for name in metrics if metrics[name].scope == "records"]


@pytest.fixture(scope="module")
def whole(stepped: Project, tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Project:
    """The same step, measured by every metric, against a reference model of the user's, and on the user's text."""
    project = Project(tmp_path_factory.mktemp("whole") / "p")
    shutil.copytree(stepped.root, project.root)
    (project.root / "letters.txt").write_text("The baker sells bread.\nThe town is small.\n" * 25)
    tokenizer = load_tokenizer(project.base.model)
    stranger = new_model(
        Architecture(**tiny_values["base"]["architecture"]), vocab_size=len(tokenizer), eos_token_id=0, seed=5
    )
    save_model(stranger, tokenizer, project.root / "stranger")
    reference = adopt_reference(project, project.root / "stranger")
    evaluate_with(project, tiny_values, references=[reference.folder.name])
    return project


def evaluate_with(project: Project, values: dict[str, Any], **more: Any) -> None:
    evaluation = {"max_new_tokens": 8, "metrics": CHEAP, "texts": {"letters": "letters.txt"}, **more}
    settings = validate_settings({**values, "method": METHOD, "evaluation": evaluation}, project.params)
    write_yaml(project.step("r001").params, settings.of_step())
    assert load_settings(project.step("r001").params).evaluation == settings.evaluation
    evaluate_step(project, plan_step(project, "r001", previous="base", earlier=(), settings=settings))


def test_every_metric_of_sets_on_a_step(whole: Project) -> None:
    """On the forget set each has a value; what does not apply to a set is neither measured nor missing there."""
    found = read_json(whole.step("r001").evaluation)
    assert set(CHEAP) - {"perplexity"} <= set(found["sets"]["forget"])
    assert not any(name.startswith("forget.") for name in found["missing"])
    assert "min_k_auc" in found["sets"]["forget"] and "min_k" not in found["sets"]["utility/facts"]
    assert "loss" in found["sets"]["holdout"] and "loss_auc" not in found["sets"]["holdout"]


def test_the_reference_is_named_with_its_digest(whole: Project) -> None:
    """In the evaluation, and among what goes into the step."""
    found = read_json(whole.step("r001").evaluation)["references"]
    (folder,) = (whole.root / "reference").iterdir()
    manifest = read_manifest(Step(folder))
    assert manifest is not None and found == {folder.name: manifest["outputs"]["model"]}
    plan = plan_step(whole, "r001", previous="base", earlier=(), settings=load_settings(whole.step("r001").params))
    assert plan.inputs[f"reference/{folder.name}"] == manifest["outputs"]["model"]
    assert plan.inputs["text/letters"] == digest_of(whole.root / "letters.txt")


def test_the_references_numbers_are_the_stranger_models_own(whole: Project) -> None:
    """AUC and truth ratios of the reference, computed from the model folder by the functions beneath."""
    row = read_json(whole.step("r001").evaluation)["sets"]["forget"]
    values = read_json(whole.step("r001").per_record)["forget"]["forget_quality_reference"]
    settings = load_settings(whole.step("r001").params)
    (folder,) = (whole.root / "reference").iterdir()
    rows = read_jsonl(whole.request("r001"))
    ratios = reference_ratios(open_reference(whole, folder.name), {"r001": rows}, settings)["r001"]
    assert list(values.values()) == pytest.approx(ratios.values, rel=1e-9)
    own = read_json(whole.step("r001").per_record)["forget"]["forget_quality"]
    assert row["forget_quality"] == pytest.approx(ks_2samp(list(own.values()), ratios.values).pvalue, rel=1e-9)


def test_the_ceiling_is_the_reference_models_own_evaluation(whole: Project) -> None:
    """Set by set what the stranger has when it is measured by itself; nothing that compares it with itself."""
    found = read_json(whole.step("r001").evaluation)
    ((digest, ceiling),) = found["ceiling"].items()
    assert [digest] == list(found["references"].values())
    settings = load_settings(whole.step("r001").params)
    tokenizer = load_tokenizer(whole.base.model)
    encoder = Encoder(tokenizer, Data(), context=context_length(whole.base.model))
    sets = [encoder.record_set("forget", read_jsonl(whole.request("r001"))), *project_sets(whole, encoder)]
    alone = evaluate_model(load_model(whole.root / "stranger"), sets, encoder, settings.evaluation, eos=0)["sets"]
    assert set(ceiling) == set(alone)
    for name, row in ceiling.items():
        assert row == pytest.approx({metric: alone[name][metric] for metric in row})
    assert {"probability", "rouge_l", "loss_auc"} <= set(ceiling["forget"])
    assert not {"forget_quality", "privleak"} & set(ceiling["forget"])


def test_the_perplexity_of_the_users_text(whole: Project) -> None:
    """exp of the mean loss of all tokens, chunk after chunk, by a forward pass of each."""
    found = read_json(whole.step("r001").evaluation)["sets"]["text/letters"]["perplexity"]
    tokenizer, model = load_tokenizer(whole.step("r001").model), load_model(whole.step("r001").model)
    losses = []
    for example in Encoder(tokenizer, Data(), context=context_length(whole.base.model)).examples("x", [
        {"id": 0, "text": (whole.root / "letters.txt").read_text()}
    ]):  # fmt: skip
        with torch.no_grad():
            logits = model(input_ids=example.tokens[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, example.tokens[1:], reduction="none"))
    assert len(losses) > 1 and found == pytest.approx(float(torch.cat(losses).double().mean().exp()), rel=1e-4)


def test_a_reference_that_saw_the_request_does_not_count(whole: Project, tiny_values: dict[str, Any]) -> None:
    """The manifest says what it was made without."""
    (folder,) = (whole.root / "reference").iterdir()
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", {**manifest, "without": ["r002"]})
    try:
        evaluate_with(whole, tiny_values, references=[folder.name])
        found = read_json(whole.step("r001").evaluation)
        for name in ("forget_quality", "privleak", "reference_loss"):
            assert "made without r001" in found["missing"][f"forget.{name}"] and name not in found["sets"]["forget"]
    finally:
        write_json(folder / "manifest.json", manifest)


def test_without_a_holdout_a_reference_still_counts(whole: Project, tiny_values: dict[str, Any]) -> None:
    """What needs the holdout says so, under the model; the rest has its values."""
    (folder,) = (whole.root / "reference").iterdir()
    holdout = whole.splits / "holdout.jsonl"
    kept = holdout.read_bytes()
    holdout.unlink()
    try:
        evaluate_with(whole, tiny_values, references=[folder.name])
        found = read_json(whole.step("r001").evaluation)
        assert {"forget_quality", "loss", "reference_loss"} <= set(found["sets"]["forget"])
        for name in ("privleak", "loss_auc", "min_k_auc", "reference_loss_auc"):
            assert "no holdout" in found["missing"][f"forget.{name}"]
    finally:
        holdout.write_bytes(kept)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"references": ["0123456789abcdef"]}, "no reference model reference/0123456789abcdef"),
        ({"texts": {"gone": "gone.txt"}}, "evaluation.texts.gone: .*gone.txt: no such file"),
    ],
)
def test_what_is_named_and_not_there_is_told_before_anything_is_done(
    evaluation: dict[str, Any], message: str, whole: Project, tiny_values: dict[str, Any]
) -> None:
    values = {**tiny_values, "method": METHOD, "evaluation": {**tiny_values["evaluation"], **evaluation}}
    settings = validate_settings(values, whole.params)
    with pytest.raises(InputError, match=message):
        plan_step(whole, "r001", previous="base", earlier=(), settings=settings)
