"""``alkn request``: add, list, show and withdraw deletion requests."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flows.console import JSON, here, number, say, show_table


@click.group()
def request() -> None:
    """Deletion requests: add, list, show, withdraw."""


@request.command("add")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--id", "request_id", help="Its id [default: the next r001, r002, ...].")
@click.option("--due", help="The day it must be done by, YYYY-MM-DD.")
@JSON
def request_add(file: Path, request_id: str | None, due: str | None, as_json: bool) -> None:
    """Validate a file of records and enter it into the ledger."""
    from datetime import date

    from alkn.requests.intake import add_request
    from tasks import versioning

    project = here()
    added = add_request(
        project, project.settings(), file, request_id=request_id, due=due, today=date.today(),
        track=lambda path: versioning.track_file(project, path),
    )  # fmt: skip
    if as_json:
        say(json.dumps({"request": added.request, **added.entry.model_dump()}))
        return
    say(f"request {added.request}: {added.entry.records} records, pending")
    for name, count in added.entry.overlaps.items():
        say(f"warning: {count} of them stand in {name} too, in the same or nearly the same words")


@request.command("list")
@JSON
def request_list(as_json: bool) -> None:
    """All requests with their dates and verdicts."""
    from alkn.requests.ledger import Ledger, load_ledger

    ledger = load_ledger(here())
    rows = [
        {"request": name, "verdict": verdict, **getattr(ledger, verdict)[name].model_dump()}
        for verdict in Ledger.model_fields
        for name in getattr(ledger, verdict)
    ]
    if as_json:
        say(json.dumps(rows))
        return
    columns = ("request", "verdict", "records", "received", "due", "previous")
    show_table("Requests", columns, [[row[c] for c in columns] for row in rows])


@request.command("show")
@click.argument("request_id")
@JSON
def request_show(request_id: str, as_json: bool) -> None:
    """One request: its entry, its verdict and every gate's checks."""
    from alkn.files import read_json
    from alkn.requests.ledger import load_ledger
    from alkn.summary import chain_rows

    project = here()
    ledger = load_ledger(project)
    entry = ledger.entry(request_id)
    row = next(row for row in chain_rows(project, ledger) if row["request"] == request_id)
    gate = project.step(request_id).gate
    gates = read_json(gate)["gates"] if gate.is_file() else {}
    if as_json:
        say(json.dumps({**entry.model_dump(), **row, "gates": gates}))
        return
    for name, value in {**entry.model_dump(), **row}.items():
        if value not in (None, {}, []):
            say(f"{name:<13} {value}")
    checks = [
        [name, c["what"], number(c["value"]), number(c["limit"]), "passed" if c["passed"] else "failed"]
        for name, verdict in gates.items()
        for c in verdict["checks"]
    ]
    show_table("Gates", ("gate", "check", "value", "limit", ""), checks)


@request.command("withdraw")
@click.argument("request_id")
def request_withdraw(request_id: str) -> None:
    """Take a pending request out of the queue."""
    from datetime import date

    from alkn.requests.ledger import editing

    with editing(here()) as ledger:
        ledger.withdraw(request_id, day=date.today())
    say(f"request {request_id}: withdrawn")
