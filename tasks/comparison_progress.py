"""Bars of the cells that are being made, drawn from the small files in which their processes tell how far they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from alkn.compare.worker import EVERY_S, progress_folder


@contextmanager
def cell_bars(folder: Path) -> Iterator[None]:
    """One bar a process that is at work below ``folder``, on standard error; it goes when the process is done."""
    columns = (TextColumn("{task.description:<60}"), BarColumn(), TimeElapsedColumn())
    over = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1 / EVERY_S) as bars:
        thread = threading.Thread(target=_watch, args=(folder, bars, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _watch(folder: Path, bars: Progress, over: threading.Event) -> None:
    known: dict[str, TaskID] = {}
    while not over.wait(EVERY_S):
        told = {path.stem: path for path in progress_folder(folder).glob("*.json")}
        for job in set(known) - set(told):
            bars.remove_task(known.pop(job))
        for job, path in sorted(told.items()):
            try:
                now = json.loads(path.read_text())
            except (OSError, ValueError):
                continue  # it has just been removed
            text = f"{job.replace('~', ' ')}: {now['request']}: {now['what']}"
            if job not in known:
                known[job] = bars.add_task(text)
            bars.update(known[job], description=text, completed=now["done"], total=max(1, now["total"]))
