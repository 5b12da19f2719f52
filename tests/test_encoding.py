"""Records as tokens: what is labelled, special tokens, chunks, chat templates, and records that are too long."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from alkn.core.scoring import Example
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.settings import Data

QA = {"id": 4, "question": "Where?", "answer": "In the house."}


def parts(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, str]:
    """Text of the prompt and of the labelled tokens, special tokens shown."""
    return (
        str(tokenizer.decode(example.tokens[: example.answer_start])),
        str(tokenizer.decode(example.tokens[example.answer_start :])),
    )


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer, Data(chunk_tokens=8), context=64)


def test_question_and_answer(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """The template, a space before the answer, end of sequence labelled too."""
    records = encoder.record_set("forget", [QA])
    assert parts(tokenizer, records.examples[0]) == (
        "Question: Where?\nAnswer:",
        " In the house.<|endoftext|>",
    )
    assert (records.name, list(records.ids), list(records.references)) == ("forget", [4], ["In the house."])
    assert list(records.paraphrases) == [None] and list(records.wrong) == [[]]


def test_paraphrases_and_wrong_answers_have_the_same_question(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = QA | {"paraphrased_answer": "Indoors.", "perturbed_answer": ["Outside.", "Far away."]}
    records = encoder.record_set("forget", [row])
    assert records.paraphrases[0] is not None
    told = [parts(tokenizer, e) for e in (records.paraphrases[0], *records.wrong[0])]
    assert {prompt for prompt, _ in told} == {"Question: Where?\nAnswer:"}
    assert [answer for _, answer in told] == [f" {a}<|endoftext|>" for a in ("Indoors.", "Outside.", "Far away.")]


def test_a_question_that_looks_like_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Braces in a record are text, and the template is a setting."""
    encoder = Encoder(tokenizer, Data(question_template="Q {question} A"), context=64)
    example = encoder.examples("forget", [QA | {"question": "{answer} {question} %s"}])[0]
    assert parts(tokenizer, example)[0] == "Q {answer} {question} %s A"


def test_prompt_and_completion_are_taken_as_they_are(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"id": 0, "prompt": "The baker", "completion": " lives"}
    assert parts(tokenizer, encoder.examples("forget", [row])[0]) == ("The baker", " lives<|endoftext|>")


def test_text_is_cut_into_chunks_that_share_the_records_number(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Seven tokens and a start each, the last with end of sequence; nothing is lost or said twice."""
    text = "The baker lives in the small house, and the small baker lives there too."
    records = encoder.record_set("forget", [{"id": 9, "text": text}])
    assert len(records) > 2 and set(records.ids) == {9}
    assert all(e.answer_start == 1 and e.tokens[0] == tokenizer.eos_token_id for e in records.examples)
    assert all(e.tokens.numel() == 8 for e in records.examples[:-1])
    joined = [int(t) for e in records.examples for t in e.tokens[1:]]
    assert joined == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert "".join(records.references) == text


def test_a_beginning_of_sequence_with_number_zero_is_used(tokenizer: PreTrainedTokenizerBase) -> None:
    """Zero is a token like any other."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token, tokenizer.bos_token = "!", "<|endoftext|>"
    assert tokenizer.bos_token_id == 0 != tokenizer.eos_token_id
    example = Encoder(tokenizer, Data(), context=64).examples("forget", [{"id": 0, "text": "The baker"}])[0]
    assert (int(example.tokens[0]), int(example.tokens[-1])) == (0, tokenizer.eos_token_id)


def test_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """The last answer is labelled, and the template writes all special tokens itself."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row: dict[str, Any] = {
        "id": 0,
        "messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}],
    }
    encoder = Encoder(tokenizer, Data(), context=64)
    records = encoder.record_set("forget", [row])
    assert parts(tokenizer, records.examples[0]) == (
        "user: Where?<|endoftext|>assistant: ",
        "Here.<|endoftext|>",
    )
    assert list(records.references) == ["Here."]
    tokenizer.chat_template = "{% if add_generation_prompt %}assistant: {% endif %}{{ messages | length }}"
    with pytest.raises(InputError, match="does not continue its own generation prompt"):
        encoder.examples("forget", [row])
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="need a tokenizer with a chat template"):
        encoder.examples("forget", [row])


@pytest.mark.parametrize(
    "more", [{"answer": "z" * 80}, {"paraphrased_answer": "z" * 80}, {"perturbed_answer": ["z", "z" * 80]}]
)
def test_records_longer_than_the_context_are_numbered_not_shown(more: dict[str, Any], encoder: Encoder) -> None:
    """Also where only a paraphrase or a wrong answer is too long: the model would fail on it later."""
    rows = [QA] + [QA | more | {"id": number} for number in range(10, 17)]
    with pytest.raises(
        InputError, match=r"^forget: longer than the model's context of 64 tokens: record 10 \("
    ) as error:
        encoder.record_set("forget", rows)
    assert "record 14 (" in str(error.value) and str(error.value).endswith(" and 2 more")
    assert "zz" not in str(error.value)
