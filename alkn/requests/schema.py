"""What a file of records may look like. One report names all bad rows by line, and never their text."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from alkn.errors import InputError

FORMS: dict[str, tuple[str, ...]] = {
    "question/answer": ("question", "answer"),
    "prompt/completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
}
"""Form -> its required fields."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "question/answer": ("paraphrased_question", "paraphrased_answer", "perturbed_answer"),
    "prompt/completion": (),
    "chat": (),
    "text": (),
}
COMMON = ("id", "domain")
MAX_SHOWN = 20


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_clean(value: Any) -> bool:
    if isinstance(value, str):
        return not any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in value)
    if isinstance(value, Mapping):
        return all(_is_clean(v) for v in value.values())
    return all(_is_clean(v) for v in value) if isinstance(value, Sequence) else True


def _is_unicode(value: Any) -> bool:
    """Whether text, however deep, can be encoded: JSON's escapes can write half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 2
        and all(isinstance(m, Mapping) and set(m) == {"role", "content"} for m in value)
        and all(m["role"] in ("system", "user", "assistant") and _has_text(m["content"]) for m in value)
        and value[-1]["role"] == "assistant"
    )


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_has_text(v) for v in value)


def _column(check: Any, expected: str, *, nullable: bool = False) -> pa.Column:
    clean = "no control characters"
    return pa.Column(
        object,
        [
            pa.Check(check, element_wise=True, error=expected, ignore_na=nullable),
            pa.Check(_is_clean, element_wise=True, error=clean, ignore_na=nullable),
        ],
        nullable=nullable,
        required=not nullable,
    )


def record_schema(form: str) -> pa.DataFrameSchema:
    """The pandera schema of one form, over a frame whose index is the line number.

    Raises:
        KeyError: on an unknown form.
    """
    text, checks = "text that is not empty", {"messages": (_is_chat, "two or more messages ending with the assistant")}
    columns = {name: _column(*checks.get(name, (_has_text, text))) for name in FORMS[form]}
    for name in OPTIONAL[form]:
        check = (_is_text_list, "a list of texts") if name == "perturbed_answer" else (_has_text, text)
        columns[name] = _column(*check, nullable=True)
    columns["domain"] = _column(lambda v: isinstance(v, str) and 0 < len(v) <= 40, "a short name", nullable=True)
    columns["id"] = pa.Column(
        object, pa.Check(lambda s: ~s.map(str).duplicated(), error="an id used once", ignore_na=True), nullable=True,
        required=False,
    )  # fmt: skip
    return pa.DataFrameSchema(columns, strict=True, name=form)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read and validate a JSON Lines file (or one plain ``.txt`` file) of records.

    Returns:
        Records in a canonical form: ``id`` is the record's number from 0, then the form's fields in
        a fixed order. The user's own ids are not kept: they may be personal.

    Raises:
        InputError: one report with file, lines, fields, what was expected; never a record's text.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not content.strip():
        raise InputError(f"{path}: the file is empty")
    if path.suffix == ".txt":
        return validate_rows({1: {"text": content}}, str(path))
    rows, broken = _parse(content)
    return validate_rows(rows, str(path), broken=broken)


def validate_rows(
    rows: Mapping[int, Any], where: str, *, broken: Sequence[tuple[int, str]] = ()
) -> list[dict[str, Any]]:
    """Validate parsed rows by line number and bring them into the canonical form.

    Args:
        rows: line number -> row.
        where: named in the report.
        broken: lines that could not be parsed and why; they go into the same report.

    Raises:
        InputError: see :func:`read_records`.
    """
    form = _form_of(rows)
    if form is None:
        wanted = "; ".join(f"{f}: {', '.join(fields)}" for f, fields in FORMS.items())
        unknown = [(line, f"no known fields, expected one of: {wanted}") for line in list(rows)[:1]]
        raise InputError(_report(where, [*broken, *unknown]) or f"{where}: there are no records")
    allowed = (*COMMON, *FORMS[form], *OPTIONAL[form])
    faults = list(broken)
    for line, row in rows.items():
        extra = sorted(set(row) - set(allowed))
        faults += [(line, f"unknown field {_shown(n)}; {form} records have {', '.join(allowed)}") for n in extra]
        faults += [(line, f"field {name!r} is missing") for name in FORMS[form] if name not in row]
        # An empty cell of a table is often written so, and pandera takes it for a field that is not there.
        faults += [
            (line, f"field {name!r}: expected a value, found NaN; leave the field out")
            for name in (*COMMON, *OPTIONAL[form])
            if isinstance(row.get(name), float) and math.isnan(row[name])
        ]
        # Looked for here, because pandera itself fails on a value that cannot be encoded.
        faults += [
            (line, f"field {name!r}: expected valid Unicode") for name in allowed if not _is_unicode(row.get(name))
        ]
    faulty = {line for line, _ in faults}
    whole = {line: dict(row) for line, row in rows.items() if line not in faulty}
    if whole:
        try:
            record_schema(form).validate(pd.DataFrame.from_dict(whole, orient="index", dtype=object), lazy=True)
        except pa.errors.SchemaErrors as error:
            faults += _faults(error.failure_cases)
    if faults:
        raise InputError(_report(where, faults))
    order = [name for name in allowed if name != "id"]
    return [
        {"id": number} | {name: row[name] for name in order if row.get(name) is not None}
        for number, row in enumerate(rows.values())
    ]


def form_of(record: Mapping[str, Any]) -> str:
    """The form of a canonical record."""
    return next(form for form, fields in FORMS.items() if fields[0] in record)


def _shown(name: str) -> str:
    """A field's name where it looks like one; a broken export may hold text in its place."""
    return repr(name) if re.fullmatch(r"[A-Za-z_]\w{0,39}", name, re.ASCII) else "(its name is not shown)"


def _parse(content: str) -> tuple[dict[int, Any], list[tuple[int, str]]]:
    rows: dict[int, Any] = {}
    faults: list[tuple[int, str]] = []
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            faults.append((line, f"broken JSON at column {error.colno} ({error.msg})"))
            continue
        except (ValueError, RecursionError):
            faults.append((line, "broken JSON (a number too long or nested too deeply)"))
            continue
        if isinstance(row, dict):
            rows[line] = row
        else:
            faults.append((line, f"expected a JSON object, found {type(row).__name__}"))
    return rows, faults


def _form_of(rows: Mapping[int, Any]) -> str | None:
    """The form that most rows have a field of; ``None`` if no row has any."""
    counts = {
        form: sum(any(field in row for field in fields) for row in rows.values()) for form, fields in FORMS.items()
    }
    form = max(counts, key=lambda f: counts[f])
    return form if counts[form] else None


def _faults(cases: pd.DataFrame) -> list[tuple[int, str]]:
    """(line, message) from pandera's failure cases, whose raw values stay unread."""
    faults = []
    for column, check, line in zip(cases["column"], cases["check"], cases["index"], strict=True):
        expected = "a value" if check == "not_nullable" else str(check)
        faults.append((int(line), f"field {column!r}: expected {expected}"))
    return sorted(set(faults))


def _report(where: str, faults: Sequence[tuple[int, str]]) -> str:
    ordered = sorted(faults)
    lines = [f"{where}: line {line}: {message}" for line, message in ordered[:MAX_SHOWN]]
    if len(ordered) > MAX_SHOWN:
        lines.append(f"{where}: and {len(ordered) - MAX_SHOWN} more")
    return "\n".join(lines)
