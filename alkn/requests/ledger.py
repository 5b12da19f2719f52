"""The ledger: the chain of requests, in git, without personal text. It decides every verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alkn.errors import InputError
from alkn.files import write_yaml
from alkn.project import Project
from alkn.requests.ids import check_id

BASE = "base"
ATTESTED = "attested, no longer measurable: the records were erased"


class Entry(BaseModel):
    """One request.

    Attributes:
        received: the day it came in, YYYY-MM-DD.
        due: the day it must be done by, or ``None``.
        records: how many records it asks to forget.
        digest: keyed digest of its file; ``None`` until the file is there.
        source: file of the project that the records are taken from when the request is begun.
        overlaps: other set -> records of this request that stand there too.
        previous: the step it started from; written with the verdict.
        decided: the day of the verdict or the withdrawal.
        reason: why it was rejected: the gates that failed.
        erased: the day its records were erased here too. What its step measured on them stays attested by that
            step's manifest, and can no longer be measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    received: str
    due: str | None = None
    records: int = Field(ge=1)
    digest: str | None = None
    source: str | None = None
    overlaps: dict[str, int] = {}
    previous: str | None = None
    decided: str | None = None
    reason: str | None = None
    erased: str | None = None


class Ledger(BaseModel):
    """The four lists, each in order. DVC reads ``accepted`` only."""

    model_config = ConfigDict(extra="forbid")

    accepted: dict[str, Entry] = {}
    pending: dict[str, Entry] = {}
    rejected: dict[str, Entry] = {}
    withdrawn: dict[str, Entry] = {}

    def where(self, request_id: str) -> str | None:
        """The list that holds an id, or ``None``."""
        return next((name for name in Ledger.model_fields if request_id in getattr(self, name)), None)

    def ids(self) -> list[str]:
        """All ids, of all lists."""
        return [request_id for name in Ledger.model_fields for request_id in getattr(self, name)]

    def entry(self, request_id: str) -> Entry:
        """An entry of any list.

        Raises:
            InputError: if no list holds the id.
        """
        place = self.where(request_id)
        if place is None:
            raise InputError(f"no request {request_id[:80]!r} in the ledger; 'alkn request list' shows them")
        entries: dict[str, Entry] = getattr(self, place)
        return entries[request_id]

    @property
    def newest(self) -> str:
        """The id of the newest accepted step, or ``base``."""
        return next(reversed(self.accepted), BASE)

    def chain_before(self, request_id: str) -> list[str]:
        """The accepted steps that a step builds on, oldest first; of a pending one, all accepted."""
        accepted = list(self.accepted)
        return accepted[: accepted.index(request_id)] if request_id in self.accepted else accepted

    def decide(self, request_id: str, *, accepted: bool, previous: str, reason: str, day: date) -> None:
        """Move a pending request to its verdict.

        Saying a verdict again changes nothing, and a request that was withdrawn meanwhile stays withdrawn.

        Raises:
            InputError: if there is no such request, or the other verdict stands already.
        """
        verdict, place = "accepted" if accepted else "rejected", self.where(request_id)
        if place in (verdict, "withdrawn"):
            return
        if place != "pending":
            self.entry(request_id)
            raise InputError(f"request {request_id!r} is {place} already; it cannot be {verdict} too")
        entry = self.pending.pop(request_id).model_copy(
            update={
                "previous": previous,
                "decided": day.isoformat(),
                "reason": None if accepted else reason,
            }
        )
        (self.accepted if accepted else self.rejected)[request_id] = entry

    def withdraw(self, request_id: str, *, day: date) -> None:
        """Take a pending request out of the queue.

        Raises:
            InputError: if it is not pending.
        """
        place = self.where(request_id)
        if place != "pending":
            self.entry(request_id)
            raise InputError(f"request {request_id!r} is {place} already: only a pending one can be withdrawn")
        self.withdrawn[request_id] = self.pending.pop(request_id).model_copy(update={"decided": day.isoformat()})


def load_ledger(project: Project) -> Ledger:
    """Read data/ledger.yaml.

    Raises:
        InputError: naming the file and the key that is wrong.
    """
    name = project.ledger.relative_to(project.root)
    try:
        ledger = Ledger.model_validate(yaml.safe_load(project.ledger.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError:
        raise InputError(f"{name}: not valid YAML") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for request_id in ledger.ids():
        check_id(request_id)
    if len(set(ledger.ids())) != len(ledger.ids()):
        raise InputError(f"{name}: a request stands in two lists")
    return ledger


def erased_requests(project: Project, requests: Iterable[str]) -> tuple[str, ...]:
    """Those accepted requests whose records are gone because they were erased; a file that is just missing is none."""
    gone = [name for name in requests if not project.request(name).is_file()]
    accepted = load_ledger(project).accepted if gone else {}
    return tuple(name for name in gone if name in accepted and accepted[name].erased)


def save_ledger(project: Project, ledger: Ledger) -> None:
    """Write data/ledger.yaml atomically; the caller holds the ledger's lock."""
    write_yaml(project.ledger, ledger.model_dump(exclude_defaults=False, exclude_none=True))


@contextmanager
def editing(project: Project) -> Iterator[Ledger]:
    """The ledger under its lock; it is written back if the block ends without an error."""
    with project.ledger_lock():
        ledger = load_ledger(project)
        yield ledger
        save_ledger(project, ledger)
