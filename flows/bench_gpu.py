"""``make bench-gpu``: a model of 310 M parameters on a GPU, trained from scratch on TOFU, and the five requests.

Tokens a second, share of the card's own matrix rate, which is measured in the same run, and peak memory, phase by
phase; then what was forgotten and what was kept. The chain is a cell of ``configs/compare_tofu_large.yaml`` and goes on
where it was.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from alkn.compare.cell import ground_of, make_ground, run_cell
from alkn.compare.config import Cell, Comparison, load_comparison
from alkn.compare.results import CellResult, read_cell
from alkn.manifest import read_manifest
from alkn.project import Project

CONFIG = Path("configs/compare_tofu_large.yaml")
FORWARD, BOTH = 2.0, 6.0
"""Floating-point operations a parameter and token: a forward pass, and forward with backward."""
PHASES = {
    "train base": "base, training", "train": "reference, training", "generate": "writing records",
    "steps": "unlearning steps", "relearning": "relearning attack",
}  # fmt: skip
"""How the progress of a piece of work begins -> the phase that its time and tokens count for."""
REST = "measuring and the rest"


def matrix_rate(size: int = 8192, repeats: int = 10) -> float:
    """Operations a second of a bf16 product of two square matrices of random numbers, the median of ``repeats``."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:])


@dataclass
class Phase:
    """What one kind of work took.

    Attributes:
        seconds: by the clock.
        trained, read: padded tokens that went forward and back, and forward only.
        peak: most bytes of tensors on the GPU.
    """

    seconds: float = 0.0
    trained: int = 0
    read: int = 0
    peak: int = 0


class Meter:
    """Counts tokens at the embeddings of the models that run, and books time and memory on the present phase.

    Models have one embedding each, as Llama's.

    Attributes:
        phases: by name, in the order in which they came.
        made: the requests, or ``base`` and ``final``, that told of themselves, in order.
    """

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.made: list[str] = []
        self._now, self._since = REST, time.perf_counter()
        self._gpu = torch.cuda.is_available()

    def tell(self, request: str, what: str, done: int, total: int) -> None:
        """Progress of a piece of work, which runs until another one tells of itself."""
        if request not in self.made:
            self.made.append(request)
        now = next((phase for name, phase in PHASES.items() if what.startswith(name)), REST)
        if now != self._now:
            self._book()
            self._now = now

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within this, every pass of a model is counted."""

        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, nn.Embedding):
                phase, tokens = self.phases.setdefault(self._now, Phase()), inputs[0].numel()
                if torch.is_grad_enabled():
                    phase.trained += tokens
                else:
                    phase.read += tokens

        handle = register_module_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()
            self._book()

    def _book(self) -> None:
        phase = self.phases.setdefault(self._now, Phase())
        if self._gpu:
            torch.cuda.synchronize()
            phase.peak = max(phase.peak, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        phase.seconds, self._since = phase.seconds + now - self._since, now


def show_phases(meter: Meter, parameters: int, rate: float) -> None:
    """A row a phase."""
    click.echo(
        "| phase | seconds | tokens forward and back | forward only | tokens a second | share of the rate | GiB |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for name, phase in meter.phases.items():
        work, tokens = parameters * (BOTH * phase.trained + FORWARD * phase.read), phase.trained + phase.read
        click.echo(
            f"| {name} | {phase.seconds:.1f} | {phase.trained:,} | {phase.read:,} | {tokens / phase.seconds:,.0f}"
            f" | {work / phase.seconds / rate:.1%} | {phase.peak / 2**30:.1f} |"
        )


def show_chain(result: CellResult) -> None:
    """A row a request, and what the attacks and the references say of the last model."""
    click.echo("| after | never drawn on | P / exact memorization of every request |\n|---|---|---|")
    for number, step in enumerate((result.base, *result.steps)):
        utility = " / ".join(f"{value:.3f}" for value in step.never.values())
        known = ", ".join(f"{level.p:.4f} / {level.exact_memorization:.3f}" for level in step.requests.values())
        click.echo(f"| {number or 'base'} | {utility} | {known} |")
    for name, value in result.quantities().items():
        if value is not None and name.startswith(("attack", "quality", "drawn", "passes", "seconds")):
            click.echo(f"{name}: {value:.4g}")


def parameters_of(ground: Project) -> int:
    """Parameters of a seed's base model."""
    manifest: Any = read_manifest(ground.base)
    return int(manifest["parameters"])


def bench_chain(folder: Path, comparison: Comparison, cell: Cell) -> None:
    """The base model and the requests of one cell, as far as an earlier run did not make them."""
    folder.mkdir(parents=True, exist_ok=True)
    Project(folder).key(create=True)
    rate = matrix_rate()
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bf16 product: {rate / 1e12:.0f} TFLOP/s")
    for work in (
        lambda tell: make_ground(folder, comparison, cell.seed, tell),
        lambda tell: run_cell(folder, comparison, cell, tell),
    ):
        meter = Meter()
        with meter.counting():
            work(meter.tell)
        if meter.made:
            click.echo(f"\n## Made in this run: {', '.join(meter.made)}\n")
            show_phases(meter, parameters_of(ground_of(folder, cell.seed)), rate)
    result = read_cell(folder, comparison, {}, cell)
    if result is not None:
        click.echo(f"\n## {result.cell.title}\n")
        show_chain(result)


def main() -> None:
    """Run it and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".bench/tofu_large"), help="of the comparison")
    parser.add_argument("--config", type=Path, default=CONFIG, help="its settings")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "a GPU is asked for, and torch finds no CUDA device\n")
    comparison = load_comparison(arguments.config)
    entry = comparison.methods[0]
    bench_chain(arguments.folder, comparison, Cell(entry.label, "", comparison.seeds_of(entry)[0]))


if __name__ == "__main__":
    main()
