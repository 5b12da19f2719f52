"""The ledger: verdicts, order, round trips, its lock, and files that people have edited wrongly."""

from __future__ import annotations

import threading
from datetime import date
from pathlib import Path

import pytest
import yaml

from alkn.errors import InputError
from alkn.project import Project
from alkn.requests.ledger import BASE, Entry, Ledger, editing, load_ledger, save_ledger

DAY = date(2025, 3, 1)
LISTS = ("accepted", "pending", "rejected", "withdrawn")


def entry(records: int = 3) -> Entry:
    return Entry(received="2025-02-01", due="2025-03-03", records=records, overlaps={"retain": 1})


def pending(*ids: str) -> Ledger:
    return Ledger(pending={name: entry() for name in ids})


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "data").mkdir()
    (tmp_path / "params.yaml").write_text("")
    (tmp_path / "data" / "ledger.yaml").write_text("")
    return Project.at(tmp_path)


def accept(ledger: Ledger, name: str, *, previous: str, accepted: bool = True) -> None:
    ledger.decide(name, accepted=accepted, previous=previous, reason="utility", day=DAY)


def test_an_empty_file_is_an_empty_ledger(project: Project) -> None:
    ledger = load_ledger(project)
    assert ledger == Ledger() and ledger.ids() == []
    assert (ledger.newest, ledger.where("r001")) == (BASE, None)


def test_verdicts_move_requests() -> None:
    """An accepted one keeps no reason, a rejected one does; both say where they started and when."""
    ledger = pending("r001", "r002")
    accept(ledger, "r001", previous="base")
    accept(ledger, "r002", previous="r001", accepted=False)
    assert (list(ledger.accepted), list(ledger.pending), list(ledger.rejected)) == (["r001"], [], ["r002"])
    done = {"previous": "base", "decided": "2025-03-01"}
    assert ledger.entry("r001") == entry().model_copy(update=done)
    rejected = ledger.entry("r002")
    assert (rejected.previous, rejected.reason, rejected.decided) == ("r001", "utility", "2025-03-01")
    assert ledger.newest == "r001"


@pytest.mark.parametrize("accepted", [True, False])
def test_the_same_verdict_again_changes_nothing(accepted: bool) -> None:
    """A run that was cut off after its verdict says it once more, on another day."""
    ledger = pending("r001")
    accept(ledger, "r001", previous="base", accepted=accepted)
    before = ledger.model_copy(deep=True)
    ledger.decide("r001", accepted=accepted, previous="x", reason="z", day=date(2025, 4, 1))
    assert ledger == before


def test_a_withdrawn_request_stays_withdrawn() -> None:
    """It was withdrawn while its step was made: the verdict is not entered."""
    ledger = pending("r001")
    ledger.withdraw("r001", day=DAY)
    before = ledger.model_copy(deep=True)
    accept(ledger, "r001", previous="base")
    assert ledger == before and ledger.where("r001") == "withdrawn"


@pytest.mark.parametrize("name", ["r001", "unknown"])
def test_a_verdict_on_what_is_not_pending_is_refused(name: str) -> None:
    """Decided otherwise, or unknown: nothing is moved."""
    ledger = pending("r001", "r002")
    accept(ledger, "r001", previous="base", accepted=False)
    ledger.withdraw("r002", day=DAY)
    before = ledger.model_copy(deep=True)
    with pytest.raises(InputError):
        accept(ledger, name, previous="base")
    assert ledger == before


def test_withdrawing() -> None:
    ledger = pending("r001", "r002", "r003")
    ledger.withdraw("r002", day=DAY)
    assert list(ledger.pending) == ["r001", "r003"]
    assert ledger.withdrawn == {"r002": entry().model_copy(update={"decided": "2025-03-01"})}
    accept(ledger, "r001", previous="base")
    for name, place in (("r001", "accepted"), ("r002", "withdrawn")):
        with pytest.raises(InputError, match=f"'{name}' is {place} already: only a pending one"):
            ledger.withdraw(name, day=DAY)
    with pytest.raises(InputError, match="no request 'r009' in the ledger; 'alkn request list'"):
        ledger.withdraw("r009", day=DAY)
    assert list(ledger.pending) == ["r003"]


def test_the_chain_before_a_step() -> None:
    """Accepted requests in the order of their verdicts, which is not the order of their names."""
    ledger = pending("c", "a", "d", "b")
    accept(ledger, "d", previous="base")
    accept(ledger, "c", previous="d", accepted=False)
    accept(ledger, "a", previous="d")
    assert ledger.newest == "a"
    assert ledger.chain_before("d") == []
    assert ledger.chain_before("a") == ["d"]
    assert ledger.chain_before("b") == ["d", "a"]
    assert ledger.ids() == ["d", "a", "b", "c"]
    assert [ledger.where(name) for name in ("d", "b", "c", "x")] == ["accepted", "pending", "rejected", None]


def test_round_trip_keeps_order_and_every_field(project: Project) -> None:
    """Names that sort otherwise, dates that stay text, and the same bytes when saved again."""
    ledger = pending("zeta", "alpha", "r010", "r002", "w")
    accept(ledger, "zeta", previous="base")
    accept(ledger, "alpha", previous="zeta")
    accept(ledger, "r010", previous="alpha", accepted=False)
    ledger.withdraw("w", day=DAY)
    save_ledger(project, ledger)
    written = project.ledger.read_bytes()
    again = load_ledger(project)
    assert again == ledger and again.ids() == ledger.ids() == ["zeta", "alpha", "r002", "r010", "w"]
    save_ledger(project, again)
    assert project.ledger.read_bytes() == written
    raw = yaml.safe_load(written)
    assert set(raw) == set(LISTS)
    assert raw["accepted"]["alpha"]["previous"] == "zeta" and raw["pending"]["r002"]["received"] == "2025-02-01"
    assert "previous" not in raw["pending"]["r002"] and "reason" not in raw["accepted"]["zeta"]


def test_editing_writes_when_it_ends(project: Project) -> None:
    with editing(project) as ledger:
        ledger.pending["r001"] = entry()
        assert "r001" not in project.ledger.read_text()
    assert load_ledger(project).ids() == ["r001"]


def test_editing_writes_nothing_after_an_error(project: Project) -> None:
    with editing(project) as ledger:
        ledger.pending["r001"] = entry()
    before = project.ledger.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), editing(project) as ledger:
        ledger.pending["r002"] = entry()
        raise RuntimeError("stop")
    assert project.ledger.read_bytes() == before
    with editing(project) as ledger:
        assert ledger.ids() == ["r001"]


def test_editors_wait_for_each_other(project: Project) -> None:
    """Twelve at once, each adding one request: none is lost."""
    start = threading.Barrier(12)

    def add(number: int) -> None:
        start.wait()
        with editing(project) as ledger:
            ledger.pending[f"r{number:03d}"] = entry()

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(load_ledger(project).ids()) == [f"r{number:03d}" for number in range(12)]


GOOD = "{received: '2025-02-01', records: 3}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pending: {r001: [", "data/ledger.yaml: not valid YAML"),
        ("- r001", "data/ledger.yaml: "),
        (f"waiting: {{r001: {GOOD}}}", "data/ledger.yaml: waiting: "),
        ("pending: {r001: {received: '2025-02-01'}}", "data/ledger.yaml: pending.r001.records: "),
        ("pending: {r001: {received: '2025-02-01', records: 0}}", "data/ledger.yaml: pending.r001.records: "),
        (
            "pending: {r001: {received: '2025-02-01', records: 3, name: x}}",
            "data/ledger.yaml: pending.r001.name: ",
        ),
        (f"pending: {{R1: {GOOD}}}", "request id 'R1'"),
        (f"pending: {{../x: {GOOD}}}", "request id '../x'"),
        (f"accepted: {{base: {GOOD}}}", "request id 'base' is taken"),
        (
            f"accepted: {{r001: {GOOD}}}\npending: {{r001: {GOOD}}}",
            "data/ledger.yaml: a request stands in two lists",
        ),
        (f"pending: {{2024: {GOOD}}}", "data/ledger.yaml: pending."),
        (f"pending: {{on: {GOOD}}}", "data/ledger.yaml: pending."),
    ],
)
def test_a_wrong_ledger_is_named(text: str, message: str, project: Project) -> None:
    """File and key; the file stays as it is, and editing it is refused too."""
    project.ledger.write_text(text)
    with pytest.raises(InputError) as error:
        load_ledger(project)
    assert str(error.value).startswith(message)
    with pytest.raises(InputError), editing(project):
        pass
    assert project.ledger.read_text() == text
