"""params.yaml: defaults, presets, overrides, and errors that name file, key, what was expected and what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from alkn import registry
from alkn.errors import InputError
from alkn.gates.utility import UtilityParams
from alkn.methods.alkn_params import AlknParams
from alkn.settings import Settings, load_settings, validate_settings

REPOSITORY = Path(__file__).parent.parent
COMPARISONS = set((REPOSITORY / "configs").glob("compare_*.yaml"))
PRESETS = get_args(AlknParams.model_fields["preset"].annotation)
Load = Callable[..., Settings]
Fails = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """``load(text, *overrides)``: write params.yaml and read it."""

    def write_and_read(text: str | bytes, *overrides: str) -> Settings:
        path = tmp_path / "params.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_settings(path, overrides)

    return write_and_read


@pytest.fixture
def fails(load: Load) -> Fails:
    """``fails(text, *overrides)``: the message of the one error."""

    def message(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(InputError) as error:
            load(text, *overrides)
        return str(error.value)

    return message


def test_defaults(load: Load) -> None:
    """An empty file is a whole project: ALKN, every gate on, targets of METHOD.md."""
    settings = load("")
    assert settings == Settings()
    assert settings.method.name == "alkn" and settings.method.params == AlknParams()
    assert (settings.targets.p, settings.targets.exact_memorization) == (0.01, 0.13)
    assert list(settings.gates) == list(registry.gates)
    assert all(params.enabled is None for params in settings.gates.values())
    assert settings.benchmark is None and settings.git.commit is False
    assert {metric.name for metric in settings.evaluation.metrics} <= set(registry.metrics)


@pytest.mark.parametrize(
    "path",
    [REPOSITORY / "params.yaml", *sorted(set((REPOSITORY / "configs").glob("**/*.yaml")) - COMPARISONS)],
    ids=lambda p: p.name,
)
def test_the_files_of_this_repository_load(path: Path) -> None:
    load_settings(path)


def test_settings_cannot_be_changed(load: Load) -> None:
    settings = load("")
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        settings.method.params.lr = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("targts: {p: 0.1}", "targts", "targets"),
        ("targets: {pp: 0.1}", "targets.pp", "p"),
        ("base: {trainig: {}}", "base.trainig", "training"),
        ("base: {training: {epoch: 3}}", "base.training.epoch", "epochs"),
        ("method: {name: alkn, lrr: 0.1}", "method.lrr", "lr"),
        ("benchmark: {name: people, fact: 3}", "benchmark.fact", "facts"),
        ("gates: {utility: {bse: 0.1}}", "gates.utility.bse", "base"),
    ],
)
def test_unknown_keys_name_the_nearest(text: str, key: str, near: str, fails: Fails) -> None:
    last = key.split(".")[-1]
    assert fails(text).startswith(f"params.yaml: {key}: unknown key '{last}'. Did you mean '{near}'? Known: ")


@pytest.mark.parametrize(
    ("text", "key", "kind", "found", "near"),
    [
        ("method: alkm", "method", "method", "alkm", "alkn"),
        ("method: {name: aklnn}", "method", "method", "aklnn", "alkn"),
        ("benchmark: peple", "benchmark", "benchmark", "peple", "people"),
        ("gates: {utilty: {}}", "gates.utilty", "gate", "utilty", "utility"),
        ("evaluation: {metrics: [rouge, probability]}", "evaluation.metrics.0", "metric", "rouge", "rouge_l"),
    ],
)
def test_unknown_names_name_the_key_the_nearest_and_all(
    text: str, key: str, kind: str, found: str, near: str, fails: Fails
) -> None:
    """And do not hide what else is wrong in the file, before it and after it."""
    for message in (fails(text), fails(f"seed: -1\n{text}\nrun: {{threads: 0}}").split("\n")[1]):
        assert message.startswith(f"params.yaml: {key}: unknown {kind} '{found}'. Did you mean '{near}'? Known: ")
        assert near in message.split("Known: ")[1].rstrip(".").split(", ")
    lines = fails(f"seed: -1\n{text}\nrun: {{threads: 0}}").split("\n")
    assert [line.split(": ")[1] for line in lines] == ["seed", key, "run.threads"]


def test_a_name_like_nothing_known_gets_no_guess(fails: Fails) -> None:
    message = fails("method: zzzzzz")
    assert "Did you mean" not in message and "Known: " in message and "alkn" in message


@pytest.mark.parametrize(
    ("text", "key", "expected", "found"),
    [
        ("seed: -1", "seed", "greater than or equal to 0", "-1"),
        ("seed: one", "seed", "a valid integer", "'one'"),
        ("seed: 1.5", "seed", "a valid integer", "1.5"),
        ("seed:", "seed", "a valid integer", "None"),
        ("seed: [1]", "seed", "a valid integer", "a list"),
        ("targets: 3", "targets", "a valid dictionary", "3"),
        ("targets: {margin: 2}", "targets.margin", "less than or equal to 1", "2"),
        ("targets: {p: 2}", "targets.p", "less than or equal to 1", "2"),
        ("targets: {p: holdou}", "targets.p", "'holdout'", "'holdou'"),
        ("targets: {p: .nan}", "targets.p", "finite number", "nan"),
        ("base: {training: {lr: .inf}}", "base.training.lr", "finite number", "inf"),
        ("base: {architecture: {layers: 0}}", "base.architecture.layers", "greater than or equal to 1", "0"),
        ("base: {architecture: {vocab_size: 256}}", "base.architecture.vocab_size", "or equal to 300", "256"),
        (
            "base: {architecture: {hidden_size: 36}}",
            "base.architecture",
            "multiple of 2 * heads, 8",
            "a dict",
        ),
        ("run: {device: tpu}", "run.device", "'auto', 'cpu' or 'cuda'", "'tpu'"),
        ("git: {commit: perhaps}", "git.commit", "a valid boolean", "'perhaps'"),
        ("project: {name: ../x}", "project.name", "match pattern", "'../x'"),
        ("data: {question_template: 'Q:'}", "data.question_template", "match pattern", "'Q:'"),
        ("evaluation: {generate: [forgt]}", "evaluation.generate.0", "'forget', 'earlier'", "'forgt'"),
        ("evaluation: {metrics: [probability]}", "evaluation.metrics", "missing: exact_memorization", "a list"),
        ("evaluation: {metrics: [probability, 1]}", "evaluation.metrics.1", "a mapping with the key 'name'", "1"),
        ("method: {name: alkn, lr: fast}", "method.lr", "a valid number", "'fast'"),
        ("method: {name: alkn, lr: .inf}", "method.lr", "finite number", "inf"),
        ("method: {name: alkn, procedure: once, label_form: paper}", "method", "procedure 'once' masks", "a dict"),
        ("method: 3", "method", "a mapping with the key 'name', one of: ", "3"),
        ("method: {lr: 3}", "method", "a mapping with the key 'name', one of: ", "a dict"),
        ("benchmark: {name: people, facts: 99}", "benchmark.facts", "less than or equal to 42", "99"),
        ("gates: {utility: {base: 2}}", "gates.utility.base", "less than or equal to 1", "2"),
        ("gates: {utility: {enabled: maybe}}", "gates.utility.enabled", "a valid boolean", "'maybe'"),
        ("gates: {utility: false}", "gates.utility", "a valid dictionary", "False"),
        ("gates: []", "gates", "a mapping of gate names", "a list"),
    ],
)
def test_wrong_values(text: str, key: str, expected: str, found: str, fails: Fails) -> None:
    """File, key, what was expected, what was found, in that order and on one line."""
    lines = fails(text).split("\n")
    assert all(line.startswith(f"params.yaml: {key}: ") and line.endswith(f"; found {found}") for line in lines)
    assert any(expected in line for line in lines)


def test_all_errors_of_a_section_come_at_once(fails: Fails) -> None:
    message = fails("seed: -1\ntargets: {margin: 2, pp: 1}\nrun: {threads: 0}")
    assert [line.split(": ")[1] for line in message.split("\n")] == [
        "seed",
        "targets.margin",
        "targets.pp",
        "run.threads",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntargets: {p: 0.1\nrun: 3\n", "params.yaml line 3: not valid YAML"),
        ("seed: 1\nrun: a: b\n", "params.yaml line 2: not valid YAML (mapping values are not allowed here)"),
        ("seed: !!python/object/apply:os.getcwd []", "params.yaml line 1: not valid YAML"),
        ('seed: "\x07"', "not valid YAML"),
        (b"seed: \xff", "params.yaml: not UTF-8 at byte 6"),
        ("- seed", "params.yaml: expected a mapping of settings, found list"),
        ("seed", "params.yaml: expected a mapping of settings, found str"),
    ],
)
def test_files_that_are_no_settings(text: str | bytes, message: str, fails: Fails) -> None:
    assert message in fails(text)


def test_a_missing_file_says_how_to_make_a_project(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"params\.yaml: no such file; .*alkn init"):
        load_settings(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "overrides", "read", "expected"),
    [
        ("", ["targets.p=0.05"], lambda s: s.targets.p, 0.05),
        ("", ["targets.p=holdout"], lambda s: s.targets.p, "holdout"),
        (
            "targets: {p: 0.2, margin: 0.5}",
            ["targets.p=0.05"],
            lambda s: (s.targets.p, s.targets.margin),
            (0.05, 0.5),
        ),
        ("", ["base.training.lr=1e-4"], lambda s: s.base.training.lr, 1e-4),
        ("", ["seed=1", "seed=2"], lambda s: s.seed, 2),
        ("method: alkn", ["method.lr=1e-4"], lambda s: s.method.params.lr, 1e-4),
        ("method: {name: alkn, lr: 1}", ["method.preset=paper"], lambda s: s.method.params.share_end, 0.3),
        ("", ["benchmark=people", "benchmark.facts=7"], lambda s: s.benchmark.params.facts, 7),
        ("", ["gates.utility.base=0.9"], lambda s: s.gates["utility"].base, 0.9),
        ("", ["gates.utility.enabled=false"], lambda s: s.gates["utility"].enabled, False),
        (
            "",
            ["evaluation.metrics=[probability,exact_memorization]"],
            lambda s: tuple(metric.name for metric in s.evaluation.metrics),
            ("probability", "exact_memorization"),
        ),
        ("base: {model: x}", ["base.model="], lambda s: s.base.model, None),
    ],
)
def test_overrides(text: str, overrides: list[str], read: Any, expected: Any, load: Load) -> None:
    """Nested keys, YAML values, the last one wins, and keys beside them stay."""
    assert read(load(text, *overrides)) == expected


def test_an_override_with_an_equals_sign_in_its_value(load: Load) -> None:
    settings = load("", "data.question_template='a={question}='")
    assert settings.data.question_template == "a={question}="


@pytest.mark.parametrize("override", ["targets.p", "targets..p=1", ".p=1", "=1", "targets.=1"])
def test_bad_syntax_of_an_override(override: str, fails: Fails) -> None:
    assert fails("", override).startswith(f"--set '{override}': expected KEY=VALUE with a dotted key")


def test_all_unknown_names_and_wrong_keys_come_at_once(fails: Fails) -> None:
    message = fails(
        "method: {name: alkn, lr: 0, lrr: 1}\nbenchmark: peple\nevaluation: {metrics: [rouge, bleu, 3]}\n"
        "gates: {utility: {base: 2}, forgetting: {p95: 0, q: 1}}"
    )
    assert [line.split(": ")[1] for line in message.split("\n")] == [
        "benchmark", "method.lr", "method.lrr", "evaluation.metrics.0", "evaluation.metrics.1", "evaluation.metrics.2",
        "gates.forgetting.p95", "gates.forgetting.q",
        "gates.utility.base",
    ]  # fmt: skip
    message = fails("evaluation: {metrics: [rouge, bleu]}\ngates: {utilty: {}, finit: {}}")
    assert [(line.split(": ")[1], line.split("'")[1]) for line in message.split("\n")] == [
        ("evaluation.metrics.0", "rouge"), ("evaluation.metrics.1", "bleu"), ("gates.utilty", "utilty"),
        ("gates.finit", "finit"),
    ]  # fmt: skip


def test_an_override_of_a_section_that_the_file_leaves_out(load: Load, fails: Fails) -> None:
    """The section's default by name, with this one parameter changed; no name is made up where there is no default."""
    for text in ("", "seed: 1", "method:"):
        method = load(text, "method.lr=0.5").method
        assert (method.name, method.params) == ("alkn", AlknParams(lr=0.5))
    assert load("", "method.lr=0.5", "method.preset=paper").method.params == AlknParams(preset="paper", lr=0.5)
    assert load("", "method.name=task_vector", "method.lr=0.5").method.name == "task_vector"
    assert fails("", "benchmark.facts=3").startswith("params.yaml: benchmark: expected a mapping with the key 'name'")
    assert fails("method: {lr: 3}").startswith("params.yaml: method: expected a mapping with the key 'name'")


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("seed: 1\nrun: {threads: 1}\nseed: 2\n", [(3, "seed")]),
        ("run:\n  threads: 1\n  device: cpu\n  threads: 1\n", [(4, "run.threads")]),
        ("seed: 1\n'seed': 2\nrun: {threads: 1, threads: 2}\n", [(2, "seed"), (3, "run.threads")]),
        ("gates:\n  utility: {base: 0.1,\n    base: 0.2}\n", [(3, "gates.utility.base")]),
        ("evaluation: {metrics: [{a: 1, a: 2}]}", [(1, "evaluation.metrics.0.a")]),
        ("run: &r {threads: 1, threads: 2, again: *r}", [(1, "run.threads")]),
    ],
)
def test_a_key_that_is_given_twice(text: str, places: list[tuple[int, str]], fails: Fails) -> None:
    """Line and key of each, whatever the values are; YAML itself takes the last one silently."""
    found = [line.split("params.yaml ")[1] for line in fails(text).split("\n")]
    assert found == [f"line {line}: {key}: given twice" for line, key in places]


def test_the_same_key_in_two_sections_is_no_fault(load: Load) -> None:
    settings = load("run: &r {threads: 3}\nbase: {training: {lr: 0.5}}\nmethod: {name: alkn, lr: 0.25}\n")
    assert (settings.run.threads, settings.base.training.lr) == (3, 0.5)


GOOD_CRONS = ("0 3 * * *", "*/5 0-6 1,15 * mon-fri", "0 0 1 JAN sun", "0  4 * * 7", "5 4 1-31/2 */3 0", "59 23 31 12 6")
BAD_CRONS = {
    "0 3 * *": "there are 4",
    "": "there are 0",
    "@nightly": "there are 1",
    "0 3 * * * *": "there are 6",
    "60 3 * * *": "minute of cron, 0 to 59",
    "0 24 * * *": "hour of cron, 0 to 23",
    "0 3 0 * *": "day of the month of cron, 1 to 31",
    "0 3 * 13 *": "month of cron, 1 to 12",
    "0 3 * * 8": "day of the week of cron, 0 to 7",
    "0 3 * * fri-mon": "day of the week",
    "*/0 3 * * *": "minute",
    "0 3 * * dog": "day of the week",
    "5-1 3 * * *": "minute",
    "0 3, * * *": "hour",
    "0 3 ? * *": "day of the month",
    "0 -3 * * *": "hour",
}


@pytest.mark.parametrize("cron", GOOD_CRONS)
def test_schedules(cron: str, load: Load) -> None:
    """What is taken here, Prefect takes too."""
    from prefect.client.schemas.schedules import CronSchedule

    assert load(f"prefect: {{cron: '{cron}'}}").prefect.cron == cron
    assert CronSchedule(cron=cron).cron == cron


@pytest.mark.parametrize("cron", BAD_CRONS)
def test_schedules_that_are_none(cron: str, fails: Fails) -> None:
    message = fails(f"prefect: {{cron: '{cron}'}}")
    assert message.startswith("params.yaml: prefect.cron: expected ") and message.endswith(f"; found {cron!r}")
    assert BAD_CRONS[cron] in message


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db", "sqlite:////srv/mlflow.db", "sqlite:///../mlflow.db", "http://127.0.0.1:5000",
        "https://mlflow.example.org/team", "postgresql://me:word@db/mlflow", "mysql+pymysql://db:3306/mlflow",
    ],
)  # fmt: skip
def test_tracking_stores(uri: str, load: Load) -> None:
    assert load(f"tracking: {{uri: '{uri}'}}").tracking.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "", "mlflow.db", "sqlite://mlflow.db", "sqlite:///", "sqlite:mlflow.db", "file:///mlruns", "http://", "http:x",
        "htp://host", "127.0.0.1:5000", "http://host:port", "postgresql://", "postgresql:mlflow", "http://[::1",
    ],
)  # fmt: skip
def test_tracking_stores_that_are_none(uri: str, fails: Fails) -> None:
    message = fails(f"tracking: {{uri: '{uri}'}}")
    assert message.startswith("params.yaml: tracking.uri: expected the address of a store: sqlite:///FILE")
    assert message.endswith(f"; found {uri!r}")


def test_bad_overrides(fails: Fails) -> None:
    """A value that is no YAML, an unknown key, a wrong value: named as in the file."""
    assert fails("", "targets.p=[1") == "--set 'targets.p=[1': the value is not valid YAML"
    assert "params.yaml: targets.q: unknown key 'q'" in fails("", "targets.q=1")
    assert "params.yaml: seed: " in fails("", "seed=one")
    assert "params.yaml: seed: " in fails("seed: 5", "seed.x=3")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_the_file(preset: str, load: Load) -> None:
    """The method's section is its parameters, filled in from the preset."""
    settings = load(f"method: {{name: alkn, preset: {preset}, lr: 0.5}}")
    assert settings.method.params == AlknParams(preset=preset, lr=0.5)  # type: ignore[arg-type]


def test_gates_can_be_set_one_by_one(load: Load) -> None:
    """An empty entry is the default, and the other gates stay on."""
    settings = load("gates: {utility: {base: 0.5}, finite: }")
    assert settings.gates["utility"] == UtilityParams(base=0.5)
    assert list(settings.gates) == list(registry.gates)


def test_the_part_of_a_step_holds_what_it_computes_with(load: Load) -> None:
    """Plain values; where it is tracked or scheduled is no part of it."""
    part = load("method: {name: alkn, preset: paper}").of_step()
    assert set(part) == {"seed", "data", "base", "method", "targets", "evaluation", "attacks", "gates", "run"}
    assert set(part["base"]) == {"trust_remote_code"}
    assert part["method"]["name"] == "alkn" and part["method"]["preset"] == "paper" and part["method"]["scale"] == 0.8
    assert part["gates"]["utility"]["parent"] == 0.6
    elsewhere = "project: {name: x}\ntracking: {timeout: 3}\nprefect: {cron: '0 4 * * *'}\ngit: {commit: true}"
    assert load(elsewhere).of_step() == load("").of_step()
    for change in (
        "seed: 1",
        "data: {chunk_tokens: 9}",
        "targets: {p: 0.2}",
        "run: {threads: 1}",
        "gates: {finite: {enabled: false}}",
    ):
        assert load(change).of_step() != load("").of_step()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_part_of_a_step_survives_being_written_and_read(preset: str, load: Load, tmp_path: Path) -> None:
    """Through YAML and JSON, twice: what is frozen beside a step gives the same settings and the same digest."""
    part = load(f"method: {{name: alkn, preset: {preset}, clip: null}}\ntargets: {{p: holdout}}").of_step()
    again = validate_settings(yaml.safe_load(yaml.safe_dump(part)), tmp_path / "params.yaml").of_step()
    assert again == part
    assert (
        json.dumps(again, sort_keys=True)
        == json.dumps(part, sort_keys=True)
        == json.dumps(json.loads(json.dumps(part, allow_nan=False)), sort_keys=True)
    )
