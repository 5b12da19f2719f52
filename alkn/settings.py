"""Settings: params.yaml as one frozen, typed object. The command line reads it, nothing else does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from alkn import registry
from alkn.choices import Chosen, ChosenMetric, choose, explain, parameters_of, refuse_unknown
from alkn.errors import InputError, WrongKeys
from alkn.formats import check_cron, check_tracking_uri
from alkn.lora import Lora
from alkn.models import Architecture
from alkn.registry import Params

Level = Annotated[float, Field(ge=0, le=1)] | Literal["holdout"]
"""An absolute number in [0, 1], or ``holdout``: the base model's level on records it never saw."""


class Project(Params):
    """``name``: of the MLflow experiment and of the registered model."""

    name: str = Field("people", pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}$")


class Data(Params):
    """How records become text.

    Attributes:
        question_template: prompt of a question/answer record; must hold ``{question}``.
        chunk_tokens: length of the chunks that plain text is cut into.
    """

    question_template: str = Field("Question: {question}\nAnswer:", pattern=r"\{question\}")
    chunk_tokens: int = Field(256, ge=8)


class BaseTraining(Params):
    """Training of the base model from scratch.

    Attributes:
        until: training stops at the end of the schedule; below this P on any set it is an error.
    """

    lr: float = Field(3e-3, gt=0)
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(16, ge=1)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(50, ge=0)
    floor: float = Field(0.05, ge=0, le=1)
    until: float = Field(0.95, ge=0, le=1)


class Base(Params):
    """The model before any request.

    Attributes:
        model: folder of a local transformers model; ``null``: trained from scratch on the benchmark.
        trust_remote_code: run the folder's own Python code.
    """

    model: str | None = None
    trust_remote_code: bool = False
    architecture: Architecture = Architecture()
    training: BaseTraining = BaseTraining()


class Targets(Params):
    """When a request counts as forgotten; its gate judges by the same numbers.

    Attributes:
        p: largest mean P of the forget records.
        exact_memorization: largest mean share of answer tokens predicted right.
        margin: unlearning goes on to ``margin`` times the target, so that a verdict does not hang on rounding.
    """

    p: Level = 0.01
    exact_memorization: Level = 0.13
    margin: float = Field(0.8, gt=0, le=1)


Metric = Annotated[
    ChosenMetric,
    choose(registry.metrics, ChosenMetric),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
]


class Evaluation(Params):
    """What is measured.

    Attributes:
        metrics: registered metrics, by name or with parameters.
        references: reference models to hold the model against, by the names of their folders in ``reference/``.
        texts: name -> file of the user's own text that perplexity is measured on, ``.txt`` or JSON Lines.
        max_new_tokens: longest greedy answer.
        generate: sets on which the model also writes answers.
        earlier_records: records of an earlier request that a step is measured on, drawn by chance; ``null``: all.
        confidence: of the interval that goes with every mean over a sample.
    """

    later: ClassVar = ("references", "texts", "earlier_records", "confidence")
    metrics: tuple[Metric, ...] = Field(
        default=(
            "probability",
            "exact_memorization",
            "extraction_strength",
            "rouge_l",
            "truth_ratio",
            "forget_quality",
            "loss",
            "zlib",
            "min_k",
            "privleak",
            "repetition",
            "gibberish",
            "perplexity",
            "model_utility",
        ),
        validate_default=True,
    )
    max_new_tokens: int = Field(64, ge=1)
    generate: tuple[Literal["forget", "earlier", "retain", "utility", "holdout"], ...] = ("forget", "utility")
    references: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")], ...] = ()
    texts: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")], str] = {}
    earlier_records: int | None = Field(None, ge=1)
    confidence: float = Field(0.95, gt=0, lt=1)

    def answer_length(self, set_name: str) -> int | None:
        """Longest greedy answer on a set; ``None`` where the model writes none."""
        return self.max_new_tokens if set_name.split("/")[0] in self.generate else None

    @field_validator("metrics")
    @classmethod
    def _judged_by(cls, chosen: tuple[ChosenMetric, ...]) -> tuple[ChosenMetric, ...]:
        names = [one.name for one in chosen]
        missing = [name for name in ("probability", "exact_memorization") if name not in names]
        if missing:
            raise ValueError(f"expected at least what targets and gates are judged by; missing: {', '.join(missing)}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected each metric once; named twice: {', '.join(twice)}")
        return chosen


class Verification(Params):
    """``alkn evaluate`` and ``alkn verify``.

    Attributes:
        records: of a request that a cell of the matrix is measured on, drawn by chance; ``null``: all.
        tolerance: how far a number that is measured again may be from the recorded one.
    """

    records: int | None = Field(256, ge=1)
    tolerance: float = Field(1e-6, ge=0)


class Run(Params):
    """Where and how the arithmetic runs.

    Attributes:
        device: ``auto`` takes CUDA when there.
        precision: of the forward passes for gradients; ``auto``: bf16 on CUDA, else fp32.
        threads: CPU threads; part of the settings because the last bit of a sum depends on it.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int = Field(2, ge=1)


class Tracking(Params):
    """MLflow: ``uri`` of a server or a database. A relative SQLite path is relative to the project folder."""

    uri: Annotated[str, AfterValidator(check_tracking_uri)] = "sqlite:///mlflow.db"
    artifacts: str = "mlartifacts"
    timeout: int = Field(10, ge=1)


class Prefect(Params):
    """The deployments that ``alkn serve`` serves; home and port stand in prefect.toml."""

    deployment: str = Field("scheduled", pattern=r"^[A-Za-z0-9_-]+$")
    cron: Annotated[str, AfterValidator(check_cron)] = "0 3 * * *"
    verify_cron: Annotated[str, AfterValidator(check_cron)] = "0 5 * * sun"


class Git(Params):
    """``commit``: commit ledger, lock file and manifest after each recorded step."""

    commit: bool = False


def _empty_if_null(value: Any) -> Any:
    return {} if value is None else value


def _gates(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping of gate names to their settings")
    refuse_unknown(registry.gates, {str(name): str(name) for name in value})
    # Only an empty entry is the default: ``utility: false`` must not pass for a gate that was switched off.
    given = {name: {} if params is None else params for name, params in value.items()}
    out: dict[str, Params] = {}
    faults: list[tuple[str, str]] = []
    for name, entry in registry.gates.items():
        try:
            out[name] = parameters_of(entry, given.get(name, {}))
        except WrongKeys as wrong:
            faults += [(f"{name}.{key}".rstrip("."), fault) for key, fault in wrong.faults]
    if faults:
        raise WrongKeys(faults)
    return out


def _attacks(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping of attack names to their budgets; {} switches all of them off")
    refuse_unknown(registry.attacks, {str(name): str(name) for name in value})
    out: dict[str, Params] = {}
    faults: list[tuple[str, str]] = []
    for name, params in value.items():
        try:
            out[name] = parameters_of(registry.attacks[name], {} if params is None else params)
        except WrongKeys as wrong:
            faults += [(f"{name}.{key}".rstrip("."), fault) for key, fault in wrong.faults]
    if faults:
        raise WrongKeys(faults)
    return out


class Settings(Params):
    """Everything that steers a project. See docs/SETTINGS.md for every key, unit and default."""

    project: Project = Project()
    seed: int = Field(0, ge=0)
    benchmark: Annotated[Chosen, choose(registry.benchmarks)] | None = None
    data: Data = Data()
    base: Base = Base()
    method: Annotated[Chosen, choose(registry.methods)] = Field(default="alkn", validate_default=True)
    lora: Annotated[Lora, BeforeValidator(_empty_if_null)] = Lora()
    targets: Targets = Targets()
    evaluation: Evaluation = Evaluation()
    attacks: Annotated[dict[str, Any], BeforeValidator(_attacks)] = Field(
        default={"relearning": {}, "quantization": {}}, validate_default=True
    )
    gates: Annotated[dict[str, Any], BeforeValidator(_gates)] = Field(default={}, validate_default=True)
    verification: Verification = Verification()
    run: Run = Run()
    tracking: Tracking = Tracking()
    prefect: Prefect = Prefect()
    git: Git = Git()

    @model_validator(mode="after")
    def _retraining_is_whole(self) -> Settings:
        if self.lora.rank is not None and self.method.name == "retrain":
            raise ValueError("lora.rank: 'retrain' trains a model of its own from the beginning; expected null")
        return self

    def of_data(self) -> dict[str, Any]:
        """The part that decides the splits, as plain values; it is frozen in data/params.yaml."""
        return dict(self.model_dump(mode="json", include={"seed", "benchmark"}))

    def of_base(self) -> dict[str, Any]:
        """The part that decides the base model and its metrics; it is frozen beside the base model."""
        return dict(self.model_dump(mode="json", include={"seed", "data", "base", "evaluation", "run"}))

    def of_step(self) -> dict[str, Any]:
        """The part that decides what a step computes, as plain values; it is frozen beside the step.

        ``lora`` is in it only where adapters are trained: what was frozen before there were any stays the same.
        """
        keys = dict.fromkeys(("seed", "data", "method", "targets", "evaluation", "attacks", "gates", "run"), True)
        if self.lora.rank is not None:
            keys["lora"] = True
        return dict(self.model_dump(mode="json", include={**keys, "base": {"trust_remote_code"}}))


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read params.yaml and apply ``a.b=c`` overrides.

    Raises:
        InputError: naming file, key, what was expected, what was found and the nearest known key.
    """
    values = read_mapping(path, "is this a project folder? 'alkn init DIR' makes one")
    for override in overrides:
        _override(values, override)
    return validate_settings(values, path)


def read_mapping(path: Path, hint: str = "") -> dict[str, Any]:
    """The mapping in a YAML file of settings; an empty file is an empty one.

    Args:
        path: the file.
        hint: what to say after "no such file".

    Raises:
        InputError: naming the file, and the line where it is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        twice = list(_given_twice(yaml.compose(text, Loader=yaml.SafeLoader)))
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{'; ' if hint else ''}{hint}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', 'unreadable')})") from None
    if twice:
        raise InputError("\n".join(f"{path} line {line}: {key}: given twice" for line, key in sorted(set(twice))))
    if not isinstance(raw, dict | None):
        raise InputError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw or {}


def _given_twice(node: yaml.Node | None, above: str = "", read: set[int] | None = None) -> Iterator[tuple[int, str]]:
    """(line, key) of each key that its mapping holds already; YAML itself would take the last one without a word."""
    read = set() if read is None else read
    if not isinstance(node, yaml.CollectionNode) or id(node) in read:
        return
    read.add(id(node))  # an alias leads to the same node again, or even to one above
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _given_twice(item, f"{above}{number}.", read)
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            yield key.start_mark.line + 1, above + name
        seen.add(name)
        yield from _given_twice(value, f"{above}{name}.", read)


def validate_settings(values: Mapping[str, Any], path: Path) -> Settings:
    """Check plain values against :class:`Settings`; ``path`` is named in the error."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{path.name}: {line}" for line in explain(error, Settings))) from None


def _override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        raise InputError(f"--set {override!r}: expected KEY=VALUE with a dotted key, such as targets.p=0.05")
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None and node is values and parent in Settings.model_fields:
            # A choice that the file leaves out is its default by name, and the key is one of its parameters.
            default = Settings.model_fields[parent].default
            child = default if isinstance(default, str) else None
        node[parent] = node = dict(child) if isinstance(child, dict) else ({} if child is None else {"name": child})
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override!r}: the value is not valid YAML") from None
