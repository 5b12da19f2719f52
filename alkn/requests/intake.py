"""Intake: a user's file of records becomes a pending request of the chain."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import keyed_digest_of, read_jsonl, remove, write_jsonl
from alkn.models import context_length, load_tokenizer
from alkn.project import Project
from alkn.record_sets import SPLITS, Records, load_split
from alkn.requests.ids import check_id, next_id
from alkn.requests.ledger import Entry, Ledger, editing, load_ledger
from alkn.requests.schema import form_of, read_records
from alkn.settings import Settings

SHINGLE = 5
SHARED = 0.5

Track = Callable[[Path], object]
"""Puts a file under data versioning."""


@dataclass(frozen=True)
class Added:
    """What intake did: the id and its ledger entry."""

    request: str
    entry: Entry


def add_request(
    project: Project,
    settings: Settings,
    file: Path,
    *,
    request_id: str | None,
    due: str | None,
    today: date,
    track: Track,
) -> Added:
    """Validate a file, report overlaps, store it under data versioning and enter it into the ledger.

    Nothing is written before everything is checked, and what was written is taken back if a later part fails.

    Args:
        project: whose chain.
        settings: templates for the check against the model's context.
        file: the user's records; see :mod:`alkn.requests.schema`.
        request_id: its id; ``None``: the next free one.
        due: YYYY-MM-DD, not in the past.
        today: the day of receipt.
        track: puts the stored file under data versioning.

    Raises:
        InputError: saying what is wrong with file, id or date.
    """
    if request_id is not None:
        check_id(request_id)
    _check_due(due, today)
    records = read_records(file)
    check_fits(project, settings, file.name, records)
    overlaps = find_overlaps(project, load_ledger(project), records)
    with editing(project) as ledger:
        chosen = request_id or next_id(ledger.ids())
        if ledger.where(chosen) is not None:
            raise InputError(f"request id {chosen!r} is in use: it is {ledger.where(chosen)}")
        digest = store(project, chosen, records, create_key=not any(_digests(ledger)), track=track)
        entry = Entry(received=today.isoformat(), due=due, records=len(records), digest=digest, overlaps=overlaps)
        ledger.pending[chosen] = entry
    return Added(chosen, entry)


def begin_request(project: Project, settings: Settings, request_id: str, *, track: Track) -> Entry:
    """Bring a pending request's file into place and check it against the ledger.

    An entry with a ``source`` and no file yet takes its records from there (the requests that a
    benchmark comes with).

    Raises:
        InputError: if the file is missing, changed, or does not fit the model.
    """
    with editing(project) as ledger:
        entry = ledger.entry(request_id)
        if ledger.where(request_id) != "pending":
            raise InputError(f"request {request_id!r} is {ledger.where(request_id)}: there is nothing to begin")
        if entry.digest is None:
            if entry.source is None:
                raise InputError(f"data/ledger.yaml: {request_id}: neither a digest nor a source")
            records = read_records(project.root / entry.source)
            overlaps = find_overlaps(project, ledger, records, leave_out=request_id)
            digest = store(project, request_id, records, create_key=not any(_digests(ledger)), track=track)
            entry = entry.model_copy(update={"digest": digest, "records": len(records), "overlaps": overlaps})
            ledger.pending[request_id] = entry
    check_stored(project, request_id, entry)
    check_fits(project, settings, request_id, read_jsonl(project.request(request_id)))
    return entry


def check_stored(project: Project, request_id: str, entry: Entry) -> None:
    """Hold a request's file against the digest that the ledger attests.

    Raises:
        InputError: if the file is missing or another one.
    """
    path = project.request(request_id)
    if not path.is_file():
        raise InputError(f"data/requests/{request_id}.jsonl is missing; 'dvc checkout' or 'dvc pull' brings it back")
    if keyed_digest_of(path, project.key()) != entry.digest:
        raise InputError(f"data/requests/{request_id}.jsonl was changed after intake: the ledger has another digest")


def store(project: Project, request_id: str, records: Records, *, create_key: bool, track: Track) -> str:
    """Write a request's records, salted so that no plain digest of the file can be guessed; return its keyed digest."""
    path = project.request(request_id)
    key = project.key(create=create_key)
    try:
        write_jsonl(path, [{**record, "salt": secrets.token_hex(8)} for record in records])
        track(path)
    except BaseException:
        remove(path)
        remove(path.with_name(f"{path.name}.dvc"))
        raise
    return keyed_digest_of(path, key)


def check_fits(project: Project, settings: Settings, name: str, records: Records) -> None:
    """Encode the records with the base model's tokenizer, if there is one yet.

    Raises:
        InputError: naming the records that are longer than the model's context.
    """
    model = project.base.model
    if settings.base.model is not None and not model.exists():
        model = project.root / Path(settings.base.model).expanduser()
    if model.exists():
        tokenizer = load_tokenizer(model, trust_remote_code=settings.base.trust_remote_code)
        context = context_length(model, trust_remote_code=settings.base.trust_remote_code)
        Encoder(tokenizer, settings.data, context=context).record_set(name, records)


def find_overlaps(
    project: Project, ledger: Ledger, records: Records, *, leave_out: str | None = None
) -> dict[str, int]:
    """How many of the records stand, in the same or nearly the same words, in a split or another request.

    Nearly the same: half of a record's 5-word shingles are shared with one record of the other set.
    Sets without an overlap are left out.
    """
    others: dict[str, Records] = {name: load_split(project, name) for name in SPLITS}
    for request_id in (*ledger.accepted, *ledger.rejected, *ledger.pending):
        if request_id != leave_out and project.request(request_id).is_file():
            others[request_id] = read_jsonl(project.request(request_id))
    counts = {name: count_overlaps(records, other) for name, other in others.items()}
    return {name: count for name, count in counts.items() if count}


def count_overlaps(records: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> int:
    """Records of ``records`` of which one of ``others`` shares at least half of the shingles."""
    index: dict[int, list[int]] = {}
    for number, other in enumerate(others):
        for shingle in _shingles(other):
            index.setdefault(shingle, []).append(number)
    count = 0
    for record in records:
        mine = _shingles(record)
        hits: dict[int, int] = {}
        for shingle in mine:
            for number in index.get(shingle, ()):
                hits[number] = hits.get(number, 0) + 1
        count += max(hits.values(), default=0) >= SHARED * len(mine)
    return count


def _shingles(record: Mapping[str, Any]) -> set[int]:
    words = re.findall(r"\w+", " ".join(_texts(record)).casefold())
    if len(words) <= SHINGLE:
        return {hash(tuple(words))}
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def _texts(record: Mapping[str, Any]) -> Iterable[str]:
    form = form_of(record)
    if form == "question/answer":
        return (record["question"], record["answer"])
    if form == "prompt/completion":
        return (record["prompt"], record["completion"])
    return [m["content"] for m in record["messages"]] if form == "chat" else (record["text"],)


def _digests(ledger: Ledger) -> Iterable[str | None]:
    return (ledger.entry(request_id).digest for request_id in ledger.ids())


def _check_due(due: str | None, today: date) -> None:
    if due is None:
        return
    try:
        day = date.fromisoformat(due) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", due) else None
    except ValueError:
        day = None
    if day is None:
        raise InputError(f"--due {due[:40]!r}: expected a date of the form YYYY-MM-DD")
    if day < today:
        raise InputError(f"--due {due}: the date is in the past (today is {today.isoformat()})")
