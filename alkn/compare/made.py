"""What lets a cell's numbers count elsewhere: what was asked for, and by which code, when and where it was made."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from alkn.compare.config import Cell, Comparison
from alkn.files import digest_of_value
from alkn.manifest import code_version, environment
from alkn.settings import Settings


@dataclass(frozen=True)
class Made:
    """Where the numbers of a cell are from.

    Attributes:
        code: commit, or version where there is none.
        date: the day on which its last number was measured, ISO, in UTC.
        machine: processor, cores, memory, GPU where there is one, versions.
    """

    code: str
    date: str
    machine: str

    @classmethod
    def here(cls) -> Made:
        """By this code, today, on this machine."""
        version, versions = code_version(), environment()
        return cls(
            version.get("commit", version["version"])[:12],
            f"{datetime.now(UTC):%Y-%m-%d}",
            f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB{_gpu()}; torch {versions['torch']},"
            f" transformers {versions['transformers']}, Python {versions['python']}",
        )


def asked_of(comparison: Comparison, cell: Cell) -> str:
    """A digest of all that a cell's settings decide: the same on every machine, unlike the bits of its base model."""
    settings, part = comparison.cell_settings(cell), comparison.sweep_requests if cell.trial else None
    return digest_of_value({"step": settings.of_step(), "ground": settings_of_ground(settings), "requests": part})


def settings_of_ground(settings: Settings) -> dict[str, Any]:
    """What decides splits and base model; its evaluation and the machine's part do not."""
    every = settings.of_data() | settings.of_base()
    return {name: every[name] for name in ("seed", "benchmark", "data", "base")}


def _gpu() -> str:
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def _processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
