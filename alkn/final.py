"""What is said of a model when its chain is over: attacks on it, and how it compares with honest references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from alkn import registry
from alkn.attacking import run_attacks
from alkn.core.attack import Target
from alkn.core.forget_quality import ks_test
from alkn.core.probe import RecordSet
from alkn.core.scoring import Progress, no_progress
from alkn.core.truth_ratio import TruthRatios, truth_ratios

ATTACKS: Mapping[str, Mapping[str, Any]] = {"relearning": {}, "quantization": {}}

Ratios = Mapping[str, TruthRatios]
"""Request id -> the truth ratios of its records."""


def final_report(
    model: nn.Module,
    sets_by_request: Mapping[str, RecordSet],
    references: Mapping[str, Ratios],
    *,
    utility: Mapping[str, RecordSet] | None = None,
    attacks: Mapping[str, Mapping[str, Any]] = ATTACKS,
    target: Target | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Attack a model and hold it against references. The model is unchanged afterwards.

    How to call it, for a chain of ``requests`` in a project whose base model was trained there::

        records = {name: request_records(project, name) for name in requests}
        made = [make_reference(project, settings, without=requests, seed=seed) for seed in (0, 1)]
        references = {one.digest: reference_ratios(one, records, settings) for one in made}
        sets = {name: encoder.record_set(name, rows) for name, rows in records.items()}
        report = final_report(model, sets, references, utility=utility_sets)

    Args:
        model: the chain's last model on its device, at the precision it is served in.
        sets_by_request: request id -> its encoded records, in the chain's order.
        references: digest -> truth ratios under that reference, see :func:`alkn.reference.reference_ratios`.
            The first is what the model is compared with; the others are compared with the first too, which
            shows how far apart honest models are. Empty: no forget quality, and the report says so.
        utility: set name -> encoded records that should still be known.
        attacks: registered attack -> its parameters.
        target: what they are given; ``None``: the sets above, without the records' texts.
        progress: told about the attacks' steps.

    Returns:
        Plain numbers: an entry an attack (see :meth:`alkn.core.attack.Curve.as_dict`), ``forget_quality``
        (see :func:`forget_quality`), and ``missing``: name -> why it is not there.
    """
    target = target or Target(
        model,
        {name: records.examples for name, records in sets_by_request.items()},
        {name: records.examples for name, records in (utility or {}).items()},
        progress,
    )
    given = {name: registry.attacks[name].params.model_validate(values) for name, values in attacks.items()}
    report = run_attacks(target, given)
    missing: dict[str, str] = report.pop("missing")
    if references:
        own = {name: truth_ratios(model, records) for name, records in sets_by_request.items()}
        report["forget_quality"], reasons = forget_quality(own, references)
        missing |= reasons
    else:
        missing["forget_quality"] = "there is no reference model"
    return {**report, "missing": missing}


def forget_quality(own: Ratios, references: Mapping[str, Ratios]) -> tuple[dict[str, Any], dict[str, str]]:
    """Each request's truth ratios against the first reference's, and the other references' against it as well.

    Args:
        own: under the model.
        references: digest -> under that reference, at least one.

    Returns:
        Request id -> ``p_value``, ``log10_p``, ``statistic``, ``mode``, ``records``, ``against`` (the first
        reference's digest), ``honest`` (digest of each other reference -> its own p-value), ``left_out`` (reason
        -> number of records); and ``forget_quality.<request>`` -> why it has no value.
    """
    (against, first), *others = references.items()
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, ratios in own.items():
        samples = {"the model": ratios, **{digest: each[name] for digest, each in references.items()}}
        reason = next((f"{who}: {why}" for who, sample in samples.items() if (why := _unusable(sample))), "")
        if reason:
            missing[f"forget_quality.{name}"] = reason
            continue
        test = ks_test(ratios.values, first[name].values)
        found[name] = {
            "p_value": test.p_value,
            "log10_p": test.log10_p,
            "statistic": test.statistic,
            "mode": test.mode,
            "records": len(ratios.values),
            "against": against,
            "honest": {digest: ks_test(each[name].values, first[name].values).p_value for digest, each in others},
            "left_out": dict(Counter(ratios.left_out.values())),
        }
    return found, missing


def _unusable(ratios: TruthRatios) -> str:
    """Why there is no sample to test; empty if there is one."""
    if not ratios.values:
        return "no record has both a paraphrased answer and wrong answers"
    return "" if all(map(math.isfinite, ratios.values)) else "a truth ratio is not a finite number"
