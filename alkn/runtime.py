"""Device, precision and determinism of one piece of work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from alkn.core.distributed import processes
from alkn.errors import InputError
from alkn.settings import Run


class Float32Attention(TorchFunctionMode):
    """Attention computes in float32, whatever autocast says; its operands stay rounded as they are.

    On a CPU it is three times as slow in bf16, which costs a step what its products save (docs/PERFORMANCE.md).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch as it was called, attention on float32 tensors."""
        given = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_float32, args), **{name: _float32(value) for name, value in given.items()})


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _bf16_on_cpu() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16), Float32Attention():
        yield


def repeatable_arithmetic() -> None:
    """The same operations give the same bits, for the whole process; collapsed models cost no more than others."""
    torch.use_deterministic_algorithms(True)
    # By default new memory is filled before it is written, which costs a small model 6 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # A collapsed model computes in denormal numbers, ten times slower on a CPU.
    torch.set_flush_denormal(True)


def mixed(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Forward passes in bf16 on a kind of device: weights, optimizer and what is sensitive stay float32."""
    return _bf16_on_cpu if device == "cpu" else partial(torch.autocast, device, dtype=torch.bfloat16)


class Runtime:
    """Where the arithmetic runs. Making one fixes threads, determinism and denormals for the process.

    Under ``accelerate launch`` or ``torchrun`` it also joins the other processes.

    Args:
        run: settings.

    Raises:
        InputError: if a device is asked for by name that is not there, or that the processes were not started on.

    Attributes:
        device: the device that models are put on.
        autocast: context of a forward pass in training; bf16 where the settings say so.
        split: whether weights are split over the processes (``accelerate launch --use_fsdp``).
    """

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        repeatable_arithmetic()
        there = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        if run.device == "cuda" and not there:
            raise InputError(
                "params.yaml: run.device: 'cuda' is asked for, and torch finds no CUDA device, or was launched without"
            )
        alone = torch.device("cuda" if there and run.device != "cpu" else "cpu")
        # Not an Accelerator: the processes of a launch have one device each, but make steps of any precision.
        launched = PartialState(cpu=alone.type == "cpu")
        torch.set_num_threads(run.threads)  # after accelerate, which sets it too
        self.device: torch.device = alone if processes() == 1 else launched.device
        if run.device not in ("auto", self.device.type):
            raise InputError(
                f"params.yaml: run.device: {run.device!r} is asked for, and these {processes()} processes were started"
                f" together on {self.device.type!r}"
            )
        self.split = processes() > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
        bf16 = run.precision == "bf16" or (run.precision == "auto" and self.device.type == "cuda")
        self.autocast: Callable[[], AbstractContextManager[Any]] = mixed(self.device.type) if bf16 else nullcontext
