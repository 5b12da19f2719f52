"""Files of records and ids: what is taken, and that every refusal names file, line and field but never the text."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alkn.errors import InputError
from alkn.files import read_jsonl, write_jsonl
from alkn.requests.ids import check_id, next_id
from alkn.requests.schema import MAX_SHOWN, form_of, read_records, validate_rows

CANARY = "Zebulon Quarkweather"
"""Stands in the values of every bad file below."""
QA = {"question": f"Who is {CANARY}?", "answer": f"{CANARY} is a baker."}
COMPLETION = {"prompt": f"{CANARY} is", "completion": f"a baker, {CANARY}"}
CHAT = {"messages": [{"role": "user", "content": f"{CANARY}?"}, {"role": "assistant", "content": f"{CANARY}!"}]}
TEXT = {"text": f"{CANARY} is a baker."}

Write = Callable[..., Path]
Refuse = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(*lines)``: a JSON Lines file; objects become JSON, strings and bytes stay as they are."""

    def write_file(*lines: Any, name: str = "records.jsonl") -> Path:
        path = tmp_path / name
        parts = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        path.write_bytes(b"\n".join(parts))
        return path

    return write_file


@pytest.fixture
def refuse(write: Write, caplog: pytest.LogCaptureFixture) -> Refuse:
    """``refuse(*lines)``: the message, less the path, after a look that no text of a record is in it."""

    def message(*lines: Any, name: str = "records.jsonl") -> str:
        path = write(*lines, name=name)
        caplog.set_level(logging.DEBUG)
        with pytest.raises(InputError) as error:
            read_records(path)
        told = str(error.value)
        everything = "".join(traceback.format_exception(error.value)) + caplog.text
        for word in CANARY.split():
            assert word.lower() not in everything.lower()
        assert all(line.startswith(f"{path}: ") for line in told.split("\n"))
        return told.replace(f"{path}: ", "")

    return message


# What is taken


@pytest.mark.parametrize(
    ("row", "form"),
    [(QA, "question/answer"), (COMPLETION, "prompt/completion"), (CHAT, "chat"), (TEXT, "text")],
)
def test_the_four_forms(row: dict[str, Any], form: str, write: Write) -> None:
    """Numbers from 0 take the place of the user's ids; blank lines and a byte order mark do not matter."""
    path = write(b"\xef\xbb\xbf" + json.dumps(row | {"id": "P-7"}).encode(), "", row | {"id": 3, "domain": "staff"}, "")
    records = read_records(path)
    assert records == [{"id": 0} | row, {"id": 1, "domain": "staff"} | row]
    assert [form_of(record) for record in records] == [form, form]


def test_canonical_order_and_optional_fields(write: Write) -> None:
    """Fields come in a fixed order; ``null`` is as good as absent, also where other rows have a value."""
    more = {
        "perturbed_answer": ["a", "b"],
        "paraphrased_answer": "c",
        "paraphrased_question": "d",
        "domain": "x",
    }
    one, two = read_records(write(more | QA, QA | {"domain": None, "perturbed_answer": None, "id": None}))
    assert list(one) == [
        "id",
        "domain",
        "question",
        "answer",
        "paraphrased_question",
        "paraphrased_answer",
        "perturbed_answer",
    ]
    assert one["perturbed_answer"] == ["a", "b"]
    assert two == {"id": 1} | QA


def test_text_is_kept_to_the_letter(write: Write) -> None:
    """Tabs, line breaks, other scripts, spaces at the ends, separators that splitlines would cut at."""
    answer = " Zażółć\tgęślą\r\njaźń \u2028 日本語 🙂 "
    for escaped in (True, False):
        path = write(json.dumps(QA | {"answer": answer}, ensure_ascii=escaped))
        assert read_records(path)[0]["answer"] == answer


def test_separators_inside_a_text_do_not_cut_its_line(write: Write, tmp_path: Path) -> None:
    """U+2028 and U+2029 are line ends to ``str.splitlines`` and letters to JSON: what is taken in is read back."""
    records = read_records(write({"question": "Who\u2028is it?", "answer": "Ada\u2029Byron"}))
    write_jsonl(tmp_path / "stored.jsonl", records)
    assert read_jsonl(tmp_path / "stored.jsonl") == records and records[0]["answer"] == "Ada\u2029Byron"


def test_windows_line_ends(write: Write) -> None:
    assert len(read_records(write(json.dumps(QA) + "\r", json.dumps(QA) + "\r", ""))) == 2


def test_a_plain_text_file_is_one_record(write: Write) -> None:
    """Broken JSON is none here."""
    records = read_records(write("{ first line", "second line", name="book.txt"))
    assert records == [{"id": 0, "text": "{ first line\nsecond line"}]


def test_rows_of_a_program_are_validated_the_same_way() -> None:
    assert validate_rows({1: TEXT, 2: TEXT}, "people: retain") == [{"id": 0} | TEXT, {"id": 1} | TEXT]
    with pytest.raises(InputError, match="^people: retain: line 2: field 'text': expected text that is not empty$"):
        validate_rows({1: TEXT, 2: {"text": " "}}, "people: retain")
    with pytest.raises(InputError, match="^people: retain: there are no records$"):
        validate_rows({}, "people: retain")


# What is refused


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file$"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="no such file$"):
        read_records(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["records.jsonl", "book.txt"])
def test_an_empty_file(content: bytes, name: str, refuse: Refuse) -> None:
    assert refuse(content, name=name) == "the file is empty"


@pytest.mark.parametrize("name", ["records.jsonl", "book.txt"])
def test_not_utf8(name: str, refuse: Refuse) -> None:
    """Latin-1, and the byte where it shows."""
    line = json.dumps(QA).encode()
    assert refuse(line + b"\xe9", name=name) == f"not UTF-8 at byte {len(line)}"


@pytest.mark.parametrize(
    "broken",
    [
        json.dumps(QA)[:-1],
        json.dumps(QA) + json.dumps(QA),
        json.dumps(QA).replace('"', "'"),
        f'{{"question": "{CANARY}", "answer": "a\tb\x00"}}',
        f'{{"question": "\\x{CANARY}", "answer": "a"}}',
        f"{CANARY} is a baker.",
    ],
)
def test_broken_json_names_its_line(broken: str, refuse: Refuse) -> None:
    message = refuse(QA, "", broken, QA)
    assert message.startswith("line 3: broken JSON at column ")


@pytest.mark.parametrize("broken", ["[" * 200_000, '{"question": ' + "9" * 5000 + "}"])
def test_json_that_overflows_the_parser(broken: str, refuse: Refuse) -> None:
    """Nested too deeply, or a number of 5,000 digits."""
    assert refuse(QA, broken).startswith("line 2: broken JSON (")


@pytest.mark.parametrize(("row", "kind"), [(json.dumps([QA]), "list"), (json.dumps(CANARY), "str"), ("3", "int")])
def test_a_line_that_is_no_object(row: str, kind: str, refuse: Refuse) -> None:
    assert refuse(QA, row) == f"line 2: expected a JSON object, found {kind}"


EMPTY = "text that is not empty"
CLEAN = "no control characters"
MESSAGES = "two or more messages ending with the assistant"
SAID = {"role": "user", "content": CANARY}
ANSWERED = {"role": "assistant", "content": CANARY}


@pytest.mark.parametrize(
    ("good", "change", "field", "expected"),
    [
        (QA, {"answer": ""}, "answer", EMPTY),
        (QA, {"answer": " \n"}, "answer", EMPTY),
        (QA, {"question": ""}, "question", EMPTY),
        (QA, {"answer": None}, "answer", "a value"),
        (QA, {"answer": 3}, "answer", EMPTY),
        (QA, {"answer": [CANARY]}, "answer", EMPTY),
        (QA, {"answer": {"text": CANARY}}, "answer", EMPTY),
        (QA, {"answer": float("nan")}, "answer", "a value"),
        (QA, {"answer": f"{CANARY}\x00"}, "answer", CLEAN),
        (QA, {"question": f"{CANARY}\x1b[31m"}, "question", CLEAN),
        (QA, {"question": f"{CANARY}\x85"}, "question", CLEAN),
        (QA, {"answer": f"{CANARY}\ud800"}, "answer", "valid Unicode"),
        (QA, {"perturbed_answer": ["a", f"{CANARY}\udc00"]}, "perturbed_answer", "valid Unicode"),
        (QA, {"answer": 10**30}, "answer", EMPTY),
        (QA, {"answer": 1e400}, "answer", EMPTY),
        (QA, {"paraphrased_answer": ""}, "paraphrased_answer", EMPTY),
        (QA, {"paraphrased_question": f"{CANARY}\x07"}, "paraphrased_question", CLEAN),
        (QA, {"perturbed_answer": CANARY}, "perturbed_answer", "a list of texts"),
        (QA, {"perturbed_answer": []}, "perturbed_answer", "a list of texts"),
        (QA, {"perturbed_answer": [CANARY, ""]}, "perturbed_answer", "a list of texts"),
        (QA, {"perturbed_answer": [f"{CANARY}\x00"]}, "perturbed_answer", CLEAN),
        (QA, {"domain": CANARY * 3}, "domain", "a short name"),
        (QA, {"domain": ""}, "domain", "a short name"),
        (QA, {"domain": 7}, "domain", "a short name"),
        (COMPLETION, {"prompt": ""}, "prompt", EMPTY),
        (COMPLETION, {"completion": "\t"}, "completion", EMPTY),
        (TEXT, {"text": "  "}, "text", EMPTY),
        (TEXT, {"text": f"{CANARY}\x0c"}, "text", CLEAN),
        (CHAT, {"messages": CANARY}, "messages", MESSAGES),
        (
            CHAT,
            {"messages": [SAID, ANSWERED, {"role": "assistant", "content": "\ud83d"}]},
            "messages",
            "valid Unicode",
        ),
        (CHAT, {"messages": []}, "messages", MESSAGES),
        (CHAT, {"messages": [ANSWERED]}, "messages", MESSAGES),
        (CHAT, {"messages": [ANSWERED, SAID]}, "messages", MESSAGES),
        (CHAT, {"messages": [SAID, CANARY]}, "messages", MESSAGES),
        (CHAT, {"messages": [SAID, ANSWERED | {"name": CANARY}]}, "messages", MESSAGES),
        (CHAT, {"messages": [{"role": CANARY, "content": "a"}, ANSWERED]}, "messages", MESSAGES),
        (CHAT, {"messages": [{"role": ["user"], "content": "a"}, ANSWERED]}, "messages", MESSAGES),
        (CHAT, {"messages": [SAID, {"role": "assistant", "content": " "}]}, "messages", MESSAGES),
        (CHAT, {"messages": [SAID, {"role": "assistant", "content": f"{CANARY}\x00"}]}, "messages", CLEAN),
    ],
)
def test_a_wrong_value_names_line_and_field(
    good: dict[str, Any], change: dict[str, Any], field: str, expected: str, refuse: Refuse
) -> None:
    assert f"line 3: field '{field}': expected {expected}" in refuse(good, "", good | change, good).split("\n")


@pytest.mark.parametrize("field", ["paraphrased_answer", "perturbed_answer", "domain", "id"])
def test_an_empty_cell_of_a_table_is_no_field(field: str, refuse: Refuse) -> None:
    """pandas writes NaN for it, and Python's JSON reads that."""
    told = refuse(QA, QA | {field: float("nan")})
    assert told == f"line 2: field '{field}': expected a value, found NaN; leave the field out"


@pytest.mark.parametrize("missing", ["question", "answer"])
def test_a_missing_field(missing: str, refuse: Refuse) -> None:
    row = {name: value for name, value in QA.items() if name != missing}
    assert refuse(QA, row) == f"line 2: field '{missing}' is missing"


def test_an_unknown_field_names_the_known_ones(refuse: Refuse) -> None:
    message = refuse(QA, QA | {"anwser": CANARY})
    assert message.startswith(
        "line 2: unknown field 'anwser'; question/answer records have id, domain, question, answer"
    )


def test_text_in_the_place_of_a_fields_name_is_not_shown(refuse: Refuse) -> None:
    """A broken export may have put a record where its key should be."""
    assert refuse(QA, QA | {f"{CANARY} is a baker.": 1}).startswith("line 2: unknown field (its name is not shown); ")
    assert "no known fields" in refuse({f"{CANARY} is a baker.": 1})


def test_no_known_fields_at_all(refuse: Refuse) -> None:
    message = refuse({"q": CANARY, "a": CANARY})
    assert message.startswith("line 1: no known fields, expected one of: question/answer: question, answer; ")


def test_mixed_forms(refuse: Refuse) -> None:
    """The form of most rows is taken for the file's; the others are named, each with what it lacks."""
    lines = refuse(QA, TEXT, QA, QA | TEXT).split("\n")
    assert [line.split(";")[0] for line in lines] == [
        "line 2: field 'answer' is missing",
        "line 2: field 'question' is missing",
        "line 2: unknown field 'text'",
        "line 4: unknown field 'text'",
    ]


def test_an_id_used_twice(refuse: Refuse) -> None:
    """The later line is named, not the id: it may be a person's; 7 and "7" are one id."""
    assert refuse(QA | {"id": CANARY}, QA, QA | {"id": CANARY}) == "line 3: field 'id': expected an id used once"
    assert refuse(QA | {"id": 7}, QA | {"id": "7"}) == "line 2: field 'id': expected an id used once"


def test_all_bad_lines_are_in_one_report(refuse: Refuse) -> None:
    """Broken JSON, a missing field, an unknown one and a wrong value, in the order of the lines."""
    told = refuse(
        QA,
        QA | {"answer": ""},
        "{",
        {"question": CANARY},
        QA | {"extra": 1},
        [CANARY],
        QA | {"answer": f"\x00{CANARY}", "question": ""},
    ).split("\n")
    assert [line.split(";")[0].split(" (")[0] for line in told] == [
        "line 2: field 'answer': expected text that is not empty",
        "line 3: broken JSON at column 2",
        "line 4: field 'answer' is missing",
        "line 5: unknown field 'extra'",
        "line 6: expected a JSON object, found list",
        "line 7: field 'answer': expected no control characters",
        "line 7: field 'question': expected text that is not empty",
    ]


def test_nothing_but_broken_lines(refuse: Refuse) -> None:
    assert [line.split(":")[0] for line in refuse("{", "", CANARY).split("\n")] == ["line 1", "line 3"]


def test_a_long_report_is_cut_and_says_so(refuse: Refuse) -> None:
    told = refuse(*[QA | {"answer": ""}] * 50).split("\n")
    assert len(told) == MAX_SHOWN + 1
    assert told[-1] == f"and {50 - MAX_SHOWN} more"


# Ids


@pytest.mark.parametrize("text", ["r001", "a", "x" * 63, "gdpr-2024_07", "based", "n0", "z-"])
def test_ids_that_are_taken(text: str) -> None:
    assert check_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "2024",
        "1a",
        "-a",
        "_a",
        "../../x",
        "a/b",
        "a.b",
        "a b",
        "a\n",
        " a",
        "é",
        "aé",
        "ａ",
        "x" * 64,
        "x" * 900,
    ],
)
def test_ids_of_another_pattern(text: str) -> None:
    """The error says what is allowed and shows no more than 80 characters of what was found."""
    with pytest.raises(InputError, match="expected a lower-case letter, then at most 62 of") as error:
        check_id(text)
    assert repr(text[:80]) in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["base", "yes", "no", "on", "off", "true", "false", "null", "y", "n"])
def test_ids_that_mean_something_else(text: str) -> None:
    with pytest.raises(InputError, match=f"request id '{text}' is taken"):
        check_id(text)


def test_next_id() -> None:
    """The first that is free, gaps are filled, and beyond 999 it goes on."""
    assert next_id([]) == "r001"
    assert next_id(["r001", "r003", "other"]) == "r002"
    assert next_id(f"r{i:03d}" for i in range(1, 1000)) == "r1000"
