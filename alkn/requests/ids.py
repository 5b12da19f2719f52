"""Request ids: a strict pattern, because an id becomes a folder, a stage and a key of YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable

from alkn.errors import InputError

PATTERN = re.compile(r"[a-z][a-z0-9_-]{0,62}")
RESERVED = frozenset({"base", "yes", "no", "on", "off", "true", "false", "null", "y", "n"})


def check_id(text: str) -> str:
    """Return ``text`` if it may name a request.

    Raises:
        InputError: saying what is allowed.
    """
    if not PATTERN.fullmatch(text):
        raise InputError(
            f"request id {text[:80]!r}: expected a lower-case letter, then at most 62 of a-z, 0-9, '_' and '-'"
        )
    if text in RESERVED:
        raise InputError(f"request id {text!r} is taken: it is the base model or a word of YAML")
    return text


def next_id(taken: Iterable[str]) -> str:
    """The first free id of the form r001."""
    used = set(taken)
    number = 1
    while f"r{number:03d}" in used:
        number += 1
    return f"r{number:03d}"
