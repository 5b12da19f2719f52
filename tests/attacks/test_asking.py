"""Attacks that ask in another way, against the same prompts put together by hand and scored one by one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

from alkn import registry
from alkn.attacking import run_attacks, target_of
from alkn.attacks.hint import HintParams, hinted
from alkn.attacks.sampling import contains
from alkn.core.asked import Asked
from alkn.core.attack import Target
from alkn.core.generation import greedy
from alkn.core.sampled import sample
from alkn.core.scoring import Example
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import read_jsonl
from alkn.models import context_length, load_model, load_tokenizer
from alkn.project import Project
from alkn.settings import Data, validate_settings

FRAMES = ("Say it: {question}", "{question} Now?")
BUDGETS: dict[str, dict[str, Any]] = {
    "relearning": {"steps": [0, 1], "share": 0.25},
    "relearning_benign": {"steps": [0, 1], "batch_size": 4},
    "quantization": {"bits": [4]},
    "paraphrase": {"wordings": FRAMES},
    "jailbreak": {"wrappers": FRAMES},
    "prefix": {"tokens": [0, 2]},
    "in_context": {"examples": [0, 2]},
    "hint": {"initials": [0, 2]},
    "sampling": {"samples": [1, 3], "max_new_tokens": 48},
}


@dataclass(frozen=True)
class Known:
    """A small model that knows two requests, their records as text, and what it is attacked with."""

    model: nn.Module
    encoder: Encoder
    records: dict[str, list[dict[str, Any]]]
    target: Target
    report: dict[str, Any]

    def p_and_hits(self, prompt: str, answer: str) -> tuple[float, float]:
        """Of one prompt as text, by the plain forward."""
        head, rest = self.encoder.encode(prompt), [*self.encoder.encode(answer), self.target.eos]
        ids = torch.tensor([head + rest])
        with torch.no_grad():
            logits = self.model(input_ids=ids).logits[0, len(head) - 1 : -1]
        nll = nn.functional.cross_entropy(logits, ids[0, len(head) :])
        return float(torch.exp(-nll)), float((logits.argmax(-1) == ids[0, len(head) :]).double().mean())


def asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


@pytest.fixture(scope="module")
def known(tiny_ground: Project, tiny_values: dict[str, Any]) -> Known:
    project, settings = tiny_ground, validate_settings(tiny_values, tiny_ground.params)
    model = load_model(project.base.model)
    encoder = Encoder(load_tokenizer(project.base.model), Data(), context=context_length(project.base.model))
    records = {name: read_jsonl(project.request(name)) for name in ("r001", "r002")}
    records["r001"][0]["paraphrased_question"] = "What is it?"
    records["r001"][1]["paraphrased_answer"] = "It is another thing."
    target = target_of(project, model, encoder, records, settings, name="r002")
    before = copy.deepcopy(model.state_dict())
    report = run_attacks(
        target, {name: registry.attacks[name].params.model_validate(given) for name, given in BUDGETS.items()}
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "the model was changed"
    assert report["missing"] == {}
    return Known(model, encoder, records, target, report)


def test_every_attack_is_in_these_tests() -> None:
    assert sorted([*BUDGETS, "export"]) == list(registry.attacks)


def test_reports_hold_numbers_and_no_text(known: Known) -> None:
    written = json.dumps(known.report, allow_nan=False)
    for record in (record for records in known.records.values() for record in records):
        assert all(record[name] not in written for name in ("question", "answer"))
    for name, curve in known.report.items():
        if name != "missing":
            assert set(curve["about"]) <= set(curve["points"][0]) and len(curve["points"]) >= 2
            for point in curve["points"]:
                if name not in ("relearning", "prefix"):
                    of = {request: len(known.records[request]) for request in point["requests"]}
                    total = sum(of[request] * row["probability"] for request, row in point["requests"].items())
                    assert point["probability"] == pytest.approx(total / sum(of.values()))


def test_the_same_again(known: Known) -> None:
    given = {name: registry.attacks[name].params.model_validate(BUDGETS[name]) for name in ("sampling", "jailbreak")}
    again = run_attacks(known.target, given)
    assert all(again[name] == known.report[name] for name in given)


def test_jailbreak_is_the_worst_so_far(known: Known) -> None:
    rows = []
    for record in (record for records in known.records.values() for record in records):
        frames = [record["question"], *(frame.replace("{question}", record["question"]) for frame in FRAMES)]
        rows.append([known.p_and_hits(asked(q), " " + record["answer"]) for q in frames])
    for point in known.report["jailbreak"]["points"]:
        for metric, place in (("probability", 0), ("exact_memorization", 1)):
            worst = [max(one[place] for one in row[: point["at"] + 1]) for row in rows]
            assert point[metric] == pytest.approx(sum(worst) / len(worst), rel=1e-4)
    assert known.report["jailbreak"]["points"][0]["probability"] > 0.5, "the model knows its records"


def test_paraphrase_takes_what_records_have_and_then_the_frames(known: Known) -> None:
    total = dict.fromkeys(range(5), 0.0)
    for record in (record for records in known.records.values() for record in records):
        question, answer = record["question"], record["answer"]
        asked_for = [(question, answer)]
        if "paraphrased_question" in record:
            asked_for.append((record["paraphrased_question"], answer))
        if "paraphrased_answer" in record:
            asked_for.append((question, record["paraphrased_answer"]))
        asked_for += [(frame.replace("{question}", question), answer) for frame in FRAMES]
        found = [known.p_and_hits(asked(q), " " + a)[0] for q, a in asked_for]
        for at in total:
            total[at] += max(found[: at + 1])
    count = sum(map(len, known.records.values()))
    curve = known.report["paraphrase"]
    own = sum("paraphrased_question" in r or "paraphrased_answer" in r for rows in known.records.values() for r in rows)
    assert [point["at"] for point in curve["points"]] == list(total)
    assert curve["budget"]["with_own"] == own >= 2 and curve["budget"]["frames"] == 2
    for point in curve["points"]:
        assert point["probability"] == pytest.approx(total[point["at"]] / count, rel=1e-4)


def test_in_context_shows_the_others_and_never_itself(known: Known) -> None:
    every = known.records
    found = []
    for name, records in every.items():
        for at, record in enumerate(records):
            other = [one for key, rows in every.items() if key != name for one in rows]
            shown = [*records[at + 1 :], *records[:at], *other][:2]
            before = "".join(f"{asked(one['question'])} {one['answer']}\n\n" for one in shown)
            assert f" {record['answer']}\n" not in before or record["answer"] in [one["answer"] for one in shown]
            found.append(known.p_and_hits(before + asked(record["question"]), " " + record["answer"])[0])
    point = known.report["in_context"]["points"][1]
    assert point["at"] == 2 and point["probability"] == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_hint(known: Known) -> None:
    record = Asked("Where?", "In the old mill.", lambda *_: None)
    assert hinted(record, 0, HintParams().text) == "Where?"
    said = "Hint: the answer has 4 words, and they begin with: I t. Where?"
    assert hinted(record, 2, HintParams().text) == said
    assert "old mill" not in repr(record)
    found = []
    for one in (one for records in known.records.values() for one in records):
        words = one["answer"].split()
        text = f"Hint: the answer has {len(words)} words, and they begin with: {' '.join(w[0] for w in words[:2])}. "
        found.append(known.p_and_hits(asked(text + one["question"]), " " + one["answer"])[0])
    assert known.report["hint"]["points"][1]["probability"] == pytest.approx(sum(found) / len(found), rel=1e-4)
    with pytest.raises(ValidationError, match="initials"):
        HintParams(text="Hint!")


def test_prefix_against_the_plain_forward(memorised, full_forward) -> None:
    """P and exact memorization of what follows the given tokens; answers have 4 to 7 tokens, the end included."""
    target = Target(memorised.model(), {"a": memorised.forget, "b": memorised.second})
    entry = registry.attacks["prefix"]
    curve = entry.call(target, entry.params(tokens=(0, 3)))
    kept = [e for e in (*memorised.forget, *memorised.second) if e.answer_length >= 5]
    for point in curve.points:
        p, hits = [], []
        for example in kept:
            nll, logits = full_forward(target.model, example)
            p.append(float(torch.exp(-nll[point.at :].mean()).detach()))
            right = logits.argmax(-1) == example.tokens[example.answer_start :]
            hits.append(float(right[point.at :].double().mean()))
        assert point.known.p == pytest.approx(sum(p) / len(p), rel=1e-4)
        assert point.known.exact_memorization == pytest.approx(sum(hits) / len(hits))
    assert curve.budget == {"measured": len(kept), "left_out": 12 - len(kept)}
    with pytest.raises(InputError, match="no answer is longer than 50 tokens"):
        entry.call(target, entry.params(tokens=(50,)))


def test_sampled_answers_against_rouge_score(known: Known) -> None:
    """Best recall and containment among the first n, from the samples drawn again."""
    from alkn.core.unlearning import seed_of

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    curve = known.report["sampling"]
    best: dict[int, list[float]] = {1: [], 3: []}
    inside: dict[int, list[float]] = {1: [], 3: []}
    for name, records in known.records.items():
        for number, record in enumerate(records):
            example = known.target.forgotten[name][number]
            (rows,) = sample(
                known.model, [example.tokens[: example.answer_start]], count=3, temperature=1.0,
                seeds=[seed_of(0, "sampling", name, number)], eos=known.target.eos, max_new_tokens=48,
            )  # fmt: skip
            texts = [known.encoder.decode(ids) for ids in rows]
            for n in best:
                best[n].append(max(scorer.score(record["answer"], text)["rougeL"].recall for text in texts[:n]))
                inside[n].append(float(any(record["answer"].strip(" .") in text for text in texts[:n])))
    for point in curve["points"]:
        n = point["at"]
        assert point["rouge_l"] == pytest.approx(sum(best[n]) / len(best[n]))
        assert point["contained"] == pytest.approx(sum(inside[n]) / len(inside[n]))
    assert curve["about"][0] == "rouge_l" and curve["points"][1]["rouge_l"] >= curve["points"][0]["rouge_l"] > 0.2
    assert curve["points"][1]["contained"] >= curve["points"][0]["contained"]


def test_contains() -> None:
    assert contains("Well: the OLD mill, he said", "The old mill.")
    assert not contains("the old millstone", "old mill") and not contains("mill old", "old mill")


def test_samples_follow_the_models_distribution(make_model) -> None:
    """2,000 first tokens against softmax(logits / T); each prompt's samples are its own; context and end hold."""
    model = make_model("llama", std=0.5)
    prompt = torch.tensor([5, 9, 11])
    drawn = sample(
        model, [prompt, prompt], count=1000, temperature=0.7, seeds=[1, 2], eos=0, max_new_tokens=1, max_rows=1000
    )
    with torch.no_grad():
        chances = torch.softmax(model(input_ids=prompt[None]).logits[0, -1].double() / 0.7, -1)
    counts = torch.zeros(300, dtype=torch.float64)
    for row in (*drawn[0], *drawn[1]):
        counts[row[0] if row else 0] += 1
    likely = chances > 0.005
    spread = (chances * (1 - chances) / 2000).sqrt()
    assert ((counts / 2000 - chances).abs() < 5 * spread)[likely].all() and int(likely.sum()) >= 5
    assert drawn[0] != drawn[1]
    alone = sample(model, [prompt], count=1000, temperature=0.7, seeds=[2], eos=0, max_new_tokens=1)
    assert alone[0] == drawn[1]
    (long,) = sample(model, [torch.arange(1, 61)], count=2, temperature=1.0, seeds=[0], eos=299, max_new_tokens=99)
    assert all(len(row) <= 4 for row in long), "the context is 64 tokens"


def test_cold_samples_are_greedy(memorised) -> None:
    prompts = [e.tokens[: e.answer_start] for e in memorised.forget]
    cold = sample(memorised.trained, prompts, count=2, temperature=1e-6, seeds=range(6), eos=0, max_new_tokens=8)
    expected = greedy(memorised.trained, prompts, eos=0, max_new_tokens=8)
    assert [row[0] for row in cold] == [row[1] for row in cold] == expected


def test_benign_text_holds_no_forgotten_record(known: Known, tmp_path: Path) -> None:
    entry = registry.attacks["relearning_benign"]
    same, other = known.records["r001"][0], {"question": "What is new?", "answer": "Nothing is."}
    rows = [{name: same[name] for name in ("question", "answer")}, other]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = entry.call(known.target, entry.params(text=str(path), steps=(0, 1)))
    assert (curve.budget["taught"], curve.budget["left_out"]) == (1, 1)
    assert curve.budget["measured"] == sum(map(len, known.records.values()))
    retain = known.report["relearning_benign"]
    assert curve.points[0].known.p == retain["points"][0]["probability"]
    assert curve.points[1].known.p != retain["points"][1]["probability"]
    with pytest.raises(InputError, match=r"^nowhere.jsonl: no such file"):
        entry.call(known.target, entry.params(text="nowhere.jsonl"))


def test_an_export_is_measured_as_it_lies_there(known: Known, tmp_path: Path) -> None:
    """An own export, rounded to 4 bits, against the attack that rounds."""
    from alkn.attacking import weight_bits
    from alkn.attacks.quantization import quantize_

    entry = registry.attacks["export"]
    rounded: Any = copy.deepcopy(known.model)
    quantize_(rounded, bits=4)
    rounded.save_pretrained(tmp_path / "r002-4bit")
    curve = entry.call(known.target, entry.params(folder=str(tmp_path / "{request}-4bit"))).as_dict()
    assert [point["at"] for point in curve["points"]] == [32, 32], "what is stored are 32 bits"
    for mine, theirs in zip(curve["points"], known.report["quantization"]["points"], strict=True):
        assert mine["probability"] == pytest.approx(theirs["probability"], rel=1e-6)
    with pytest.raises(InputError, match=r"^exports/r002: no such model folder$"):
        entry.call(known.target, entry.params())
    for config, bits in (({"bits": 3}, 3), ({"load_in_4bit": True, "load_in_8bit": False}, 4), ({}, 32)):
        rounded.config.quantization_config = config
        assert weight_bits(rounded) == bits


@pytest.mark.parametrize(
    "records",
    [
        [{"id": 0, "question": "Who?", "answer": "The old miller."}],
        [{"id": 0, "prompt": "Once there was", "completion": " a mill."}],
    ],
)
def test_what_is_asked_as_it_stands_is_the_record(records: list[dict[str, Any]], tokenizer) -> None:
    encoder = Encoder(tokenizer, Data(), context=64)
    (example,), (record,) = encoder.examples("x", records), encoder.asked(records)
    again = record.encode(record.question)
    assert torch.equal(again.tokens, example.tokens) and again.answer_start == example.answer_start
    assert record.encode("word " * 99) is None
    shown = record.encode(record.question, [(" A", " B")])
    text = encoder.decode(shown.tokens[: shown.answer_start].tolist())
    expected = {"Who?": "Question:  A\nAnswer:  B\n\nQuestion: Who?\nAnswer:"}
    assert text == expected.get(record.question, " A B\n\nOnce there was")


def test_chats_and_texts(tokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoder = Encoder(tokenizer, Data(chunk_tokens=8), context=64)
    user, said = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}
    whole = [{"role": "system", "content": "S"}, user, said]
    chats = [{"id": 0, "messages": whole}, {"id": 1, "messages": [said, said]}]
    first, second = encoder.asked(chats)
    assert second is None
    example = encoder.examples("x", chats[:1])[0]
    assert torch.equal(first.encode("Who?").tokens, example.tokens)
    shown = first.encode("How?", [("A", "B")])
    assert encoder.decode(shown.tokens.tolist()) == "<system>S<user>A<assistant>B<user>How?<assistant>He."
    text = [{"id": 0, "text": "the small house " * 9}]
    assert encoder.asked(text) == [None] * len(encoder.examples("x", text))


def test_text_has_no_question(memorised) -> None:
    target = Target(memorised.model(), {"a": memorised.forget}, asked={"a": [None] * 6}, eos=0)
    given = {name: registry.attacks[name].params() for name in ("paraphrase", "jailbreak", "hint", "sampling")}
    report = run_attacks(target, given)
    assert set(report) == {"missing"} and all("question" in why for why in report["missing"].values())
    assert "not given" in run_attacks(target, {"export": registry.attacks["export"].params()})["missing"]["export"]


@pytest.mark.parametrize(
    ("attack", "given", "said"),
    [
        ("jailbreak", {"wrappers": ()}, "at least 1"),
        ("jailbreak", {"wrappers": ("{question}", "no place")}, "entry 1 has it 0 times"),
        ("prefix", {"tokens": (2, 2)}, "each larger"),
        ("in_context", {"examples": ()}, "each larger"),
        ("sampling", {"temperature": 0}, "greater than 0"),
    ],
)
def test_budgets(attack: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        registry.attacks[attack].params(**given)


def test_records_that_do_not_fit_are_counted(known: Known) -> None:
    entry = registry.attacks["jailbreak"]
    long: Callable[..., Example | None] = lambda *_: None  # noqa: E731
    given = {"a": [Asked("q", "a", long)], **known.target.asked}
    target = Target(known.model, {"a": [], **known.target.forgotten}, asked=given)
    curve = entry.call(target, entry.params(wrappers=FRAMES))
    assert curve.budget["left_out"] == 1 and set(curve.missing) == {"a"}
    assert curve.as_dict()["points"] == known.report["jailbreak"]["points"]
