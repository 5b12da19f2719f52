"""The text of a project's dvc.yaml: data → base → one step for each accepted request."""

from __future__ import annotations

from typing import Any

DATA_PARAMS = ["seed", "benchmark"]
BASE_PARAMS = ["seed", "data", "base", "evaluation", "run"]
STEP_PARAMS = ["seed", "data", "base", "method", "targets", "evaluation", "attacks", "gates", "run"]


def dvc_stages(*, benchmark: bool, splits: bool, own_model: bool) -> dict[str, Any]:
    """The stages as plain values.

    Args:
        benchmark: the splits come from a benchmark (stage ``data``), not from files of the user.
        splits: there are splits at all.
        own_model: the base model is the user's folder: linked, not cached.
    """
    split_deps = ["data/splits"] if splits else []
    model_out: Any = {"steps/base/model": {"cache": False}} if own_model else "steps/base/model"
    stages: dict[str, Any] = {}
    if benchmark:
        stages["data"] = {
            "cmd": "alkn stage data",
            "params": [{"data/params.yaml": DATA_PARAMS}],
            "outs": ["data/splits"],
        }
    stages["base"] = {
        "cmd": "alkn stage base",
        **({"deps": split_deps} if splits else {}),
        "params": [{"steps/base/params.yaml": BASE_PARAMS}],
        "outs": [model_out, "steps/base/evaluation.json", "steps/base/per_record.json"],
        "metrics": ["steps/base/metrics.json"],
    }
    stages["step"] = {
        "foreach": "${accepted}",
        "do": {
            "cmd": "alkn stage step ${key}",
            "deps": [
                "data/requests/${key}.jsonl",
                *split_deps,
                "steps/${item.previous}/model",
                "steps/${item.previous}/evaluation.json",
            ],
            "params": [{"steps/${key}/params.yaml": STEP_PARAMS}],
            "outs": [
                f"steps/${{key}}/{name}"
                for name in (
                    "model",
                    "task_vector.safetensors",
                    "state.safetensors",
                    "unlearning.json",
                    "evaluation.json",
                    "per_record.json",
                    "attacks.json",
                    "gate.json",
                )
            ],
            "metrics": ["steps/${key}/metrics.json"],
        },
    }
    return {"vars": ["data/ledger.yaml"], "params": ["params.yaml"], "stages": stages, "plots": _plots()}


def _plots() -> list[dict[str, Any]]:
    """What ``dvc plots show`` draws: the tables of the report, which are derived and no output of any stage."""
    drawn = {
        "forgetting": ("step", "P of each request while it was unlearned"),
        "utility": ("requests", "P of what was never drawn on"),
        "attacks": ("spent", "P that attacks bring back"),
    }
    return [
        {
            name: {
                "x": {f"reports/plots/{name}.csv": x},
                "y": {f"reports/plots/{name}.csv": "probability"},
                "template": "scatter",
                "title": title,
            }
        }
        for name, (x, title) in drawn.items()
    ]
