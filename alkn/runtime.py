"""Device, precision and determinism of one piece of work."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import PartialState

from alkn.core.distributed import processes
from alkn.errors import InputError
from alkn.settings import Run


def repeatable_arithmetic() -> None:
    """The same operations give the same bits, for the whole process; collapsed models cost no more than others."""
    torch.use_deterministic_algorithms(True)
    # By default new memory is filled before it is written, which costs a small model 6 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # A collapsed model computes in denormal numbers, ten times slower on a CPU.
    torch.set_flush_denormal(True)


class Runtime:
    """Where the arithmetic runs. Making one fixes threads, determinism and denormals for the process.

    Under ``accelerate launch`` or ``torchrun`` it also joins the other processes.

    Args:
        run: settings.

    Raises:
        InputError: if CUDA is asked for by name and is not there.

    Attributes:
        device: the device that models are put on.
        autocast: context of a forward pass in training; bf16 where the settings say so.
        split: whether weights are split over the processes (``accelerate launch --use_fsdp``).
    """

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        repeatable_arithmetic()
        if run.device == "cuda" and not torch.cuda.is_available():
            raise InputError("params.yaml: run.device: 'cuda' is asked for, and torch finds no CUDA device")
        cuda = torch.cuda.is_available() and run.device != "cpu"
        # Not an Accelerator: a process has one device of a launch, but steps of any precision.
        launched = PartialState(cpu=not cuda)
        torch.set_num_threads(run.threads)  # after accelerate, which sets it too
        self.split = processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        alone = torch.device("cuda" if cuda else "cpu")
        self.device: torch.device = alone if processes() == 1 else launched.device
        bf16 = run.precision == "bf16" or (run.precision == "auto" and cuda)
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            partial(torch.autocast, self.device.type, dtype=torch.bfloat16) if bf16 else nullcontext
        )
