"""Peak memory of a piece of work, counted in bytes that torch held for tensors."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once for what ``work`` allocated, kept or not.

    The count is torch.profiler's: it holds no library, no freed page and nothing of Python, and is the
    same on every machine. What was allocated before is not in it.

    Raises:
        RuntimeError: if the profile tells of no allocation.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    if not held:
        raise RuntimeError("torch.profiler reported no allocation")
    return int(max(held))


def cuda_peak_of(work: Callable[[], object]) -> int:
    """The same on the present CUDA device: bytes that were asked for, not those of the blocks they were given in."""
    gc.collect()  # what is freed while it works would hide as much of its own
    torch.cuda.reset_peak_memory_stats()
    before = int(torch.cuda.memory_stats()["requested_bytes.all.current"])
    work()
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"]) - before
