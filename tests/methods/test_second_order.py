"""SOUL: one step by hand, and how often the curvature is estimated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from baseline_cases import call, gradients, mean_nll
from method_cases import NEVER, changes, p_of, task_of

from alkn.core.scoring import Example


@pytest.mark.parametrize("retain", [True, False])
def test_one_second_order_step_by_hand(retain: bool, memorised: Any, full_forward: Any) -> None:
    """m = 0.1 · g, h = 0.05 · ĥ, both from records drawn again here; θ moves by lr · clip(m / (γh), 1)."""
    lr, gamma, weight = 1e-3, 1e4, 2.0
    task, model = task_of(memorised, stop=NEVER), memorised.model()
    params = {"lr": lr, "gamma": gamma, "clip": None, "steps": 1, "batch_size": 6, "retain_weight": weight}
    call("second_order", task, **params, retain_batch=5 if retain else 0)

    def curvature(name: str, records: Sequence[Example], count: int) -> dict[str, np.ndarray]:
        generator = task.generator("curvature", 0, name)
        picks = torch.randint(len(records), (count,), generator=generator).tolist()
        logits = torch.cat([full_forward(model, records[i])[1] for i in picks])
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        picked = -torch.log_softmax(logits, -1)[torch.arange(len(drawn)), drawn]
        return {n: len(drawn) * g**2 for n, g in gradients(model, picked.mean()).items()}

    g = {n: -t for n, t in gradients(model, mean_nll(model, memorised.forget, full_forward)).items()}
    h = curvature("forget", memorised.forget, 6)
    if retain:
        picks = torch.randint(12, (5,), generator=task.generator("keep", 0)).tolist()
        kept = gradients(model, mean_nll(model, [memorised.retain[i] for i in picks], full_forward))
        more = curvature("retain", memorised.retain, 5)
        g = {n: t + weight * kept[n] for n, t in g.items()}
        h = {n: t + weight * more[n] for n, t in h.items()}
    wrong, inside = 0, 0
    for name, change in changes(task, memorised).items():
        ratio = 0.1 * g[name] / np.maximum(gamma * 0.05 * h[name], 1e-12)
        expected = -lr * np.clip(ratio, -1, 1)
        wrong += int((np.abs(change.numpy() - expected) > 0.02 * lr).sum())
        inside += int((np.abs(ratio) < 1).sum())
    # Tiny curvatures depend on the last bit of a sum.
    assert wrong < 0.005 * 30_240 and 0.1 * 30_240 < inside < 0.9 * 30_240


def test_curvature_is_estimated_every_so_many_steps(memorised: Any) -> None:
    """25 steps, every 10: at 0, 10 and 20."""
    task = task_of(memorised, stop=NEVER)
    outcome = call("second_order", task, steps=25, batch_size=4, retain_batch=2, check_every=25)
    assert outcome.passes == 25 * 6 + 3 * 6


def test_hutchinson_serves_as_well(memorised: Any) -> None:
    """Other curvatures, so other weights than those of the default, to the same end."""
    task = task_of(memorised)
    assert call("second_order", task, estimator="hutchinson").reached
    assert p_of(task.model, memorised.retain) > 0.9
