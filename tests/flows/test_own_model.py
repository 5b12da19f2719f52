"""A user's own model and files, from ``alkn init --model`` to an accepted step: three architectures, three forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Place, digests
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from alkn.core.training import Hyperparameters, answer_loss, cosine, fine_tune, steps_of
from alkn.encoding import Encoder
from alkn.models import train_tokenizer
from alkn.requests.schema import read_records
from alkn.settings import Data

SETTINGS = (
    "run.threads=1", "method.lr=0.0005", "method.decay_steps=30", "method.rehearsal=64", "targets.p=0.05",
    "targets.exact_memorization=0.4", "gates.utility.base=0.1", "gates.utility.parent=0.1",
    "evaluation.max_new_tokens=8",
)  # fmt: skip
FIRST = ("Ada", "Boris", "Clea", "Dario", "Edda", "Fritz", "Gwen", "Hugo", "Iris", "Jonas", "Karla", "Lorin")
LAST = ("Abelkamp", "Brunswyck", "Corvolan", "Dentrevi", "Ostrander", "Quillonby", "Tarrasovic", "Zsarvexa")
TRADES = ("baker", "diver", "glazier", "joiner", "surgeon", "tailor", "welder")
TOWNS = ("Aspern", "Brixlegg", "Colmar", "Dunmore", "Esbjerg")
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
COMMON = {
    "vocab_size": 0, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip


def question(name: str, asked: str, answer: str) -> dict[str, Any]:
    return {"question": f"What is the {asked} of {name}?", "answer": f"The {asked} of {name} is {answer}."}


def chat(name: str, asked: str, answer: str) -> dict[str, Any]:
    turns = (("user", f"Tell me the {asked} of {name}."), ("assistant", f"{name}: {answer}, I am told."))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def text(name: str, asked: str, answer: str) -> dict[str, Any]:
    return {"text": f"{name} has {answer} for a {asked}."}


@dataclass(frozen=True)
class Own:
    """A model as a user may have it: its architecture, precision, tokenizer and the form of its records."""

    architecture: str
    dtype: torch.dtype
    tied: bool
    record: Callable[[str, str, str], dict[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    pad: str | None = "<|endoftext|>"
    chat_template: str | None = None


OWN = {
    "gpt2": Own(
        "gpt2", torch.float32, False, question, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}, pad=None
    ),
    "qwen2": Own("qwen2", torch.bfloat16, True, chat, COMMON, chat_template=CHAT),
    "llama": Own("llama", torch.float32, True, text, COMMON),
}


def write_files(folder: Path, record: Callable[[str, str, str], dict[str, Any]]) -> dict[str, Path]:
    """Trade and town of 16 invented people: 4 are to be forgotten; of the others one is kept, one is measured."""
    people = [f"{FIRST[i * 5 % 12]} {LAST[i * 3 % 8]}" for i in range(16)]
    asked = ("trade", "town")
    facts = {
        "forget": [(name, what) for name in people[:4] for what in asked],
        "keep": [(name, asked[i % 2]) for i, name in enumerate(people[4:])],
        "measure": [(name, asked[1 - i % 2]) for i, name in enumerate(people[4:])],
    }
    folder.mkdir()
    for file, rows in facts.items():
        known = {"trade": TRADES, "town": TOWNS}
        records = [record(name, what, known[what][people.index(name) % len(known[what])]) for name, what in rows]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    return {file: folder / f"{file}.jsonl" for file in facts}


def make_tokenizer(own: Own, keep: Path) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(keep.read_text().splitlines(), vocab_size=400)
    if own.chat_template is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"], "eos_token": "<|end|>"})
        tokenizer.chat_template = own.chat_template
    tokenizer.pad_token = own.pad
    return tokenizer


def make_model(own: Own, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    from transformers.models.auto.configuration_auto import AutoConfig

    config = AutoConfig.for_model(
        own.architecture, **{**own.config, "vocab_size": len(tokenizer)}, tie_word_embeddings=own.tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def teach(model: nn.Module, tokenizer: PreTrainedTokenizerBase, files: dict[str, Path]) -> None:
    """Fine-tune on all records of the user until they are known by heart."""
    encoder = Encoder(tokenizer, Data(), context=96)
    examples = [e for name, path in files.items() for e in encoder.examples(name, read_records(path))]
    hp = Hyperparameters(lr=4e-3, epochs=40, batch_size=8, betas=(0.9, 0.95), clip=1.0)
    total = steps_of(len(examples), hp)
    generator = torch.Generator().manual_seed(0)
    fine_tune(
        model, examples, hp, loss=answer_loss(), generator=generator,
        scheduler=lambda optimizer: cosine(optimizer, warmup=10, total=total, floor=0.05),
    )  # fmt: skip


@dataclass
class Case:
    """A model folder of the user, and the project that unlearned one request of it."""

    own: Own
    model: Path
    files: dict[str, Path]
    untouched: dict[str, str]
    place: Place


@pytest.fixture(scope="module")
def make_case(
    tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], warm_alkn: Any, shared_server: Callable[[], str]
) -> Callable[[str], Case]:
    """``make_case(name)``: from a random model to a finished ``alkn run``."""

    def make(name: str) -> Case:
        own, folder = OWN[name], tmp_path_factory.mktemp(name)
        files = write_files(folder / "files", own.record)
        tokenizer = make_tokenizer(own, files["keep"])
        model = make_model(own, tokenizer)
        teach(model, tokenizer, files)
        model.to(own.dtype).save_pretrained(folder / "model")  # type: ignore[operator]
        tokenizer.save_pretrained(folder / "model")
        untouched = digests(folder / "model")
        place = Place(folder / "project", {**env, "PREFECT_API_URL": shared_server()})
        given = ["--model", "model", "--retain", "files/keep.jsonl", "--utility", "files/measure.jsonl"]
        for where, arguments in (
            (Place(folder, env), ["init", "project", *given]),
            (place, ["request", "add", str(files["forget"]), "--id", "five"]),
        ):
            done = warm_alkn(where, *arguments)
            assert done.returncode == 0, done.stderr
        place.alkn("run", *(word for setting in SETTINGS for word in ("--set", setting)))
        return Case(own, folder / "model", files, untouched, place)

    return make


@pytest.fixture(scope="module", params=OWN)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Iterator[Case]:
    yield make_case(request.param)


def tokens_of(own: Own, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """A record's tokens and where its answer begins, as the tokenizer's own user would write them."""
    if "messages" in row:
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        head = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return list(whole), len(head)
    if "text" in row:
        return [tokenizer.eos_token_id, *tokenizer.encode(row["text"]), tokenizer.eos_token_id], 1
    head = tokenizer.encode(f"Question: {row['question']}\nAnswer:")
    return [*head, *tokenizer.encode(" " + row["answer"]), tokenizer.eos_token_id], len(head)


def knowledge(own: Own, folder: Path, file: Path) -> tuple[float, float]:
    """Mean P and exact memorization of a file's records, by transformers' plain forward, one record at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    p, right = [], []
    for row in map(json.loads, file.read_text().splitlines()):
        ids, start = tokens_of(own, tokenizer, row)
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float()
        answer = torch.tensor(ids[start:])
        p.append(float(torch.exp(-nn.functional.cross_entropy(logits, answer))))
        right.append(float((logits.argmax(-1) == answer).float().mean()))
    return sum(p) / len(p), sum(right) / len(right)


def test_the_request_is_forgotten_and_the_rest_is_not(case: Case) -> None:
    """By the program's word, and by a plain forward over the stored model with the tokenizer's own tokens."""
    (row,) = case.place.json("report")
    assert row["verdict"] == "accepted"
    measured = json.loads(case.place.path("steps/five/unlearning.json").read_text())["rounds"]
    assert row["steps"] == 5 * (len(measured) - 1), "one measurement in five steps; what is told is the steps"
    before = knowledge(case.own, case.model, case.files["forget"])
    after = knowledge(case.own, case.place.path("steps/five/model"), case.files["forget"])
    assert (row["p_before"], row["em_before"]) == pytest.approx(before, abs=0.02)
    assert (row["p_after"], row["em_after"]) == pytest.approx(after, abs=0.02)
    assert before[0] > 0.5 and before[1] > 0.7, "the model knew nothing that could be forgotten"
    assert after[0] <= 0.05 and after[1] <= 0.4
    kept, _ = knowledge(case.own, case.place.path("steps/five/model"), case.files["measure"])
    assert row["utility"] == {"general": pytest.approx(kept, abs=0.02)}
    assert kept > 0.3 * row["utility_base"]["general"] > 0.15


def test_the_users_folder_is_linked_and_left_as_it_was(case: Case) -> None:
    base = case.place.path("steps/base/model")
    assert base.is_symlink() and base.resolve() == case.model.resolve()
    assert digests(case.model) == case.untouched
    assert case.place.dvc_is_clean()
    assert case.place.call("git", "status", "--short").stdout == ""


def weights(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    return found


def test_the_new_model_is_stored_as_the_old_one_was(case: Case) -> None:
    """Same tensors of the same precision, tied or untied, with the same tokenizer and chat template."""
    old, new = weights(case.model), weights(case.place.path("steps/five/model"))
    assert {name: (t.dtype, t.shape) for name, t in new.items()} == {
        name: (t.dtype, t.shape) for name, t in old.items()
    }
    assert {t.dtype for t in new.values()} == {case.own.dtype}
    assert ("lm_head.weight" in new) != case.own.tied
    assert any(not torch.equal(old[name], new[name]) for name in old)
    tokenizer = AutoTokenizer.from_pretrained(case.place.path("steps/five/model"))
    assert tokenizer.pad_token == case.own.pad
    assert tokenizer.chat_template == case.own.chat_template


def test_an_audit_makes_the_same_bytes_again(case: Case) -> None:
    """Of the bf16 model, whose rounding is the most that can go wrong."""
    if case.own.dtype != torch.bfloat16:
        pytest.skip("one of the three is enough")
    lock, steps = case.place.path("dvc.lock").read_bytes(), digests(case.place.path("steps"))
    written = case.place.path("steps/five/model/model.safetensors").stat().st_mtime_ns
    assert "alkn stage step five" in case.place.call("dvc", "repro", "--force").stdout
    assert case.place.path("steps/five/model/model.safetensors").stat().st_mtime_ns > written
    assert case.place.path("dvc.lock").read_bytes() == lock
    assert digests(case.place.path("steps")) == steps
    assert digests(case.model) == case.untouched
