"""What the tests of ALKN share: its presets in small."""

from __future__ import annotations

from typing import Any

from alkn.methods.alkn_params import AlknParams

PRESETS = ("interleaved", "resistant", "rounds", "derived", "reference", "paper")


def rounds_of(**more: Any) -> AlknParams:
    """``rounds`` with a rate for a model of 30,000 parameters and a sample of 9 of its 12 retain records."""
    return AlknParams.model_validate({"preset": "rounds", "lr": 5e-3, "retain_sample": 9} | more)


def interleaved_of(**more: Any) -> AlknParams:
    """``interleaved`` in small: twelve written records, a rate for so small a model, half the steps.

    Alternatives and hidden states are left out: a test that is about them, or about the whole, says so.
    """
    small = {"lr": 2e-3, "rehearsal": 12, "rehearsal_batch": 6, "retain_batch": 6, "decay_steps": 60, "steps": 200}
    return AlknParams.model_validate({"preset": "interleaved", "alternatives": 0, "hidden_weight": 0.0} | small | more)
