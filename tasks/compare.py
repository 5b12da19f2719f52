"""Prefect tasks of a comparison. The work is done by processes of their own, see :mod:`alkn.compare.worker`."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import task
from prefect.cache_policies import NO_CACHE

from alkn.compare.cell import project_of, state_file
from alkn.compare.config import Cell, Comparison
from alkn.compare.record import read_record
from alkn.compare.report import write_report
from alkn.compare.results import CellResult, Results, StepResult, collect, made_here
from alkn.compare.worker import EVERY_S, SAID, job_of
from alkn.files import digest_of, digest_of_value, read_json
from tasks.comparison_tracking import ComparisonTracker
from tasks.tracking import TrackingUnavailable

logger = logging.getLogger(__name__)
STOPPED = "stopped"
_stopping = threading.Event()
"""Set while a flow of this process is ending before its cells are."""


@contextlib.contextmanager
def stopped_with_the_flow() -> Iterator[None]:
    """Ends the processes of this process's tasks, and lets none begin, when the block is left by an exception."""
    _stopping.clear()
    try:
        yield
    except BaseException:
        # A task runner waits for its threads, and they for their processes: hours.
        _stopping.set()
        raise


@task(cache_policy=NO_CACHE)
def make_base(folder: str, config: str, seed: int) -> str:
    """A seed's splits and base model; returns why they could not be made, or nothing."""
    return _work(Path(folder), Path(config), f"base/{seed}")


@task(cache_policy=NO_CACHE)
def make_cell(folder: str, config: str, cell: Cell, ground: str) -> str:
    """What is missing of a cell; returns why it could not be made, or nothing.

    Args:
        folder: of the comparison.
        config: its settings, frozen.
        cell: which.
        ground: why the seed's base model could not be made, or nothing.
    """
    return f"no base model: {ground}" if ground else _work(Path(folder), Path(config), job_of(cell))


@task(cache_policy=NO_CACHE)
def log_cell(folder: str, comparison: Comparison, cell: Cell) -> None:
    """Log a cell that was made here to MLflow; while tracking is down, the next run does."""
    root = Path(folder)
    result = made_here(root, comparison, cell)
    if result is None:
        return
    key, settings = read_json(state_file(root, cell))["key"], comparison.cell_settings(cell)
    try:
        _tracker(root, comparison).log_cell(cell.name, key, _numbers(root, result), settings.of_step())
    except TrackingUnavailable as error:
        logger.warning("%s not logged, the next run will: %s", cell.title, error)


@task(cache_policy=NO_CACHE)
def report(folder: str, comparison: Comparison, record: str | None = None) -> Results:
    """Write the report of what there is, here and on record, with its plots, and log it to MLflow."""
    root = Path(folder)
    results = collect(root, comparison, read_record(None if record is None else Path(record)))
    files = write_report(root, comparison, results)
    key = digest_of_value({path.name: digest_of(path) for path in files})
    try:
        _tracker(root, comparison).log_report(key, files)
    except TrackingUnavailable as error:
        logger.warning("the report is not logged, the next run will: %s", error)
    return results


def _tracker(folder: Path, comparison: Comparison) -> ComparisonTracker:
    return ComparisonTracker(folder, comparison.name, comparison.ground_settings(comparison.seeds[0]).tracking)


def _numbers(folder: Path, result: CellResult) -> dict[str, Any]:
    """A cell as MLflow gets it: names and numbers, never a text."""

    def numbers(step: StepResult) -> dict[str, float]:
        out = {f"drawn/{name}": value for name, value in step.drawn.items()}
        out |= {f"never/{name}": value for name, value in step.never.items()}
        for request, level in step.requests.items():
            out |= {} if level.p is None else {f"request/{request}/p": level.p}
        own = step.requests.get(step.request)
        if own is not None and own.p is not None and own.exact_memorization is not None:
            out |= {"p": own.p, "exact_memorization": own.exact_memorization}
            out |= {"reached": float(result.reached(step)), "passes": float(step.passes)}
        return out | ({} if step.seconds is None else {"seconds": step.seconds})

    project = project_of(folder, result.cell)
    return {
        "state": result.state,
        "base": {"numbers": numbers(result.base)},
        "steps": [
            {
                "request": step.request,
                "numbers": numbers(step),
                "rounds": read_json(project.step(step.request).unlearning)["rounds"],
            }
            for step in result.steps
        ],
        "quantities": {f"chain/{n}": value for n, value in result.quantities().items() if value is not None},
    }


def _work(folder: Path, config: Path, job: str) -> str:
    """Run a worker and wait; its words go to a log file of the job."""
    if _stopping.is_set():
        return STOPPED
    log = folder / "logs" / f"{job.replace('/', '~')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "alkn.compare.worker", str(folder), str(config), job]
    with _device(folder) as environment, open(log, "ab") as words:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=words, stderr=words, env={**os.environ, **environment}
        )
        try:
            status = _wait(process)
        finally:
            process.kill()
            if process.stdin is not None:
                process.stdin.close()
    if status is None:
        return STOPPED
    if status == 0:
        return ""
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
    _, sign, words_of_ours = "".join(last).partition(SAID)
    how = words_of_ours if sign else f"signal {-status}" if status < 0 else f"status {status}"
    return f"{how} (see {log.relative_to(folder)})"


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit status, or ``None`` if it shall not be waited for any longer."""
    while not _stopping.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=EVERY_S)
    return None


@contextlib.contextmanager
def _device(folder: Path) -> Iterator[dict[str, str]]:
    """A GPU for one worker, where there are several: the first that fewest others hold."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        yield {}
        return
    places = folder / ".devices"
    places.mkdir(exist_ok=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    for place in itertools.count():
        lock = FileLock(places / f"{place}.lock", timeout=0)
        try:
            with lock:
                yield {"CUDA_VISIBLE_DEVICES": visible[place % count]}
                return
        except Timeout:
            continue
