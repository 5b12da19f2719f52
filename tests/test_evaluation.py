"""The evaluation's two files, of a base model and of a step: numbers, and the value of each record."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alkn.files import read_json, read_jsonl
from alkn.manifest import read_manifest
from alkn.project import Project
from alkn.record_sets import by_domain, load_split
from alkn.step import evaluate_step, make_step, plan_step

METHOD = {"name": "gradient_ascent", "steps": 20}


@pytest.fixture(scope="module")
def stepped(tiny_ground: Project, tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Project:
    """The tiny project with one step made by a quick method."""
    import shutil

    from alkn.files import write_yaml
    from alkn.settings import validate_settings

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
    for name, metrics in records.items():
        assert set(metrics) <= set(numbers[name])
        for metric, values in metrics.items():
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
    for metrics in read_json(stepped.step(step).per_record).values():
        for values in metrics.values():
            assert all(number.isdecimal() and isinstance(value, float) for number, value in values.items())


def test_evaluated_again_the_bytes_are_the_same(stepped: Project) -> None:
    from alkn.settings import load_settings

    step = stepped.step("r001")
    files = (step.evaluation, step.per_record, step.metrics)
    before = [path.read_bytes() for path in files]
    plan = plan_step(stepped, "r001", previous="base", earlier=(), settings=load_settings(step.params))
    evaluate_step(stepped, plan)
    assert [path.read_bytes() for path in files] == before
