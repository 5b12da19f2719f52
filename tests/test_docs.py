"""The pages say what the code does: every key with its default, commands that exist, and no path of a machine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from alkn import registry
from alkn.choices import Chosen
from alkn.errors import InputError
from alkn.membership import MembershipParams
from alkn.methods.descent_params import DescentParams, PaceParams
from alkn.settings import Settings, load_settings
from flows.cli import cli

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "SETTINGS.md"
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
CHOSEN = {"benchmark": registry.benchmarks, "method": registry.methods}
SHARED = "Methods that descend"
ENTRY = re.compile(rf"#+ ((?:Method|Benchmark) `\w+`|{SHARED})")


@dataclass(frozen=True)
class Key:
    """One row that docs/SETTINGS.md must have: below which entry's heading, key, type and range, default."""

    section: str
    key: str
    kind: str
    default: str

    def __str__(self) -> str:
        return f"| `{self.key}` | {self.kind} | {self.default} |"


def kind_of(schema: dict[str, Any]) -> str:
    """Type and range of a JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(kind_of(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind in ("integer", "number"):
        low, above, high, below = (
            schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        )
        if low is not None and high is not None:
            return f"{kind} {low} to {high}"
        bounds = {"≥": low, ">": above, "≤": high, "<": below}
        return f"{kind} {', '.join(f'{sign} {bound}' for sign, bound in bounds.items() if bound is not None)}".strip()
    if kind == "array":
        return f"list of {kind_of(schema['items'])}"
    if kind == "string":
        return f"text matching `{schema['pattern']}`" if "pattern" in schema else "text"
    return {"null": "`null`", "boolean": "true or false", "object": "mapping"}[kind]


def written(value: Any) -> str:
    """A default as one would write it in params.yaml."""
    if isinstance(value, Chosen):
        value = value.name if value.params == type(value.params)() else value.model_dump(mode="json")
    if isinstance(value, str):
        return value if re.fullmatch(r"\S+", value) else json.dumps(value)
    return f"[{', '.join(map(written, value))}]" if isinstance(value, tuple) else json.dumps(value)


def keys_of(model: type[BaseModel], prefix: str, section: str) -> Iterator[Key]:
    """The keys of a model of parameters, nested ones with their whole path."""
    properties = model.model_json_schema().get("properties", {})
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and name not in CHOSEN:
            yield from keys_of(kind, f"{prefix}{name}.", section)
            continue
        default = "required" if field.is_required() else f"`{written(field.get_default(call_default_factory=True))}`"
        if model is Settings and name in CHOSEN:
            names = ", ".join(f"`{entry}`" for entry in CHOSEN[name])
            what = names if field.get_default() is not None else f"{names} or `null`"
        else:
            what = kind_of(properties[name])
        yield Key(section, f"{prefix}{name}", what, default)


def shares_keys(params: type[BaseModel]) -> bool:
    """Whether the shared table speaks for this method; where a preset changes defaults, all keys stand together."""
    return issubclass(params, PaceParams) and "preset" not in params.model_fields


def expected() -> list[Key]:
    """Keys that descending methods share are listed once; below a method stands only what is its own or differs."""
    keys = list(keys_of(Settings, "", ""))
    shared = list(keys_of(DescentParams, "method.", SHARED))
    common = {(key.key, key.kind, key.default) for key in shared}
    keys += shared
    for kind, prefix, entries in (
        ("Method", "method.", registry.methods),
        ("Benchmark", "benchmark.", registry.benchmarks),
    ):
        for name, entry in entries.items():
            listed = common if shares_keys(entry.params) else set()
            keys += [
                key
                for key in keys_of(entry.params, prefix, f"{kind} `{name}`")
                if (key.key, key.kind, key.default) not in listed
            ]
    keys += keys_of(MembershipParams, "metrics.*.", "")
    for name, entry in registry.metrics.items():
        listed = set(MembershipParams.model_fields) if issubclass(entry.params, MembershipParams) else set()
        keys += [k for k in keys_of(entry.params, f"metrics.{name}.", "") if k.key.split(".")[-1] not in listed]
    for prefix, listed_below in (("attacks", registry.attacks), ("gates", registry.gates)):
        for name, entry in listed_below.items():
            keys += keys_of(entry.params, f"{prefix}.{name}.", "")
    return keys


EXPECTED = expected()


def tables(text: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Every table of a page: the nearest heading above it, its header and its rows."""
    heading, lines = "", [*text.splitlines(), ""]
    table: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if table:
            yield heading, table[0], table[2:]
            table = []
        if line.startswith("#"):
            heading = line


def rows_of_page() -> dict[tuple[str, str], list[str]]:
    """(section, key) -> the further cells of its row, from all tables whose first column is ``key``."""
    rows: dict[tuple[str, str], list[str]] = {}
    for heading, header, body in tables(PAGE.read_text(encoding="utf-8")):
        if header[:3] != ["key", "type, range", "default"]:
            continue
        entry = ENTRY.match(heading)
        for key, *cells in body:
            place = (entry[1] if entry else "", key.strip("`"))
            assert place not in rows, f"docs/SETTINGS.md has {place} twice"
            assert len(cells) == len(header) - 1 and all(cells), f"docs/SETTINGS.md: {key}: an empty cell"
            rows[place] = cells
    return rows


@pytest.mark.parametrize("key", EXPECTED, ids=lambda k: f"{k.section.strip('`').split('`')[-1]}:{k.key}")
def test_every_key_is_on_the_page_with_its_default(key: Key) -> None:
    found = rows_of_page().get((key.section, key.key))
    assert found is not None and found[:2] == [key.kind, key.default], (
        f"docs/SETTINGS.md, below {key.section or 'its section'}: expected {key} unit | meaning |, found {found}"
    )


def test_no_row_is_left_of_a_key_that_is_gone() -> None:
    assert set(rows_of_page()) - {(key.section, key.key) for key in EXPECTED} == set()


def test_the_defaults_are_what_an_empty_file_gives() -> None:
    """A default that a validator changes would make the page lie."""
    settings = Settings()
    for key in EXPECTED:
        if key.section == "" and key.key.split(".")[0] not in (*CHOSEN, "attacks", "gates", "metrics"):
            value: Any = settings
            for part in key.key.split("."):
                value = getattr(value, part)
            assert f"`{written(value)}`" == key.default, key.key
    for entry in (*registry.methods.values(), *registry.attacks.values(), *registry.gates.values()):
        for name, field in entry.params.model_fields.items():
            assert getattr(entry.params(), name) == field.get_default(), name


def test_the_table_of_presets() -> None:
    """Each key in which the presets differ, with the value of each."""
    params = registry.methods["alkn"].params
    presets = params.model_json_schema()["properties"]["preset"]["enum"]
    values = [dict(params.model_validate({"preset": preset})) for preset in presets]
    differing = [name for name in params.model_fields if len({json.dumps(v[name]) for v in values}) > 1]
    wanted = [[f"`{name}`", *(written(v[name]) for v in values)] for name in differing if name != "preset"]
    found = [
        (header, body) for _, header, body in tables(PAGE.read_text(encoding="utf-8")) if header[0] == "differs in"
    ]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in wanted)
    assert found == [(["differs in", *(f"`{p}`" for p in presets)], wanted)], f"docs/SETTINGS.md: expected\n{rows}"


def test_the_methods_that_share_keys_are_named() -> None:
    """Each descending method, and whether it has the retain batch of the shared table."""
    wanted = {
        f"`{name}`": "retain_batch" in entry.params.model_fields
        for name, entry in registry.methods.items()
        if shares_keys(entry.params)
    }
    found = [
        {row[0]: row[2] != "none" for row in body}
        for _, header, body in tables(PAGE.read_text(encoding="utf-8"))
        if header == ["descends", "loss on forget records", "on retain records"]
    ]
    assert found == [wanted]


def test_every_metric_is_named() -> None:
    found = [body for _, header, body in tables(PAGE.read_text(encoding="utf-8")) if header[0] == "metric"]
    assert [[row[0].strip("`") for row in body] for body in found] == [list(registry.metrics)]


def test_what_is_frozen_and_where() -> None:
    settings = Settings()
    whole = settings.model_dump(mode="json")
    found = {
        row[0].strip("`"): set(re.findall(r"`([\w.]+)`", row[1]))
        for _, header, body in tables(PAGE.read_text(encoding="utf-8"))
        if header[0] == "file"
        for row in body
    }
    wanted = {
        file: {
            name
            for key, value in part.items()
            for name in ([key] if value == whole[key] else [f"{key}.{inner}" for inner in value])
        }
        for file, part in {
            "data/params.yaml": settings.of_data(),
            "steps/base/params.yaml": settings.of_base(),
            "steps/<id>/params.yaml": settings.of_step(),
        }.items()
    }
    assert found == wanted


def test_the_answer_to_a_wrong_key_is_quoted_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("")
    with pytest.raises(InputError) as error:
        load_settings(path, ["targts.p=1"])
    assert f"error: {error.value}" in " ".join(PAGE.read_text(encoding="utf-8").split())


def commands(text: str) -> Iterator[str]:
    """What follows ``alkn`` wherever it is called, in fenced and indented blocks and in code spans."""
    fenced = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    rest = fenced.sub("", text)
    blocks = [*fenced.findall(text), *re.findall(r"^ {4}(.*)$", rest, re.MULTILINE)]
    spans = re.findall(r"`([^`\n]+)`", rest)
    for line in "\n".join([*blocks, *spans]).splitlines():
        for part in re.split(r"[;|&()]+", line):
            called = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*alkn(?:$|\s+)(.*)", part)
            if called:
                yield called[1].split(" #")[0]


def test_commands_are_found_in_a_page() -> None:
    text = (
        "Say `alkn run --set a=b`.\n\n    cd x; alkn report --json  # it\n\n```\nA=1 alkn serve\n```\nalkn is a name\n"
    )
    assert [called.strip() for called in commands(text)] == ["serve", "report --json", "run --set a=b"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_only_commands_that_exist(page: str) -> None:
    """Every ``alkn COMMAND --option`` of a page is one that ``alkn --help`` knows."""
    path = ROOT / page
    if not path.is_file():
        pytest.skip(f"there is no {page}")
    for called in commands(path.read_text(encoding="utf-8")):
        command: click.Command = cli
        words = shlex.split(called, comments=True)
        while words:
            word = words.pop(0)
            if word == "-C":
                words.pop(0)
            elif word.startswith("-"):
                known = [name for p in command.params for name in p.opts] + ["-h", "--help"]
                assert word.split("=")[0] in known, f"{page}: 'alkn {called}': no option {word} of {command.name}"
            elif isinstance(command, click.Group) and re.fullmatch(r"[a-z][a-z-]*", word):
                assert word in command.commands, f"{page}: 'alkn {called}': no command {word}"
                command = command.commands[word]


def test_no_file_of_the_repository_names_a_path_of_a_machine() -> None:
    """Neither where it was written nor a temporary folder; what is checked is what git holds."""
    places = "|".join(("work", "tmp", "home", "root", "Users"))
    absolute = re.compile(rf"(?<![\w.~)}}>-])/(?:{places})/[\w.]")
    try:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if absolute.search(line):
                found.append(f"{name}:{number}")
    assert found == []
