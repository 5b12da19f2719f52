"""ALKN's settings: presets, what overrides them, what does not go together, who reads which key."""

from __future__ import annotations

from typing import Any

import pytest
from alkn_cases import PRESETS
from method_cases import NEVER, task_of
from pydantic import ValidationError

from alkn.methods.alkn import alkn
from alkn.methods.alkn_params import READ_BY, AlknParams
from alkn.registry import methods

SETTINGS: dict[str, dict[str, Any]] = {
    "interleaved": {
        "procedure": "interleaved", "steps": 400, "decay_steps": 120, "lr": 5e-4, "lr_floor": 0.1, "check_every": 5,
        "batch_size": 16, "retain_batch": 14, "rehearsal": 1200, "rehearsal_batch": 16, "hidden_weight": 20.0,
        "alternatives": 8, "alternative_weight": 0.6, "forget_loss": "level", "forget_weight": 0.3, "replay": 8,
        "level_reach": None, "background_shift": 2.2, "background_gap": 0.75, "background_step": 0.1, "damage": 0.9,
        "retain_exponent": 0.5, "teacher": "origin", "resist_weight": 0.0, "weight_decay": 0.0, "clip": 1.0,
    },
    "resistant": {
        "procedure": "interleaved", "steps": 360, "decay_steps": 240, "lr": 5e-4, "rehearsal": 8000,
        "rehearsal_batch": 40, "hidden_weight": 20.0, "alternatives": 8, "alternative_weight": 0.25,
        "forget_weight": 0.25, "resist_weight": 0.4, "resist_steps": 20, "resist_share": 0.1, "resist_lr": 1e-3,
        "resist_earlier": 1.0, "retain_exponent": 0.0, "retain_batch": 12, "level_reach": 1.0, "background_gap": 0.0,
        "damage": 0.4,
    },
    "rounds": {
        "procedure": "rounds", "steps": 30, "lr": 5e-4, "epochs": 2,
        "batch_size": 32, "weight_decay": 0.0, "clip": 1.0, "warmup_epochs": 0,
        "soft_labels": True, "label_form": "reference", "label_scale": 10.0, "label_midpoint": 0.8,
        "sign": "derived", "strength": 1.0, "retain_gradient": "sample", "retain_sample": 320, "share": 0.1,
        "scope": "tensor", "estimator": "sampled", "overlap": "none", "scale_max": 2.0, "bisections": 5,
        "rehearsal": 0, "repair_steps": 0,
    },
    "reference": {
        "procedure": "once", "lr": 2e-5, "epochs": 5, "batch_size": 64, "weight_decay": 0.01, "clip": 1.0,
        "warmup_epochs": 1, "soft_labels": True, "label_form": "reference", "label_scale": 1.5,
        "label_midpoint": 0.8, "criterion": "m",
        "sign": "paper", "strength": 1.0, "retain_gradient": "paired", "share": 0.8, "share_end": 0.4,
        "schedule": "fifths", "reuse_thresholds": True, "scope": "tensor", "estimator": "trimmed_linear",
        "mask_first": True, "overlap": "product_std", "overlap_factor": 0.5, "protection": "tensor",
        "protection_rate": 0.1, "scale": 1.0,
    },
    "paper": {
        "procedure": "once", "lr": 3e-5, "epochs": 5, "batch_size": 32, "weight_decay": 0.01, "clip": None,
        "soft_labels": True, "label_form": "paper", "label_scale": 10.0, "label_midpoint": 1.0, "criterion": "m",
        "sign": "paper", "strength": 0.8, "retain_gradient": "full", "share": 1.0, "share_end": 0.3,
        "schedule": "linear", "reuse_thresholds": False, "estimator": "trimmed_linear", "mask_first": False,
        "overlap": "gradient_std", "overlap_factor": 1.0, "protection": "coordinate", "protection_rate": 0.1,
        "scale": 0.8,
    },
}  # fmt: skip
SETTINGS["derived"] = {**SETTINGS["reference"], "sign": "derived", "scale": None}


@pytest.mark.parametrize("preset", SETTINGS)
def test_presets_are_those_of_method_md(preset: str) -> None:
    """The values above are written down from docs/METHOD.md, not from the code."""
    params = AlknParams(preset=preset)  # type: ignore[arg-type]
    assert {key: getattr(params, key) for key in SETTINGS[preset]} == SETTINGS[preset]


def test_interleaved_is_the_default_and_the_method_is_registered() -> None:
    assert AlknParams() == AlknParams(preset="interleaved") and AlknParams().procedure == "interleaved"
    assert methods["alkn"].params is AlknParams and methods["alkn"].call is alkn


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_beside_a_preset_override_it(preset: str) -> None:
    """Also with a value that is a default elsewhere, and nothing else changes."""
    plain = AlknParams(preset=preset).model_dump()  # type: ignore[arg-type]
    for key, value in (("lr", 1e-3), ("clip", None), ("share", 0.25), ("scale", 3.0), ("weight_decay", 0.0)):
        if plain["procedure"] not in READ_BY.get(key, (plain["procedure"],)):
            continue
        given = AlknParams.model_validate({"preset": preset, key: value}).model_dump()
        assert given == plain | {key: value}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"procedure": "once", "label_form": "paper"}, "procedure 'once' masks gradients by criterion 'm'"),
        ({"preset": "derived", "criterion": "exact"}, "procedure 'once' masks gradients by criterion 'm'"),
        (
            {"preset": "rounds", "label_form": "log_odds", "label_midpoint": 1},
            "'log_odds' takes a label_midpoint below 1",
        ),
        ({"preset": "round"}, "Input should be 'interleaved', 'resistant', 'rounds'"),
        ({"lrr": 1e-3}, "Extra inputs are not permitted"),
        ({"preset": "rounds", "share": 1.5}, "less than or equal to 1"),
        ({"preset": "paper", "scale": 0}, "greater than 0"),
        ({"clip": 0}, "greater than 0"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"lr": "fast"}, "valid number"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AlknParams.model_validate(values)


def test_a_key_that_the_procedure_does_not_read_is_an_error() -> None:
    """Key and procedure are named; what a preset fills in is nobody's mistake, nor is a value that holds anyway."""
    for procedure in ("interleaved", "rounds", "once"):
        preset = {"interleaved": "interleaved", "rounds": "rounds", "once": "paper"}[procedure]
        params = AlknParams(preset=preset)  # type: ignore[arg-type]
        defaults = params.model_dump()
        granted = {k for k in AlknParams.model_fields if procedure in READ_BY.get(k, (procedure,))}
        assert {*defaults} == granted - {*AlknParams.later}
        for key in AlknParams.model_fields:
            value = getattr(params, key)
            assert AlknParams.model_validate({"preset": preset, key: value}).model_dump() == defaults
            other = not value if isinstance(value, bool) else 0.5 if value is None or isinstance(value, float) else "x"
            with pytest.raises(ValidationError) as error:
                AlknParams.model_validate({"preset": preset, key: other if other != value else 0.25, "lr": -1})
            told = f"{key}: procedure '{procedure}' does not read it, only "
            assert (told in str(error.value)) == (procedure not in READ_BY.get(key, (procedure,))), key
    with pytest.raises(ValidationError) as error:
        AlknParams.model_validate({"share": 0.5, "scale": 1.0})
    (cause,) = (item["ctx"]["error"] for item in error.value.errors())
    assert [key for key, _ in cause.faults] == ["share", "scale"]
    assert cause.faults[0][1].endswith("only 'rounds' and 'once'")


LATER: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "masked": ({"preset": "paper"}, "gradient", "update"),
}


def test_every_key_that_came_later_is_tried() -> None:
    assert set(LATER) == set(AlknParams.later)


@pytest.mark.parametrize("key", LATER)
def test_a_key_that_came_later_is_written_where_it_is_used(key: str) -> None:
    """What was frozen before it is read back as it was."""
    beside, default, other = LATER[key]
    assert key not in AlknParams.model_validate({**beside, key: default}).model_dump()
    used = AlknParams.model_validate({**beside, key: other})
    assert used.model_dump()[key] == other and AlknParams.model_validate(used.model_dump()) == used


class Watched(AlknParams):
    """Parameters that note which of them are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in AlknParams.model_fields:
            READ.add(name)
        return super().__getattribute__(name)

    def model_dump(self, **more: Any) -> dict[str, Any]:
        READ.update(more["include"] & {*AlknParams.model_fields})
        return super().model_dump(**more)


READ: set[str] = set()
EVERYTHING: dict[str, list[dict[str, Any]]] = {
    "interleaved": [
        {"steps": 2, "rehearsal": 2, "decay_steps": 1, "check_every": 1, "forget_loss": "soft_labels"},
        {"steps": 5, "rehearsal": 2, "decay_steps": 1, "resist_weight": 0.2},
    ],
    "rounds": [
        {"steps": 2, "criterion": "m", "overlap": "product_std", "repair_steps": 1, "ternary_share": 0.5},
        {"steps": 1, "rehearsal": 2},
    ],
    "once": [{"preset": "paper"}, {"preset": "reference"}, {"preset": "paper", "retain_gradient": "sample",
                                                           "ternary_share": 0.5}],
}  # fmt: skip


@pytest.mark.parametrize("procedure", EVERYTHING)
def test_which_procedure_reads_which_key(procedure: str, memorised: Any) -> None:
    """By watching runs: no key is read that the table denies, and what it grants is read in one of them."""
    read = set()
    for values in EVERYTHING[procedure]:
        short = {"lr": 1e-4} if procedure == "interleaved" else {"lr": 1e-4, "epochs": 1}
        params = Watched.model_validate({"preset": procedure, **short, **values})
        READ.clear()
        alkn(task_of(memorised, stop=NEVER), params)
        read |= READ
    granted = {key for key in AlknParams.model_fields if procedure in READ_BY.get(key, (procedure,))}
    # Shared parts look at these two in passing, where they change nothing of the model.
    assert read - granted <= {"protection", "retain_momentum"}
    # It has filled in the others.
    assert granted - read == {"preset"}
