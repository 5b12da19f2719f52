"""Records become token ids: prompt, answer, end of sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alkn.core.asked import Asked, Turn
from alkn.core.probe import RecordSet
from alkn.core.scoring import Example
from alkn.errors import InputError
from alkn.models import context_length, load_tokenizer
from alkn.requests.schema import FORMS, form_of
from alkn.settings import Data, Settings


class Encoder:
    """Turns canonical records into examples for one tokenizer.

    Args:
        tokenizer: with an end-of-sequence token.
        data: templates and chunk length.
        context: the model's longest input, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data, *, context: int) -> None:
        self._tokenizer, self._data, self._context = tokenizer, data, context

    @classmethod
    def of(cls, model: Path, settings: Settings) -> Encoder:
        """The encoder of a model's folder: its own tokenizer and context, the settings' templates."""
        remote = settings.base.trust_remote_code
        tokenizer = load_tokenizer(model, trust_remote_code=remote)
        return cls(tokenizer, settings.data, context=context_length(model, trust_remote_code=remote))

    def record_set(self, name: str, records: Sequence[Mapping[str, Any]]) -> RecordSet:
        """Encode a whole set.

        Raises:
            InputError: naming the numbers of the records that do not fit into the model's context.
        """
        ids: list[int] = []
        examples: list[Example] = []
        references: list[str] = []
        paraphrases: list[Example | None] = []
        wrong: list[list[Example]] = []
        too_long: list[str] = []
        for record in records:
            for example, reference in self._examples(record):
                paraphrase, others = self._paraphrase(record), self._wrong(record)
                longest = max(e.tokens.numel() for e in (example, paraphrase or example, *others))
                if longest > self._context:
                    too_long.append(f"record {record['id']} ({longest} tokens)")
                ids.append(int(record["id"]))
                examples.append(example)
                references.append(reference)
                paraphrases.append(paraphrase)
                wrong.append(others)
        if too_long:
            more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
            raise InputError(
                f"{name}: longer than the model's context of {self._context} tokens: {', '.join(too_long[:5])}{more}"
            )
        return RecordSet(name, ids, examples, references, paraphrases, wrong)

    def examples(self, name: str, records: Sequence[Mapping[str, Any]]) -> Sequence[Example]:
        """Only the examples of a set; see :meth:`record_set`."""
        return self.record_set(name, records).examples

    def asked(self, records: Sequence[Mapping[str, Any]]) -> list[Asked | None]:
        """The question behind each example of :meth:`examples`, as text; ``None`` where there is none to ask."""
        out: list[Asked | None] = []
        for record in records:
            form = form_of(record)
            if form == "text":
                out += [None] * len(self._chunks(record["text"]))
            elif form == "chat" and record["messages"][-2]["role"] != "user":
                out.append(None)
            else:
                out.append(self._asked(record, form))
        return out

    def answer(self, text: str) -> Tensor:
        """Token ids of an answer alone, as it stands after a question: a space before it, end of sequence after it."""
        return torch.tensor(self._completion(" " + text))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._ids(text)

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _examples(self, record: Mapping[str, Any]) -> list[tuple[Example, str]]:
        form = form_of(record)
        if form == "question/answer":
            return [(self._answer(record["question"], record["answer"]), record["answer"])]
        if form == "prompt/completion":
            return [(self._pair(record["prompt"], record["completion"]), record["completion"])]
        if form == "chat":
            return [self._chat(record["messages"])]
        return self._chunks(record["text"])

    def _asked(self, record: Mapping[str, Any], form: str) -> Asked:
        if form == "chat":
            own = (record["messages"][-2]["content"], record["messages"][-1]["content"])
        else:
            own = (record[FORMS[form][0]], record[FORMS[form][1]])

        def encode(question: str, before: Sequence[Turn] = (), answer: str | None = None) -> Example | None:
            said = own[1] if answer is None else answer
            if form == "chat":
                example = self._chat(_conversation(record["messages"][:-2], [*before, (question, said)]))[0]
            elif form == "question/answer":
                frame = self._data.question_template
                turns = [f"{frame.replace('{question}', q)} {a}" for q, a in before]
                example = self._pair("\n\n".join([*turns, frame.replace("{question}", question)]), " " + said)
            else:
                example = self._pair("\n\n".join([*(q + a for q, a in before), question]), said)
            return example if example.tokens.numel() <= self._context else None

        return Asked(*own, encode, record.get("paraphrased_question"), record.get("paraphrased_answer"))

    def _paraphrase(self, record: Mapping[str, Any]) -> Example | None:
        text = record.get("paraphrased_answer")
        return None if text is None else self._answer(record["question"], text)

    def _wrong(self, record: Mapping[str, Any]) -> list[Example]:
        return [self._answer(record["question"], text) for text in record.get("perturbed_answer", ())]

    def _answer(self, question: str, answer: str) -> Example:
        return self._pair(self._data.question_template.replace("{question}", question), " " + answer)

    def _pair(self, prompt: str, completion: str) -> Example:
        head = self._ids(prompt, special=True) or [self._tokenizer.eos_token_id]
        return Example(torch.tensor(head + self._completion(completion)), len(head))

    def _completion(self, text: str) -> list[int]:
        return [*self._ids(text), self._tokenizer.eos_token_id]

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[Example, str]:
        if self._tokenizer.chat_template is None:
            raise InputError("chat records need a tokenizer with a chat template, and this one has none")
        head = self._tokenizer.apply_chat_template(
            [dict(m) for m in messages[:-1]], tokenize=False, add_generation_prompt=True
        )
        whole = self._tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
        if not str(whole).startswith(str(head)):
            raise InputError("the tokenizer's chat template does not continue its own generation prompt")
        # The template writes its special tokens itself, so none may be added again.
        first, rest = self._ids(str(head)), self._ids(str(whole)[len(str(head)) :])
        return Example(torch.tensor(first + rest), len(first)), messages[-1]["content"]

    def _chunks(self, text: str) -> list[tuple[Example, str]]:
        ids = [*self._ids(text), self._tokenizer.eos_token_id]
        bos = self._tokenizer.bos_token_id
        start = [self._tokenizer.eos_token_id if bos is None else bos]
        width = min(self._data.chunk_tokens, self._context) - 1
        parts = [ids[i : i + width] for i in range(0, len(ids), width)]
        return [(Example(torch.tensor(start + part), 1), self.decode(part)) for part in parts]

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special).input_ids)


def _conversation(before: Sequence[Mapping[str, str]], turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Messages, then turns of user and assistant."""
    said = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*map(dict, before), *said]
