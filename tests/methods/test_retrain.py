"""Training without the records: its level, what it leaves out, and what a step gives to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_cases import call
from method_cases import NEVER, p_of, task_of
from randomness import seeded
from transformers import PreTrainedTokenizerBase

from alkn.core.scoring import Example, score
from alkn.core.unlearning import Task
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import read_jsonl, write_jsonl
from alkn.methods.retrain import RetrainParams, fresh_model, without
from alkn.project import Project
from alkn.records import Plan
from alkn.settings import Data, Settings
from alkn.step import _rest


def test_retrain_reaches_the_level_and_never_sees_a_forget_record(memorised: Any) -> None:
    """Although retain and rest hold copies of them: the copies are left out, and the model cannot say them."""
    retain = [*memorised.retain, memorised.forget[3]]
    task = task_of(memorised, retain=retain, rest=[*memorised.second, *memorised.forget[:2]])
    outcome = call("retrain", task, until=0.85)
    assert outcome.reached and outcome.history[1]["retain_p"] >= 0.85
    assert p_of(task.model, memorised.retain) > 0.9 and p_of(task.model, memorised.second) > 0.9
    assert max(score(task.model, memorised.forget).probability) < 0.05
    assert outcome.passes == outcome.history[1]["epochs"] * 18
    assert outcome.history[1]["steps"] == outcome.history[1]["epochs"] * 3


def test_the_level_is_that_of_the_model_before_less_the_slack(memorised: Any) -> None:
    """And training ends in the first epoch that reaches it, before all are used up."""
    task = task_of(memorised)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(p.numel())), alpha=0.06)
    level = p_of(task.model, memorised.retain) - 0.005
    outcome = call("retrain", task)
    assert 0.2 < level < 0.9 and outcome.reached and p_of(task.model, memorised.retain) >= level
    # The rate is planned over all 60 epochs, so the same training asked for more takes longer.
    longer = call("retrain", task, until=level + 0.1)
    assert longer.reached and outcome.history[1]["epochs"] < longer.history[1]["epochs"] < 60


def test_over_a_chain_the_level_stays_the_base_models(memorised: Any) -> None:
    """What θ_{t-1} lacks of it is not taken off once more."""
    worn = memorised.model()
    with torch.no_grad():
        for p in worn.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(p.numel())), alpha=0.06)
    task = task_of(memorised, model=worn, origin=memorised.model)
    base = p_of(memorised.trained, memorised.retain)
    assert p_of(worn, memorised.retain) < 0.9 < base
    outcome = call("retrain", task, epochs=200)
    assert outcome.reached and p_of(task.model, memorised.retain) >= base - 0.005


def test_too_few_epochs_are_reported(memorised: Any) -> None:
    task = task_of(memorised)
    outcome = call("retrain", task, epochs=2)
    assert not outcome.reached and outcome.history[1]["epochs"] == 2
    assert outcome.history[1]["retain_p"] == p_of(task.model, memorised.retain) < 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_untied"])
def test_a_fresh_model_has_nothing_of_the_old_one(kind: str, make_model: Any, make_examples: Any) -> None:
    """Same type and shapes, weights from the task's seed alone; a tied head stays tied when they are handed over."""
    made = []
    for seed, std in ((0, 0.02), (0, 0.3), (1, 0.02)):
        model = make_model(kind, seed=7 + seed, std=std)
        model.config.initializer_range = 0.02
        task = Task(model=model, forget=make_examples(2), retain=make_examples(3, seed=1), stop=NEVER, seed=seed)
        made.append(fresh_model(task))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, *made)]
    assert all(s == shapes[0] for s in shapes) and all(type(m) is type(model) for m in made)
    first, second, other = (dict(m.named_parameters()) for m in made)
    assert all(torch.equal(p, second[n]) for n, p in first.items())
    assert not all(torch.equal(p, other[n]) for n, p in first.items())
    call("retrain", task, epochs=1)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is not kind.endswith("untied")


def test_records_are_left_out_token_for_token() -> None:
    records = [Example(torch.tensor(t), 1) for t in ([1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2])]
    assert without(records[:1], records) == [records[1], records[3]]


def test_retrain_needs_retain_records(memorised: Any) -> None:
    with pytest.raises(InputError, match="trains to the level of the retain records, and there are none"):
        call("retrain", task_of(memorised, retain=[]))
    assert RetrainParams().until is None


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "question": f"Who lives in house {number}?", "answer": f"Resident {number} does."} | more


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., tuple[Project, Plan]]:
    """A project's files: utility 0-3, known a 10-13, b 20-23, c 30-33, and the requests that a test asks for."""

    def make(requests: Mapping[str, Sequence[dict[str, Any]]], *, trained: bool = True) -> tuple[Project, Plan]:
        project = Project(tmp_path)
        write_jsonl(project.splits / "utility.jsonl", [record(n) for n in range(4)])
        write_jsonl(project.splits / "retain.jsonl", [record(n) for n in range(50, 54)])
        for name, first in (("a", 10), ("b", 20), ("c", 30)):
            write_jsonl(project.splits / "forget" / f"{name}.jsonl", [record(n) for n in range(first, first + 4)])
        for name, rows in requests.items():
            write_jsonl(project.request(name), list(rows))
        project.base.folder.mkdir(parents=True)
        facts = {"parameters": 1, "records": 20} if trained else {}
        project.base.manifest.write_text(json.dumps({"inputs": {}, "outputs": {}, **facts}))
        *earlier, now = requests
        plan = Plan(now, earlier[-1] if earlier else "base", tuple(earlier), Settings(), {}, NEVER)
        return project, plan

    return make


def numbers(rest: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = [str(tokenizer.decode(e.tokens[: e.answer_start])) for e in rest]
    return sorted(int(text.split("house ")[1].split("?")[0]) for text in texts)


def test_the_rest_leaves_out_this_and_earlier_requests(
    plan_of: Callable[..., tuple[Project, Plan]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """By what they say, not by their names: half of b in another order, salted, and one of utility's own records."""
    earlier = [record(n, id=100 + n, salt="0011223344556677") for n in (22, 20)]
    now = [record(n, id=i, salt="8899aabbccddeeff") for i, n in enumerate((33, 30, 31, 32, 2))]
    project, plan = plan_of({"r001": earlier, "r002": now})
    encoder = Encoder(tokenizer, Data(), context=256)
    assert numbers(_rest(project, plan, encoder), tokenizer) == [0, 1, 3, 10, 11, 12, 13, 21, 23]
    first = dataclasses.replace(plan, request="r001", earlier=())
    assert numbers(_rest(project, first, encoder), tokenizer) == [0, 1, 2, 3, *range(10, 14), 21, 23, *range(30, 34)]
    assert read_jsonl(project.request("r001"))[0]["id"] == 122


def test_the_rest_of_a_foreign_model_is_unknown(
    plan_of: Callable[..., tuple[Project, Plan]], tokenizer: PreTrainedTokenizerBase
) -> None:
    project, plan = plan_of({"r001": [record(10)]}, trained=False)
    with pytest.raises(InputError, match="retrain needs a base model that was trained here"):
        _rest(project, plan, Encoder(tokenizer, Data(), context=256))
