"""Texts of params.yaml that other programs read: schedules of cron and addresses of MLflow stores."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

MONTHS = dict(zip("jan feb mar apr may jun jul aug sep oct nov dec".split(), range(1, 13), strict=True))
DAYS = dict(zip("sun mon tue wed thu fri sat".split(), range(7), strict=True))
FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 7, DAYS),
)
"""Name, smallest and largest number, and words of each field."""
DATABASES = ("postgresql", "mysql", "mssql")


def check_cron(text: str) -> str:
    """A schedule of five fields, such as ``0 3 * * mon-fri``.

    Raises:
        ValueError: saying which field is wrong.
    """
    fields = text.split()
    if len(fields) != len(FIELDS):
        raise ValueError(f"expected the five fields of cron, such as '0 3 * * *', and there are {len(fields)}")
    for field, (name, low, high, words) in zip(fields, FIELDS, strict=True):
        if not all(_is_part(part, low, high, words) for part in field.lower().split(",")):
            raise ValueError(f"expected a {name} of cron, {low} to {high}, '*', a range or a step, and it is {field!r}")
    return text


def _is_part(part: str, low: int, high: int, words: dict[str, int]) -> bool:
    """Whether it is ``*``, a number, a word or a range, with or without a step."""
    found = re.fullmatch(r"(?:\*|(\w+)(?:-(\w+))?)(?:/0*([1-9]\d{0,3}))?", part, re.ASCII)
    if found is None:
        return False
    first, last, step = found.groups()
    numbers = [words.get(end, int(end) if end.isdigit() else -1) for end in (first, last) if end is not None]
    if first is not None and last is None and step is not None:
        return False
    return numbers == sorted(numbers) and all(low <= number <= high for number in numbers)


def check_tracking_uri(text: str) -> str:
    """The address of an MLflow server, or of a database that MLflow can use as its store.

    Raises:
        ValueError: saying what an address looks like.
    """
    scheme, slashes, _ = text.partition("://")
    database, _, _ = scheme.partition("+")
    try:
        parts = urlsplit(text)
        host, named, _ = parts.hostname, len(parts.path) > 1, parts.port
    except ValueError:  # of a port that is no number, or half an IPv6 address
        host, named = None, False
    known = {"sqlite": named and not host, "http": bool(host), "https": bool(host)}
    if slashes and known.get(database, database in DATABASES and (bool(host) or named)):
        return text
    raise ValueError(
        "expected the address of a store: sqlite:///FILE with three slashes, http://HOST:PORT,"
        f" or a database such as {DATABASES[0]}://HOST/NAME"
    )
