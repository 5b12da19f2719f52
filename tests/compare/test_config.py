"""The file of a comparison: what is accepted, what it asks for, and what a mistake is answered with."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from alkn import registry
from alkn.compare.config import Cell, Comparison, Entry, load_comparison
from alkn.errors import InputError

ROOT = Path(__file__).parent.parent.parent
GOOD: dict[str, Any] = {
    "settings": {"benchmark": "people", "targets": {"p": 0.05}},
    "methods": [
        {"label": "ours", "method": "alkn"},
        {"label": "gd", "method": {"name": "gradient_difference", "steps": 7}, "sweep": {"lr": [1e-3, 1e-4]}},
    ],
}


def load(tmp_path: Path, **changes: Any) -> Comparison:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return load_comparison(path)


def test_cells_of_a_plain_method_and_of_a_sweep(tmp_path: Path) -> None:
    comparison = load(tmp_path, seeds=[4, 5])
    ours, gd = comparison.methods
    assert comparison.trials(ours) == []
    assert comparison.cells(ours) == [Cell("ours", "", 4), Cell("ours", "", 5)]
    assert comparison.trials(gd) == [Cell("gd", "lr=0.001", 4), Cell("gd", "lr=0.0001", 4)]
    assert comparison.cells(gd, "lr=0.0001") == [Cell("gd", "lr=0.0001", 4), Cell("gd", "lr=0.0001", 5)]
    assert Cell("gd", "lr=0.0001", 5).name == "gd/lr=0.0001/seed5"


def test_a_sweep_over_the_beginning_of_the_chain(tmp_path: Path) -> None:
    comparison = load(tmp_path, seeds=[4, 5], sweep_requests=2)
    _, gd = comparison.methods
    trial = Cell("gd", "lr=0.001", 4, trial=True)
    assert comparison.trials(gd) == [trial, Cell("gd", "lr=0.0001", 4, trial=True)]
    whole, _ = comparison.cells(gd, "lr=0.001")
    assert trial.folder == whole.folder and trial.name != whole.name and trial.title == "gd lr=0.001 seed 4 trial"


def test_settings_of_a_cell(tmp_path: Path) -> None:
    comparison = load(tmp_path)
    settings = comparison.cell_settings(Cell("gd", "lr=0.0001", 2))
    assert settings.method.name == "gradient_difference"
    assert (settings.method.params.lr, settings.method.params.steps) == (1e-4, 7)
    assert (settings.seed, settings.targets.p, settings.run.threads) == (2, 0.05, 1)
    assert settings.evaluation.generate == ()


def test_the_defaults_of_a_comparison_lie_below_the_file(tmp_path: Path) -> None:
    wanted = {"benchmark": "people", "run": {"device": "cpu"}, "evaluation": {"generate": ["forget"]}}
    settings = load(tmp_path, settings=wanted).ground_settings(0)
    assert (settings.run.threads, settings.run.device, settings.evaluation.generate) == (1, "cpu", ("forget",))


def test_every_combination_of_a_sweep() -> None:
    entry = Entry(label="a", method="task_vector", sweep={"lr": (0.1, 0.2), "epochs": (1, 2)})
    assert list(entry.variants()) == ["lr=0.1,epochs=1", "lr=0.1,epochs=2", "lr=0.2,epochs=1", "lr=0.2,epochs=2"]
    assert entry.variants()["lr=0.2,epochs=1"] == {"name": "task_vector", "lr": 0.2, "epochs": 1}


def test_seeds_of_its_own(tmp_path: Path) -> None:
    comparison = load(tmp_path, methods=[{"label": "a", "method": "task_vector", "seeds": [9]}])
    assert comparison.cells(comparison.methods[0]) == [Cell("a", "", 9)]


METHOD = {"label": "a", "method": "task_vector"}


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"seedz": [1]}, r"compare.yaml: unknown key 'seedz'. Did you mean 'seeds'\? Known: attacks, .*seeds"),
        ({"seedz": [1]}, r"compare.yaml: seedz: unknown key 'seedz'"),
        ({"seeds": [0, 0]}, "seeds: expected at least one seed, none twice"),
        ({"seeds": []}, "seeds: expected at least one seed"),
        ({"seeds": [-1]}, "seeds: .*none below 0"),
        ({"seeds": ["x"]}, "seeds.0: .*integer.*found 'x'"),
        ({"methods": []}, "methods: .*at least 1 item"),
        ({"methods": [{**METHOD, "labl": 1}]}, r"methods.0.labl: unknown key 'labl'. Did you mean 'label'\?"),
        ({"methods": [METHOD, METHOD]}, "expected every label once, found twice: a"),
        ({"methods": [{**METHOD, "label": "A b"}]}, "methods.0.label: .*pattern.*found 'A b'"),
        ({"methods": [{**METHOD, "method": "task_vectr"}]}, r"methods.0 \(a\): .*Did you mean 'task_vector'\?"),
        (
            {"methods": [{**METHOD, "sweep": {"lrr": [1]}}]},
            r"methods.0 \(a: lrr=1\): method.lrr: unknown key 'lrr'. Did you mean 'lr'\?",
        ),
        ({"methods": [{**METHOD, "sweep": {"lr": [0.1, -1]}}]}, r"methods.0 \(a: lr=-1\): method.lr: .*greater than 0"),
        ({"methods": [{**METHOD, "sweep": {"lr": []}}]}, "sweep: expected a list of numbers or words for lr"),
        ({"methods": [{**METHOD, "sweep": {"lr": ["../x"]}}]}, "expected a list of numbers or words for lr"),
        ({"settings": {"benchmark": "people", "seed": 1}}, "settings: expected no key 'seed' here: .*'seeds'"),
        ({"settings": {"benchmark": "people", "method": "alkn"}}, "settings: expected no key 'method' here"),
        ({"settings": {"targets": {"p": 0.1}}}, "settings: expected the key 'benchmark'"),
        (
            {"settings": {"benchmark": {"name": "tofu", "path": "data/tofu"}}},
            "settings.benchmark: expected absolute paths, and one is relative",
        ),
        ({"settings": {"benchmark": "peeple"}}, r"settings: .*Did you mean 'people'\?"),
        ({"settings": {"benchmark": "people", "target": {}}}, r"settings: target: .*Did you mean 'targets'\?"),
        ({"attacks": {"no_such": {}}}, "unknown attack 'no_such'"),
        ({"runner": "slurm"}, "runner: .*'threads', 'dask' or 'ray'.*found 'slurm'"),
        ({"workers": 0}, "workers: .*greater than or equal to 1; found 0"),
    ],
)
def test_a_mistake_names_file_key_and_what_was_expected(tmp_path: Path, changes: dict[str, Any], answer: str) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, **changes)
    said = str(error.value)
    assert said.startswith("compare.yaml: ") and re.search(answer.removeprefix("compare.yaml: "), said), said


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_task_runner_whose_package_is_missing(tmp_path: Path, runner: str) -> None:
    if importlib.util.find_spec(f"prefect_{runner}") is not None:
        assert load(tmp_path, runner=runner).runner == runner
        return
    said = (
        f"compare.yaml: runner: expected the package prefect-{runner}, which is missing; pip install 'alkn[{runner}]'"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        load(tmp_path, runner=runner)


def test_a_label_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown method label 'our'. Did you mean 'ours'\?"):
        load(tmp_path).only(["our"])
    assert [entry.label for entry in load(tmp_path).only(["gd"])] == ["gd"]


def test_the_ready_comparison_is_whole() -> None:
    """Every preset of alkn and every registered baseline stands in it, a baseline at three or four rates."""
    comparison = load_comparison(ROOT / "configs" / "compare_tofu.yaml")
    settings = [
        comparison.cell_settings(Cell(entry.label, next(iter(entry.variants())), 0)).method
        for entry in comparison.methods
    ]
    assert {chosen.name for chosen in settings} == set(registry.methods)
    presets = registry.methods["alkn"].params.model_json_schema()["properties"]["preset"]["enum"]
    ours = [entry.label for entry, chosen in zip(comparison.methods, settings, strict=True) if chosen.name == "alkn"]
    assert [label for label in ours if label in presets] == presets
    for entry, chosen in zip(comparison.methods, settings, strict=True):
        if chosen.name not in ("alkn", "retrain"):
            assert len(entry.sweep["lr"]) in (3, 4), entry.label
    assert comparison.seeds == (0, 1, 2) and comparison.notes


def test_every_key_is_on_the_page() -> None:
    """docs/COMPARE.md has a row for each key, with its default."""
    page = (ROOT / "docs" / "COMPARE.md").read_text(encoding="utf-8")
    rows = {cells[0]: cells[1] for cells in re.findall(r"^\| `([\w.]+)` \| [^|]+ \| ([^|]+) \|", page, re.MULTILINE)}

    def default(model: type[BaseModel], name: str) -> str:
        field = model.model_fields[name]
        if field.is_required():
            return "required"
        value = field.get_default()
        return f"`{json.dumps(value)}`"

    wanted = {name: default(Comparison, name) for name in Comparison.model_fields if name != "methods"}
    wanted |= {f"methods.{name}": default(Entry, name) for name in Entry.model_fields}
    # The attacks' own keys stand in a table of their own, which begins with the attack's name.
    assert {key: value for key, value in rows.items() if key not in registry.attacks} == wanted
