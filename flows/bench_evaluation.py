"""``make bench-evaluation``: what a step's whole evaluation costs, and our batches against a record at a time."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from alkn import registry
from alkn.base import project_sets
from alkn.core.generation import greedy
from alkn.core.limits import context_of
from alkn.core.probe import RecordSet
from alkn.core.scoring import Example, score
from alkn.encoding import Encoder
from alkn.evaluation import measure_model
from alkn.models import load_model
from alkn.project import Project
from alkn.record_sets import known_records
from alkn.runtime import repeatable_arithmetic
from alkn.settings import Settings
from flows.bench_profile import Places, shares

PLACES: Places = {
    "teacher forcing: P, memorization, truth ratio": ("core/scoring.py", "score"),
    "greedy answers": ("core/generation.py", "greedy"),
    "ROUGE-L": ("rouge_score/rouge_scorer.py", "score"),
    "encoding the records": ("alkn/encoding.py", "record_set"),
}


class Bench:
    """One model before the sets of one step.

    Args:
        project: folder with a benchmark's splits.
        model: a model folder.
        forget: number of the request whose step it is; those before it are earlier ones.
        settings: of the evaluation.
    """

    def __init__(self, project: Project, model: Path, *, forget: int, settings: Settings) -> None:
        self.project, self.folder, self.forget, self.settings = project, model, forget, settings
        self.encoder = Encoder.of(model, settings)
        self.model: nn.Module = load_model(model)

    @property
    def eos(self) -> int:
        """End-of-sequence id."""
        return int(self.encoder.tokenizer.eos_token_id)

    def sets(self) -> list[RecordSet]:
        """What a step measures: its request, the earlier ones, retain, utility, holdout."""
        *before, (_, asked) = list(known_records(self.project).items())[: self.forget]
        earlier = [self.encoder.record_set(f"earlier/{name}", rows) for name, rows in before]
        return [self.encoder.record_set("forget", asked), *earlier, *project_sets(self.project, self.encoder)]

    def evaluate(self) -> dict[str, Any]:
        """The whole evaluation, encoding included."""
        sets, evaluation = self.sets(), self.settings.evaluation
        return measure_model(self.model, sets, self.encoder, evaluation, eos=self.eos).numbers()


def bench_rate(bench: Bench, wanted: int) -> None:
    """Records a second of greedy answers with their P: in our batches, and one after another."""
    known = [example for one in bench.sets() for example in one.examples]
    examples = known[:: max(1, len(known) // wanted)][:wanted]
    count = len(examples)
    longest = bench.settings.evaluation.max_new_tokens
    prompts = [example.tokens[: example.answer_start] for example in examples]
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "ours: answers": lambda: greedy(bench.model, prompts, eos=bench.eos, max_new_tokens=longest),
        "ours: answers, P and memorization": lambda: _with_scores(bench, examples, prompts, longest),
        "`generate`, a record at a time": lambda: _one_by_one(bench, prompts, longest),
    }
    said, rates = {}, {}
    for name, way in ways.items():
        began = time.process_time()
        said[name] = way()
        rates[name] = count / (time.process_time() - began)
    slow = rates["`generate`, a record at a time"]
    words = sum(len(answer) for answer in said["ours: answers"])
    same = sum(a == b for a, b in zip(said["ours: answers"], said["`generate`, a record at a time"], strict=True))
    click.echo(f"\n## Records a second: {count} records, {words / count:.0f} tokens an answer, at most {longest}\n")
    click.echo("| way | records a CPU second | ÷ a record at a time (goal ≥ 3) |\n|---|---|---|")
    for name, rate in rates.items():
        click.echo(f"| {name} | {rate:.1f} | {rate / slow:.1f} |")
    click.echo(f"\nThe same answer, token for token, to {same} of {count} records.")


def _with_scores(
    bench: Bench, examples: Sequence[Example], prompts: Sequence[torch.Tensor], longest: int
) -> list[list[int]]:
    score(bench.model, examples)
    return greedy(bench.model, prompts, eos=bench.eos, max_new_tokens=longest)


@torch.no_grad()
def _one_by_one(bench: Bench, prompts: Sequence[torch.Tensor], longest: int) -> list[list[int]]:
    model: Any = bench.model
    context = context_of(bench.model)
    out = []
    for prompt in prompts:
        room = longest if context is None else min(longest, context - prompt.numel())
        ids = model.generate(
            input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=room,
            do_sample=False, num_beams=1, eos_token_id=bench.eos, pad_token_id=bench.eos,
        )[0, prompt.numel() :].tolist()  # fmt: skip
        out.append(ids[: ids.index(bench.eos)] if bench.eos in ids else ids)
    return out


def bench_whole(bench: Bench) -> None:
    """Seconds of a step's whole evaluation, and where they go."""
    began = time.monotonic()
    seconds, found = shares(bench.evaluate, PLACES)
    wall = time.monotonic() - began
    sizes = {one.name: len(one) for one in bench.sets()}
    click.echo(f"\n## A step's evaluation: {sum(sizes.values())} records ({_told(sizes)})\n")
    click.echo(f"{seconds:.1f} CPU s (goal ≤ 60 s on two cores), {wall:.1f} s by the clock, default metrics:")
    click.echo(f"{', '.join(chosen.name for chosen in bench.settings.evaluation.metrics)}.\n")
    click.echo("| part | share of CPU time |\n|---|---|")
    for label, share in found.items():
        click.echo(f"| {label} | {share:.1%} |")


def _told(sizes: dict[str, int]) -> str:
    kinds: dict[str, int] = {}
    for name, count in sizes.items():
        kind = name.split("/")[0]
        kinds[kind] = kinds.get(kind, 0) + count
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def main() -> None:
    """Measure on a project that has TOFU's splits and models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a TOFU project, such as .bench/tofu/base/seed0 after 'make bench'")
    parser.add_argument("--model", type=Path, help="model folder [default: the project's base model]")
    parser.add_argument("--forget", type=int, default=5, help="the request; those before it are earlier ones [5]")
    parser.add_argument("--records", type=int, default=64, help="records of the two ways [64]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeatable_arithmetic()
    list(registry.metrics)  # imports every metric before anything is timed
    project = Project(arguments.folder.resolve())
    bench = Bench(project, arguments.model or project.base.model, forget=arguments.forget, settings=Settings())
    weights = sum(p.numel() for p in bench.model.parameters())
    threads = f"{arguments.threads} thread(s) of {os.cpu_count()} cores"
    click.echo(f"torch {torch.__version__}, {threads}, {weights / 1e6:.1f} M parameters")
    bench_whole(bench)
    bench_rate(bench, arguments.records)


if __name__ == "__main__":
    main()
