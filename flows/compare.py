"""``alkn compare``: methods side by side, each a whole chain for every seed, in parallel processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from alkn.compare.cell import ground_is_made
from alkn.compare.config import Cell, Comparison, Entry, load_comparison
from alkn.compare.record import read_record, write_record
from alkn.compare.report import table_rows, write_report
from alkn.compare.results import CellResult, choose, collect, is_complete, read_cell
from alkn.errors import ChainBusy
from alkn.files import write_bytes
from alkn.project import Project
from tasks.compare import log_cell, make_base, make_cell, report, stopped_with_the_flow
from tasks.comparison_progress import cell_bars

FLOW = "compare"


@flow(name=FLOW, persist_result=False)
def compare(
    config: str, folder: str, workers: int | None = None, only: list[str] | None = None, record: str | None = None
) -> dict[str, Any]:
    """Make what is missing of a comparison, and its report.

    Args:
        config: settings of the comparison, see docs/COMPARE.md.
        folder: where everything goes; what lies there already is gone on with.
        workers: cells at a time; default: the settings', else what the machine has.
        only: labels of methods; the others are left as they are.
        record: the ``cells.json`` beside a page: what is on it is not made again, and what is made comes on it.

    Returns:
        ``rows`` of the table, and ``failed``: cell -> why it could not be made.

    Raises:
        InputError: if the settings are wrong, or another process works in the folder.
    """
    comparison = load_comparison(Path(config))
    entries, root = comparison.only(only or ()), Path(folder).resolve()
    runner = task_runner(comparison, workers)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        Project(root).key(create=True)
        frozen = root / "compare.yaml"
        write_bytes(frozen, Path(config).read_bytes())
        failed = make_cells.with_options(task_runner=runner)(str(root), str(frozen), comparison, entries, record)
        results = report(str(root), comparison, record)
    return {"rows": table_rows(results), "failed": failed}


@flow(name="compare-cells", persist_result=False, validate_parameters=False)
def make_cells(
    folder: str, config: str, comparison: Comparison, entries: Sequence[Entry], record: str | None = None
) -> dict[str, str]:
    """Base models, sweeps and cells without one; where a sweep is over, the cells of its best values.

    Returns:
        Cell -> why it could not be made.
    """
    work = Work(folder, config, comparison, record)
    with cell_bars(Path(folder)), stopped_with_the_flow():
        # Before any cell: one that waits for its base takes a place.
        for seed in dict.fromkeys(seed for entry in entries for seed in work.seeds(entry)):
            work.base(seed)
        # Sweeps first: others wait for what they choose.
        trials = {entry.label: [work.start(cell) for cell in comparison.trials(entry)] for entry in entries}
        cells = [work.start(cell) for entry in entries if not entry.sweep for cell in comparison.cells(entry)]
        for entry in entries:
            results = work.finish(trials[entry.label])
            over = [result for result in results if result is not None]
            if over and len(over) == len(results):
                best = choose(over, comparison.choose_by).cell.variant
                cells += [work.start(cell) for cell in comparison.cells(entry, best)]
        work.finish(cells)
    return work.failed


Started = tuple[Cell, "PrefectFuture[str] | None"]


class Work:
    """The tasks of one run: bases as soon as a cell needs one, cells that are not over yet.

    Args:
        folder: of the comparison.
        config: its settings, frozen.
        comparison: the same, read.
        record: of the page, or ``None``.

    Attributes:
        failed: cell -> why it could not be made.
    """

    def __init__(self, folder: str, config: str, comparison: Comparison, record: str | None) -> None:
        self._folder, self._config, self._comparison = folder, config, comparison
        self._path = None if record is None else Path(record)
        self._record = read_record(self._path)
        self._bases: dict[int, PrefectFuture[str] | str] = {}
        self.failed: dict[str, str] = {}

    def start(self, cell: Cell) -> Started:
        """Submit a cell, unless nothing of it is left to make."""
        if self._complete(cell):
            return cell, None
        base = self.base(cell.seed)
        named = make_cell.with_options(task_run_name=cell.title)
        return cell, named.submit(self._folder, self._config, cell, base)  # type: ignore[arg-type]

    def finish(self, started: Sequence[Started]) -> list[CellResult | None]:
        """Wait for cells; log each, and bring the table up to date."""
        results: list[CellResult | None] = []
        for cell, future in started:
            reason = "" if future is None else future.result()
            if reason:
                self.failed[cell.title] = reason
                results.append(None)
                continue
            log_cell(self._folder, self._comparison, cell)
            results.append(self._result(cell))
            if future is not None:
                so_far = collect(Path(self._folder), self._comparison, self._record)
                write_report(Path(self._folder), self._comparison, so_far, pictures=False)
                if self._path is not None:
                    write_record(self._path, self._comparison, so_far, self._record)
        return results

    def base(self, seed: int) -> PrefectFuture[str] | str:
        """What a seed's cells wait for: the base model being made, or nothing."""
        if seed not in self._bases:
            made = ground_is_made(Path(self._folder), self._comparison, seed)
            self._bases[seed] = "" if made else make_base.submit(self._folder, self._config, seed)
        return self._bases[seed]

    def seeds(self, entry: Entry) -> list[int]:
        """The seeds of which something is left to make for a method."""
        comparison = self._comparison
        trials = comparison.trials(entry)
        tried = [result for result in map(self._result, trials) if result and is_complete(result, comparison)]
        if len(tried) < len(trials):
            return list(comparison.seeds_of(entry))
        best = choose(tried, comparison.choose_by).cell.variant if tried else ""
        return [cell.seed for cell in comparison.cells(entry, best) if not self._complete(cell)]

    def _complete(self, cell: Cell) -> bool:
        return is_complete(self._result(cell), self._comparison)

    def _result(self, cell: Cell) -> CellResult | None:
        return read_cell(Path(self._folder), self._comparison, self._record, cell)


def task_runner(comparison: Comparison, workers: int | None) -> TaskRunner[Any]:
    """The Prefect task runner that the settings ask for."""
    count = workers or comparison.workers or _places(comparison)
    if comparison.runner == "dask":
        from prefect_dask import DaskTaskRunner

        runner: TaskRunner[Any] = DaskTaskRunner(cluster_kwargs={"n_workers": count, "threads_per_worker": 1})
        return runner
    if comparison.runner == "ray":
        from prefect_ray import RayTaskRunner

        runner = RayTaskRunner(init_kwargs={"num_cpus": count})
        return runner
    return ThreadPoolTaskRunner(max_workers=count)


def _places(comparison: Comparison) -> int:
    """As many cells at a time as there are GPUs, or groups of ``run.threads`` cores."""
    import torch

    run = comparison.ground_settings(comparison.seeds[0]).run
    if run.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // run.threads)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    project = Project(folder)
    project.private.mkdir(mode=0o700, exist_ok=True)
    try:
        with FileLock(project.private / "compare.lock", timeout=0):
            yield
    except Timeout:
        raise ChainBusy(f"{folder}: another 'alkn compare' is at work in this folder; wait until it ends") from None
