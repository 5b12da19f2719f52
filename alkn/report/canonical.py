"""One value, one sequence of bytes: the JSON that a signature is made over.

Source: RFC 8785, JSON Canonicalization Scheme: UTF-8, no white space, keys by their UTF-16 code units, strings escaped
as little as JSON allows, numbers as ECMAScript writes them (ECMA-262, Number::toString).
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

LARGEST = 2**53
"""Larger integers are no exact number for every reader of JSON; write them as text."""


def canonical(value: Any) -> bytes:
    """The canonical JSON of a value of dicts with text keys, lists, text, numbers, booleans and ``None``.

    Raises:
        ValueError: on a number that JSON cannot say exactly, a key that is no text, or half a surrogate pair.
    """
    return _written(value).encode()


def read_strictly(text: bytes) -> Any:
    """Parse JSON of which every reader sees the same: no key given twice, no NaN, UTF-8.

    Raises:
        ValueError: otherwise.
    """
    return json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_refuse)


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        if abs(value) > LARGEST:
            raise ValueError(f"{value} is beyond 2^53 and no exact number in JSON; write it as text")
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key is no text")
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{_written(key)}:{_written(value[key])}" for key in keys) + "}"
    raise ValueError(f"a {type(value).__name__} has no place in JSON")


def _number(value: float) -> str:
    """ECMA-262, Number::toString: the shortest digits that read back as the same double."""
    number = Decimal(repr(value))
    if not number.is_finite():
        raise ValueError(f"{value} is no number of JSON")
    if number.is_zero():
        return "0"
    _, places, exponent = number.as_tuple()
    digits = "".join(map(str, places))
    point = len(digits) + int(exponent)  # the decimal point stands after so many digits
    digits = digits.lstrip("0").rstrip("0")
    if len(digits) <= point <= 21:
        text = digits + "0" * (point - len(digits))
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{digits}"
    else:
        text = f"{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{point - 1:+d}"
    return f"-{text}" if number.is_signed() else text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
