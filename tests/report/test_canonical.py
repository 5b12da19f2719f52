"""The canonical form, against the numbers of RFC 8785 and against Python's own reader."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator

import pytest
import torch

from alkn.report.canonical import canonical, read_strictly

RFC_8785_APPENDIX_B = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """The smallest doubles as they are: other tests flush them to zero, and then Python's own repr does."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(True)


@pytest.mark.parametrize(("bits", "text"), RFC_8785_APPENDIX_B.items())
def test_numbers_are_written_as_the_standard_says(bits: str, text: str) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical(value).decode() == text


def test_every_double_reads_back_as_itself() -> None:
    drawn = random.Random(0)
    for _ in range(3000):
        (value,) = struct.unpack(">d", drawn.randbytes(8))
        if value == value and abs(value) != float("inf"):
            assert repr(float(canonical(value))) == repr(value)


def test_the_example_of_the_standard() -> None:
    """RFC 8785, section 3.2.2 and 3.2.3: order of keys by UTF-16, escapes, numbers."""
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": '€$\u000f\nA\'B"\\\\"/',
        "literals": [None, True, False],
    }
    assert canonical(value).decode() == (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    keys = {"€": 1, "\r": 2, "\ufb33": 3, "1": 4, "😀": 5, "\x80": 6, "ö": 7}
    assert list(json.loads(canonical(keys))) == ["\r", "1", "\x80", "ö", "€", "😀", "\ufb33"]


def test_whole_numbers_are_one_value_however_they_are_written() -> None:
    assert canonical({"a": 1.0}) == canonical({"a": 1}) == b'{"a":1}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53 + 1, {1: 2}, "\ud800", object()])
def test_what_readers_would_not_agree_on_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        canonical(value)


@pytest.mark.parametrize("text", [b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"{"])
def test_a_file_that_reads_differently_elsewhere_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        read_strictly(text)
