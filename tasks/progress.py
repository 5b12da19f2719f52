"""Progress bars for the long work of the library, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from alkn.core import scoring


@contextmanager
def progress_bars(title: str) -> Iterator[scoring.Progress]:
    """Bars under one title, one for each kind of work; a count that goes down starts its bar anew."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bars:
        known: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(f"{title}: {what}", total=total)
            bars.update(known[what], completed=done, total=total)

        yield report
