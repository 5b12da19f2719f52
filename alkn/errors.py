"""Errors that a user can act on. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class AlknError(Exception):
    """Base of the errors that the command line prints as one message, without a traceback."""

    exit_code = 1


class InputError(AlknError):
    """Something the user gave is wrong: a file, a setting, an id. Nothing was changed on disk."""

    exit_code = 2


class ChainBusy(InputError):
    """Another process is writing this chain."""


class ChainBroken(AlknError):
    """A file of the chain does not match the digest that its manifest holds."""


class RequestsRejected(AlknError):
    """A run is over, everything is recorded, and a gate rejected some of its requests.

    Args:
        decided: one row a request that was decided: ``request``, ``accepted``, ``reason``.
    """

    def __init__(self, decided: list[dict[str, Any]]) -> None:
        self.decided = decided
        super().__init__(f"rejected: {', '.join(row['request'] for row in decided if not row['accepted'])}")


class DoesNotHold(AlknError):
    """A verification is over, and something came back or is not what was recorded.

    Args:
        report: see :func:`alkn.verify.verify_champion`.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        found = [f"{one['where']}: {one['kind']}: {one['what']}" for one in report["findings"]]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        super().__init__(f"{report['champion']} does not hold: {'; '.join(found[:3])}{more}")


class TrainingDiverged(AlknError):
    """A loss or a weight stopped being a finite number."""


class WrongKeys(ValueError):
    """Several keys of a section are wrong; raised by a validator, told a line each by :func:`alkn.settings.explain`.

    Args:
        faults: (key below the section, what is wrong with it); an empty key is the section itself.
    """

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = list(faults)
        super().__init__("; ".join(f"{key}: {fault}" if key else fault for key, fault in self.faults))
