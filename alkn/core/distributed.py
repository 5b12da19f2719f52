"""More than one process: shares of the work, sums over processes, weights that are split over them.

Every process is given the same batches and computes the same losses; what is shared is the model's pass
over the rows of a batch. The logits at its labelled positions are gathered, so a loss sees the whole batch
whatever it divides by, and each process gets the gradient of its own rows back, times the number of
processes. The mean of the parameters' gradients over processes is then the gradient that one process would
have. With whole copies of the model that mean is taken here (DDP); FSDP2 takes it by itself.

Without a process group everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alkn.errors import InputError

BUCKET = 1 << 24
"""Entries of gradients that are summed at once: bounds the copy that it takes."""

_whole_batches: ContextVar[bool] = ContextVar("whole_batches", default=False)
T = TypeVar("T")


def processes(group: dist.ProcessGroup | None = None) -> int:
    """How many processes work together, in a group or at all; 1 if there are no others."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and talks to the user: one does."""
    return rank() == 0


def wait() -> None:
    """Go on when all processes are here."""
    if processes() > 1:
        dist.barrier()


@contextmanager
def whole_batches() -> Iterator[None]:
    """Within this, each process passes all rows of its batches: for batches that the others do not have."""
    token = _whole_batches.set(True)
    try:
        yield
    finally:
        _whole_batches.reset(token)


def shares_rows() -> bool:
    """Whether the rows of a batch are shared among processes here."""
    return processes() > 1 and not _whole_batches.get()


def shares(count: int) -> list[range]:
    """Rows 0 to ``count`` − 1 in as many runs of nearly the same length as there are processes; some may be empty."""
    number = processes()
    edges = [count * i // number for i in range(number + 1)]
    return [range(begin, end) for begin, end in zip(edges, edges[1:], strict=False)]


def dealt(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """This process's share of work, in turn with the others.

    All get as many, because a model whose weights are split must be run by all at once; where items do
    not last, the last one comes again and is not counted.

    Yields:
        An item, and whether it counts.
    """
    for first in range(0, len(items), processes()):
        place = first + rank()
        yield items[min(place, len(items) - 1)], place < len(items)


def sum_(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over all processes of a group, in place; every process gets the same bits."""
    if processes(group) > 1:
        there = _meeting(tensor)
        dist.all_reduce(there, group=group)
        if there is not tensor:
            tensor.copy_(there)
    return tensor


def everywhere(fact: bool) -> bool:
    """Whether it holds in all processes."""
    return int(sum_(torch.tensor(int(fact)))) == processes()


def joined(part: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The parts of all processes of a group one after another along their first dimension, in every process.

    Args:
        part: ``[n, ...]``, n different in each process, the rest the same.
        group: who has parts; ``None``: all processes.
    """
    if processes(group) == 1:
        return part
    sizes = torch.zeros(processes(group), dtype=torch.long)
    sizes[dist.get_rank(group)] = part.shape[0]
    return _joined(part, sum_(sizes, group).tolist(), group)


def joined_rows(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """:func:`joined` with a gradient: each process gets that of its own part, times the number of processes.

    Args:
        part: ``[sizes[rank], ...]``.
        sizes: rows of every process.
    """
    whole: Tensor = _Join.apply(part, tuple(sizes))  # type: ignore[no-untyped-call]
    return whole


def average_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over processes of every gradient, in place, where each process has a copy of the model."""
    if processes() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None and not isinstance(p.grad, DTensor):
            kinds.setdefault((p.grad.dtype, p.grad.device), []).append(p.grad)
    for gradients in kinds.values():
        for bucket in _buckets(gradients):
            flat = sum_(torch.cat([g.reshape(-1) for g in bucket])).div_(processes())
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(mean.view_as(g))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is split over processes, in the same memory; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_split(model: nn.Module) -> bool:
    """Whether a model's weights are split over processes (FSDP2)."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def part_of(whole: Tensor) -> Tensor:
    """This process's part of a tensor, cut along the first dimension as FSDP2 cuts weights."""
    size = -(-whole.shape[0] // processes())
    return whole[rank() * size : (rank() + 1) * size]


def refuse_split(model: nn.Module, what: str) -> None:
    """Refuse what needs whole weights in every process.

    Raises:
        InputError: if the model's weights are split.
    """
    if is_split(model):
        raise InputError(f"{what} does not work with weights that are split over processes: start it without FSDP")


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.own = (sum(sizes[: rank()]), sizes[rank()])
        return _joined(part, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(0, *ctx.own) * processes(), None


def _joined(part: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    there = _meeting(part.detach().to(torch.uint8) if part.dtype is torch.bool else part.detach())
    padded = there.new_zeros((max(sizes), *there.shape[1:]))
    padded[: there.shape[0]] = there
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    whole = torch.cat([one[:size] for one, size in zip(gathered, sizes, strict=True)])
    return whole.to(part.device, part.dtype)


def _meeting(tensor: Tensor) -> Tensor:
    """The tensor where the group can work on it: NCCL knows no CPU tensors."""
    return tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor.contiguous()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
