"""What ``make bench-gpu`` counts: every token of every pass, under the phase that it belongs to. No times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alkn.compare.config import load_comparison
from alkn.core.descent import Pace, descend
from alkn.core.generation import greedy
from alkn.core.scoring import score
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.core.unlearning import StopRule, Task
from alkn.models import new_model
from flows.bench_gpu import CONFIG, REST, Meter

ROOT = Path(__file__).parents[2]


def test_every_pass_is_counted_where_it_belongs(memorised: Any) -> None:
    """Two epochs of six records in one batch each, then one batch of answers, then six records are read."""
    meter, examples, model = Meter(), memorised.forget, memorised.model()
    padded = 6 * max(e.tokens.numel() for e in examples)
    prompts = [e.tokens[:3] for e in examples]

    def tell(what: str, done: int, total: int) -> None:
        meter.tell("base", what, done, total)

    with meter.counting():
        score(model, examples)
        fine_tune(
            model, examples, Hyperparameters(lr=1e-9, epochs=2, batch_size=6), loss=answer_loss(),
            generator=torch.Generator().manual_seed(0), progress=tell, label="train base",
        )  # fmt: skip
        greedy(model, prompts, eos=-1, max_new_tokens=4, progress=tell)
        tell("evaluate", 0, 1)
        score(model, examples)
    score(model, examples)
    counted = {name: (phase.trained, phase.read) for name, phase in meter.phases.items()}
    # An answer's first token needs the whole prompt, each of the others the one before.
    assert counted == {
        REST: (0, 2 * padded),
        "base, training": (2 * padded, 0),
        "writing records": (0, 6 * (3 + 3)),
    }
    assert all(phase.seconds > 0 for phase in meter.phases.values()) and meter.made == ["base"]


def test_steps_beyond_their_schedule_are_steps(memorised: Any) -> None:
    """Six of which two are planned; the first measurement is before them, and belongs to the rest."""
    meter = Meter()
    task = Task(
        memorised.model(), memorised.forget, memorised.retain, StopRule(0.0, 0.0), seed=0,
        progress=lambda what, done, total: meter.tell("r001", what, done, total),
    )  # fmt: skip
    pace = Pace(
        lr=1e-9, steps=6, decay_steps=2, lr_floor=1.0, check_every=3, batch_size=6, retain_batch=0, weight_decay=0.0,
        clip=None,
    )  # fmt: skip
    with meter.counting():
        descend(task, pace, forget=answer_loss(), keep=None)
    padded = 6 * max(e.tokens.numel() for e in memorised.forget)
    assert meter.phases["unlearning steps"].trained == 6 * padded
    assert meter.phases[REST].trained == 0 and meter.phases[REST].read == padded


def test_the_large_model_is_large() -> None:
    """At least 300 million parameters, in an architecture that can be built."""
    base = load_comparison(ROOT / CONFIG).ground_settings(0).base
    with torch.device("meta"):
        model = new_model(base.architecture, vocab_size=base.architecture.vocab_size, eos_token_id=0, seed=0)
    assert sum(p.numel() for p in model.parameters()) >= 3e8
