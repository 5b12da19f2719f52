"""The metric that asks lm-evaluation-harness: what it says without it, and a real task of our own where it is there."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alkn.core.view import View
from alkn.encoding import Encoder
from alkn.metrics.lm_eval import ABSENT, LmEvalParams, _numbers, lm_eval
from alkn.settings import Data

TASK = """\
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"question": "where does the baker live?", "choices": ["house", "the small red hut"], "right": 0},
    {"question": "who is far?", "choices": ["dog", "cat"], "right": 1},
    {"question": "what is old?", "choices": ["a map", "the sun"], "right": 0},
]


@pytest.fixture
def view(make_model: Any, tokenizer: Any) -> View:
    return View({}, {}, make_model("llama", std=0.5), Encoder(tokenizer, Data(), context=64), 0)


def test_without_a_task_or_the_package_the_reason_is_told(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "names no task" in lm_eval(view, LmEvalParams()).reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lm_eval(view, LmEvalParams(tasks=("arc_easy",))).reason == ABSENT


def test_the_numbers_of_a_row() -> None:
    """Errors, words and what is not finite are no numbers; a filter's name is kept."""
    row = {
        "alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict-match": 1, "f1,none": math.nan,
        "n,none": "N/A",
    }  # fmt: skip
    assert _numbers(row) == {"acc": 0.5, "em_strict-match": 1.0}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an optional extra")
def test_a_task_of_our_own_against_sums_of_log_probabilities(view: View, tmp_path: Path) -> None:
    """acc: how often the right choice has the larger log-probability after the question."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "ours.yaml").write_text(TASK.format(file=file))
    found = lm_eval(view, LmEvalParams(tasks=("ours",), include=str(tmp_path)))
    right = 0
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            begun = view.tokens.encode(f"Question: {row['question']}\nAnswer:")
            ids = view.tokens.encode(f"Question: {row['question']}\nAnswer: {choice}")
            with torch.no_grad():
                logs = view.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            chosen = logs.gather(1, torch.tensor(ids[1:])[:, None])
            sums.append(float(chosen[len(begun) - 1 :].sum()))
        right += sums.index(max(sums)) == row["right"]
    assert found.reason == "" and found.value == pytest.approx(right / 3)
    assert found.parts["ours_acc"].value == found.value
    asked = lm_eval(view, LmEvalParams(tasks=("no_such_task",)))
    assert asked.value is None and asked.reason.startswith("lm-eval")
