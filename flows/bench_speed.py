"""``make bench-speed``: speed, memory and cost, each figure a ratio of two things measured in the same run.

Times are CPU seconds of this process, so that other work on the machine distorts them little; on a GPU they are by
the clock, with the GPU's work done. Both sides of a ratio are measured in turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from alkn.core.scoring import Example, mean_gradient, score
from alkn.core.task_vector import TaskVector
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.core.unlearning import Outcome, StopRule, Task
from alkn.methods.alkn import alkn
from alkn.methods.alkn_params import AlknParams, empty_m, label_weights, move_m, stored_gradient
from alkn.models import Architecture, new_model
from alkn.runtime import mixed, repeatable_arithmetic
from flows.bench_memory import cuda_peak_of, peak_of
from flows.bench_profile import INTERLEAVED, ROUNDS, shares
from flows.bench_reference import padded_job

ARCHITECTURES = {
    "small": Architecture(vocab_size=2048),
    "large": Architecture(hidden_size=512, intermediate_size=1408, layers=8, heads=8, vocab_size=4096),
    "huge": Architecture(hidden_size=2048, intermediate_size=5632, layers=6, heads=16, vocab_size=2048),
    "tiny": Architecture(hidden_size=64, intermediate_size=160, layers=2, vocab_size=300, context=64),
}
"""METHOD.md's 1 M parameters; 28 M for time and memory a step, 310 M on a GPU; one that learns in seconds."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PROMPT_TOKENS = (15.0, 20.0, 24.0, 28.0, 33.0, 43.0, 89.0)
ANSWER_TOKENS = (11.0, 22.0, 41.0, 54.0, 69.0, 90.0, 137.0)
"""Lengths of TOFU's 400 forget records under a byte-level BPE of 2,048 entries, at the quantiles above."""
PARTS = ("step", "loop", "memory", "request", "profile")
NEVER = StopRule(p=0.0, exact_memorization=0.0)
TERNARY = {"ternary_share": 0.3, "gradient_dtype": "bf16"}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain AdamW": None,
    "exact, fp32": {"criterion": "exact"},
    "exact, bf16": {"criterion": "exact", "gradient_dtype": "bf16"},
    "exact, ternary": {"criterion": "exact", **TERNARY},
    "m, fp32": {"criterion": "m"},
    "m, bf16": {"criterion": "m", "gradient_dtype": "bf16"},
    "m, ternary G_r": {"criterion": "m", **TERNARY},
}
MEMORY_LIMITS = {"m, bf16": 4 + 4, "exact, bf16": 4 + 2, "exact, ternary": 4 + 0.5, "m, ternary G_r": 4 + 2.5}
"""Bytes a parameter over plain AdamW: a copy of the weights, and what the variant keeps."""
PASSES = {
    "interleaved (default)": {"lr": 2e-3, "retain_batch": 4, "rehearsal": 24, "rehearsal_batch": 8, "batch_size": 4},
    "rounds": {"preset": "rounds", "lr": 5e-3},
    "rounds, G_r averaged": {
        "preset": "rounds", "lr": 5e-3, "epochs": 1, "batch_size": 8, "retain_sample": 12, "retain_momentum": 0.75,
    },
    "derived": {"preset": "derived", "lr": 1e-3},
    "reference": {"preset": "reference", "lr": 1e-3},
    "paper": {"preset": "paper", "lr": 1e-3},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Device:
    """Where steps are timed, and how.

    Attributes:
        name: ``cpu`` or ``cuda``.
        kind: which of :data:`ARCHITECTURES` is large enough there.
        unit: of the times.
        clock: seconds so far, all work asked for done.
        autocast: of the forward passes: bf16 on a GPU.
    """

    name: str
    kind: str
    unit: str
    clock: Callable[[], float]
    autocast: Callable[[], AbstractContextManager[Any]]


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CPU = Device("cpu", "large", "CPU s", time.process_time, nullcontext)
CUDA = Device("cuda", "huge", "s", _cuda_clock, mixed("cuda"))


def records(count: int, vocab: int, *, seed: int, short: bool = False) -> list[Example]:
    """Records of random tokens with the lengths of TOFU's; ``short``: a quarter of them."""
    generator = torch.Generator().manual_seed(seed)

    def length(table: Sequence[float]) -> int:
        at = float(torch.rand(1, generator=generator))
        k = max(i for i, q in enumerate(QUANTILES[:-1]) if q <= at)
        part = (at - QUANTILES[k]) / (QUANTILES[k + 1] - QUANTILES[k])
        tokens = table[k] + part * (table[k + 1] - table[k])
        return max(2, round(tokens / 4 if short else tokens))

    out = []
    for _ in range(count):
        start, answer = length(PROMPT_TOKENS), length(ANSWER_TOKENS)
        tokens = torch.randint(1, vocab, (start + answer,), generator=generator)
        tokens[-1] = 0
        out.append(Example(tokens, start))
    return out


def model_of(kind: str) -> nn.Module:
    """A fresh model of one of :data:`ARCHITECTURES`."""
    return new_model(ARCHITECTURES[kind], vocab_size=ARCHITECTURES[kind].vocab_size, eos_token_id=0, seed=0)


def task_of(kind: str, *, forget: int, retain: int, device: Device = CPU) -> Task:
    """A request on a fresh model; the stop rule is never met."""
    vocab = ARCHITECTURES[kind].vocab_size
    return Task(
        model=model_of(kind).to(device.name), forget=records(forget, vocab, seed=1),
        retain=records(retain, vocab, seed=2), stop=NEVER, seed=0, eos=0, autocast=device.autocast,
    )  # fmt: skip


def step_seconds(
    task: Task, given: Mapping[str, Any] | None, batch: int, steps: int, device: Device = CPU
) -> list[float]:
    """Seconds of each optimizer step after the first, which also makes AdamW's moments."""
    p = AlknParams.model_validate({"preset": "rounds", "batch_size": batch, "epochs": steps + 1, **(given or {})})
    hook: Callable[..., None] | None = None
    weights = None
    if given is not None:
        weights = label_weights(score(task.model, task.forget), p)
        gradient = mean_gradient(task.model, task.retain, range(len(task.retain)))
        g_r = stored_gradient(gradient, p, generator=task.generator("ternary"))
        if p.criterion == "m":
            m = empty_m(task, p)

            def hook(_: int, __: object) -> None:
                move_m(task, p, m, g_r, None)

    times: list[float] = []
    fine_tune(
        task.model, task.forget, p.hyperparameters(), loss=answer_loss(weights), generator=task.generator("order"),
        before_step=hook, after_step=lambda _: times.append(device.clock()), autocast=task.autocast,
    )  # fmt: skip
    return [b - a for a, b in zip(times, times[1:], strict=False)]


def bench_step(batch: int, steps: int, repeats: int, device: Device) -> None:
    """A step of ``rounds`` against a plain AdamW step on the same batch."""
    task = task_of(device.kind, forget=batch, retain=batch, device=device)
    count = sum(w.numel() for w in task.weights().values())
    click.echo(f"\n## One optimizer step ÷ plain AdamW step, {count / 1e6:.1f} M parameters, batch {batch}\n")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(repeats):
        order = list(VARIANTS) if turn % 2 == 0 else list(VARIANTS)[::-1]
        for name in order:
            seconds[name] += step_seconds(task, VARIANTS[name], batch, steps, device)
    plain = statistics.median(seconds["plain AdamW"])
    click.echo("| step | ÷ plain | goal |\n|---|---|---|")
    for name, values in seconds.items():
        goal = "≤ 1.15" if name != "plain AdamW" else f"({plain:.3g} {device.unit}, {len(values)} steps)"
        click.echo(f"| {name} | {statistics.median(values) / plain:.3f} | {goal} |")


def our_job(task: Task, hp: Hyperparameters, k: float) -> None:
    """Preparation and training as ``rounds`` does them: labelled positions, batches of similar length."""
    p = AlknParams.model_validate({"preset": "rounds", "criterion": "m", "label_scale": k})
    weights = label_weights(score(task.model, task.forget), p)
    every = range(len(task.retain))
    gradient = mean_gradient(task.model, task.retain, every, max_records=hp.batch_size, autocast=task.autocast)
    g_r = stored_gradient(gradient, p, generator=task.generator("ternary"))
    m = empty_m(task, p)
    fine_tune(
        task.model, task.forget, hp, loss=answer_loss(weights), generator=task.generator("order"),
        before_step=lambda _, __: move_m(task, p, m, g_r, None), autocast=task.autocast,
    )  # fmt: skip


def bench_loop(repeats: int, epochs: int) -> None:
    """Our loop against the padded, full-logits, dense-label one of :mod:`flows.bench_reference`."""
    hp = Hyperparameters(lr=5e-4, epochs=epochs, batch_size=32, clip=1.0)
    start = task_of("small", forget=80, retain=80)
    longest = max(e.tokens.numel() for e in (*start.forget, *start.retain))
    jobs: dict[str, Callable[[Task], None]] = {
        "ours": lambda t: our_job(t, hp, 10.0),
        "ours, run.precision bf16": lambda t: our_job(dataclasses.replace(t, autocast=mixed("cpu")), hp, 10.0),
        f"padded to the longest record ({longest})": lambda t: padded_job(t, hp, k=10.0, length=longest),
        "padded to 500, as the authors' loader": lambda t: padded_job(t, hp, k=10.0, length=500),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    weights: dict[str, torch.Tensor] = {}
    begun = parameters_to_vector(start.weights().values()).detach()
    for _ in range(repeats):
        for name, job in jobs.items():
            task = copy.deepcopy(start)
            began = time.process_time()
            job(task)
            seconds[name].append(time.process_time() - began)
            weights[name] = parameters_to_vector(task.weights().values()).detach()
    steps = epochs * 3
    click.echo(f"\n## A job of {steps} steps with its preparation, 1.0 M parameters, batch 32, 80 + 80 records\n")
    click.echo(
        "| loop | CPU s a step | ÷ ours (goal ≥ 12) | ÷ ours in bf16 | peak memory, MB | ÷ ours | weights away from "
        "ours ÷ what ours moved |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    ours, half = (statistics.median(values) for values in list(seconds.values())[:2])
    peaks = {name: peak_of(partial(job, copy.deepcopy(start))) for name, job in jobs.items()}
    for name, values in seconds.items():
        middle = statistics.median(values)
        away = float((weights[name] - weights["ours"]).norm() / (weights["ours"] - begun).norm())
        took = f"{middle / steps:.2f} | {middle / ours:.1f} | {middle / half:.1f}"
        held = f"{peaks[name] / 1e6:.0f} | {peaks[name] / peaks['ours']:.1f}"
        click.echo(f"| {name} | {took} | {held} | {away:.1e} |")


def two_rounds(given: Mapping[str, Any] | None, batch: int, device: Device = CPU) -> object:
    """Two rounds of two epochs of ``alkn`` on a new model; ``None``: as many steps of plain AdamW."""
    task = task_of(device.kind, forget=2 * batch, retain=2 * batch, device=device)
    if given is None:
        hp = Hyperparameters(lr=5e-4, epochs=2, batch_size=batch, clip=1.0)
        order = task.generator("order")
        return fine_tune(task.model, task.forget, hp, loss=answer_loss(), generator=order, autocast=task.autocast)
    shape = {"preset": "rounds", "steps": 2, "epochs": 2, "batch_size": batch, "bisections": 1}
    return alkn(task, AlknParams.model_validate({**shape, **given}))


def bench_memory(batch: int, device: Device) -> None:
    """Peak of whole rounds, everything of the method in it, against plain AdamW."""
    count = sum(p.numel() for p in model_of(device.kind).parameters())
    measured = cuda_peak_of if device is CUDA else peak_of
    peaks = {name: measured(partial(two_rounds, given, batch, device)) for name, given in VARIANTS.items()}
    plain = peaks["plain AdamW"]
    click.echo(f"\n## Peak memory of two rounds over plain AdamW, {count / 1e6:.1f} M parameters, batch {batch}\n")
    click.echo("| variant | ÷ plain | bytes a parameter over plain | limit |\n|---|---|---|---|")
    for name, peak in peaks.items():
        limit = MEMORY_LIMITS.get(name, "")
        click.echo(f"| {name} | {peak / plain:.3f} | {(peak - plain) / count:+.2f} | {limit} |")


def knowing_task() -> Task:
    """A tiny model that knows its 16 forget and 48 retain records by heart."""
    vocab = ARCHITECTURES["tiny"].vocab_size
    model, known = model_of("tiny"), records(64, vocab, seed=3, short=True)
    hp = Hyperparameters(lr=3e-3, epochs=80, batch_size=16, betas=(0.9, 0.95), clip=1.0)
    fine_tune(model, known, hp, loss=answer_loss(), generator=torch.Generator().manual_seed(0))
    stop = StopRule(p=0.01, exact_memorization=0.13)
    return Task(model=model, forget=known[:16], retain=known[16:], stop=stop, seed=0, eos=0)


def bench_request() -> None:
    """Record passes and bytes on disk of a whole request, preset by preset."""
    start = knowing_task()
    plain = 5 * len(start.forget)
    before = {name: w.clone() for name, w in start.weights().items()}
    dense = sum(w.numel() * w.element_size() for w in before.values())
    click.echo("\n## A whole request: 16 of the 64 records that a model of 0.1 M parameters knows\n")
    click.echo("| preset | reached | passes ÷ plain 5 epochs | P, retain | task vector ÷ model, bytes |")
    click.echo("|---|---|---|---|---|")
    for name, given in PASSES.items():
        task = copy.deepcopy(start)
        outcome: Outcome = alkn(task, AlknParams.model_validate(given))
        kept = float(score(task.model, task.retain).probability.mean())
        size = _saved_bytes(TaskVector.between(task.weights(), before)) / dense
        click.echo(f"| {name} | {outcome.reached} | {outcome.passes / plain:.1f} | {kept:.3f} | {size:.2f} |")


def bench_profile() -> None:
    """Where the time of 20 interleaved steps and of two rounds goes, METHOD.md's model and sizes."""
    runs = {
        "20 steps of `interleaved`": ({"steps": 20, "decay_steps": 20, "rehearsal": 80}, INTERLEAVED),
        "2 rounds of `rounds`, criterion m": ({"preset": "rounds", "steps": 2, "criterion": "m"}, ROUNDS),
    }
    for name, (given, places) in runs.items():
        task = task_of("small", forget=80, retain=309)
        seconds, found = shares(partial(alkn, task, AlknParams.model_validate(given)), places)
        click.echo(f"\n## Where the time of {name} goes ({seconds:.1f} CPU s)\n\n| part | share |\n|---|---|")
        for label, share in found.items():
            click.echo(f"| {label} | {share:.1%} |")


def _saved_bytes(vector: TaskVector) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.safetensors"
        vector.save(path)
        return path.stat().st_size


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of parts step and memory [cpu]")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn of part step [2]")
    parser.add_argument("--batch", type=int, default=8, help="records a step of the model of step and memory [8]")
    parser.add_argument("--epochs", type=int, default=3, help="epochs, three steps each, of the two loops [3]")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each timed thing [2]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeatable_arithmetic()
    device = CUDA if arguments.device == "cuda" else CPU
    parts: dict[str, Callable[[], None]] = {
        "step": lambda: bench_step(arguments.batch, arguments.steps, arguments.repeats, device),
        "loop": lambda: bench_loop(arguments.repeats, arguments.epochs),
        "memory": lambda: bench_memory(arguments.batch, device),
        "request": bench_request,
        "profile": bench_profile,
    }
    click.echo(f"torch {torch.__version__}, {arguments.threads} thread(s) of {os.cpu_count()} cores")
    for name in arguments.part or parts:
        parts[name]()


if __name__ == "__main__":
    main()
