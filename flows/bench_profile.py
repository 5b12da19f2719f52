"""Where the CPU time of a piece of work goes, by named functions."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Mapping

Places = Mapping[str, tuple[str, str]]
"""Label -> (end of the file's path, function)."""

INTERLEAVED: Places = {
    "the level, once a request": ("methods/alkn.py", "_level"),
    "rehearsal: the model writes": ("core/rehearsal.py", "rehearsal_set"),
    "keeping loss, forward": ("core/rehearsal.py", "__call__"),
    "alternatives, forward": ("core/alternatives.py", "__call__"),
    "forget loss, forward": ("core/training.py", "__call__"),
    "backward, keeping and forget": ("torch/_tensor.py", "backward"),
    "gradient norm": ("utils/clip_grad.py", "clip_grad_norm_"),
    "AdamW": ("optim/adam.py", "step"),
    "measuring the forget set": ("core/unlearning.py", "measure"),
}
ROUNDS: Places = {
    "G_r, forward and backward": ("core/scoring.py", "mean_gradient"),
    "fine-tuning, all of it": ("core/training.py", "fine_tune"),
    "of that, AdamW": ("optim/adam.py", "step"),
    "of that, gradient norm": ("utils/clip_grad.py", "clip_grad_norm_"),
    "of that, m": ("core/gradient_mask.py", "accumulate_all_"),
    "mask": ("methods/alkn.py", "_localise_"),
    "search for λ, all of it": ("methods/alkn.py", "_negate"),
    "of that, setting weights": ("core/unlearning.py", "set_weights"),
}


def shares(work: Callable[[], object], places: Places) -> tuple[float, dict[str, float]]:
    """CPU seconds of ``work``, and what share of them each place took, callees included.

    The clock is this process's CPU time, so other work on the machine is not in it. Shares overlap where
    one place calls another.
    """
    profile = cProfile.Profile(time.process_time)
    profile.runcall(work)
    stats = pstats.Stats(profile)
    total: float = stats.total_tt  # type: ignore[attr-defined]
    functions: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = stats.stats  # type: ignore[attr-defined]
    out = {}
    for label, (file, function) in places.items():
        spent = [v[3] for (path, _, name), v in functions.items() if path.endswith(file) and name == function]
        out[label] = sum(spent) / total
    return total, out
