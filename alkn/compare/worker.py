"""The process that makes one base model or one cell: ``python -m alkn.compare.worker FOLDER CONFIG JOB``.

JOB is ``base/<seed>``, ``trial/<label>/<variant>/<seed>`` or ``cell/<label>/<variant>/<seed>``. A process of
its own has threads, memory and a crash of its own; it ends when its parent does, however that ends, because its
standard input is then closed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alkn.compare.config import Cell

SAID = "ended: "
"""Before the last words of a process that an error of ours ended, in its log."""
EVERY_S = 0.5
"""Seconds between two reports of progress."""


class ProgressFile:
    """What the process is doing, for whoever draws bars: a small JSON file, gone when the work is over.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._told = path, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, request: str, what: str, done: int, total: int) -> None:
        """Write it down, not more often than twice a second."""
        now = time.monotonic()
        if now - self._told < EVERY_S:
            return
        self._told = now
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"request": request, "what": what, "done": done, "total": total}))
        os.replace(temporary, self._path)

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


def progress_folder(folder: Path) -> Path:
    """Where the jobs of a comparison tell how far they are, a file each."""
    return folder / ".progress"


def job_of(cell: Cell) -> str:
    """The JOB argument that makes a cell."""
    return f"{'trial' if cell.trial else 'cell'}/{cell.label}/{cell.variant}/{cell.seed}"


def _end_with_parent() -> None:
    # Not sys.stdin: its lock would be held while the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Do the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the comparison")
    parser.add_argument("config", type=Path, help="its settings")
    parser.add_argument("job", help="base/<seed>, trial/<label>/<variant>/<seed> or cell/...")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Here, not above: they take seconds, in which the parent may end.
    from alkn.compare.cell import make_ground, run_cell
    from alkn.compare.config import Cell, load_comparison
    from alkn.errors import AlknError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder, comparison = arguments.folder, load_comparison(arguments.config)
    progress = ProgressFile(progress_folder(folder) / f"{arguments.job.replace('/', '~')}.json")
    try:
        kind, *which, seed = arguments.job.split("/")
        if kind == "base":
            make_ground(folder, comparison, int(seed), progress)
        else:
            label, variant = which
            run_cell(folder, comparison, Cell(label, variant, int(seed), kind == "trial"), progress)
    except AlknError as error:
        logging.getLogger(__name__).error("%s", error, exc_info=True)
        # Last: whoever started this process tells it.
        logging.getLogger(__name__).error("%s%s", SAID, str(error).replace("\n", "; "))
        raise SystemExit(1) from None
    finally:
        progress.close()


if __name__ == "__main__":
    main()
