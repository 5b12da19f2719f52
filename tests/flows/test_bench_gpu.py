"""What ``make bench-gpu`` counts: every token of every pass, under the phase that it belongs to. No times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alkn.compare.config import load_comparison
from alkn.core.scoring import score
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.models import new_model
from flows.bench_gpu import CONFIG, REST, Meter

ROOT = Path(__file__).parents[2]


def test_every_pass_is_counted_where_it_belongs(memorised: Any) -> None:
    """Two epochs of six records padded to the longest, in one batch each; then six are read."""
    meter, examples = Meter(), memorised.forget
    padded = 6 * max(e.tokens.numel() for e in examples)
    model = memorised.model()
    with meter.counting():
        score(model, examples)
        meter.tell("base", "train base", 0, 2)
        fine_tune(
            model, examples, Hyperparameters(lr=1e-9, epochs=2, batch_size=6), loss=answer_loss(),
            generator=torch.Generator().manual_seed(0),
            progress=lambda what, done, total: meter.tell("base", "train base", done, total),
        )  # fmt: skip
        score(model, examples)
    score(model, examples)
    counted = {name: (phase.trained, phase.read) for name, phase in meter.phases.items()}
    assert counted == {REST: (0, 2 * padded), "base, training": (2 * padded, 0)}
    assert all(phase.seconds > 0 for phase in meter.phases.values())


def test_the_large_model_is_large() -> None:
    """At least 300 million parameters, in an architecture that can be built."""
    base = load_comparison(ROOT / CONFIG).ground_settings(0).base
    with torch.device("meta"):
        model = new_model(base.architecture, vocab_size=base.architecture.vocab_size, eos_token_id=0, seed=0)
    assert sum(p.numel() for p in model.parameters()) >= 3e8
