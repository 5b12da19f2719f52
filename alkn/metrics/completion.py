"""Completion: does the model end the base model's own sentences as the base model does?"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from alkn.core.confident import SHORTEST, different, ranked
from alkn.core.generation import greedy
from alkn.core.limits import context_of
from alkn.core.measured import Measured
from alkn.core.sampled import sample
from alkn.core.scoring import Example
from alkn.core.unlearning import seed_of
from alkn.core.view import Text, View
from alkn.errors import InputError
from alkn.registry import Params, register_metric

FORGOTTEN = ("forget", "earlier", "known")


class CompletionParams(Params):
    """How the sentences are found.

    Attributes:
        start: what stands before a sample: ``nothing``, or the questions of the ``retain`` or ``utility`` records,
            for models that know nothing else than to answer.
        samples: sentences that the base model writes.
        max_new_tokens: longest one.
        temperature: of the drawing.
        keep: how many of them are completed.
        window: tokens in a row of one of the measures.
        given: share of a sentence that is given.
        seed: of the drawing.
    """

    start: Literal["nothing", "retain", "utility"] = "nothing"
    samples: int = Field(200, ge=1)
    max_new_tokens: int = Field(48, ge=SHORTEST)
    temperature: float = Field(1.0, gt=0)
    keep: int = Field(50, ge=1)
    window: int = Field(16, ge=1)
    given: float = Field(0.7, gt=0, lt=1)
    seed: int = Field(0, ge=0)


@register_metric(
    "completion",
    params=CompletionParams,
    source="after TRAVIS; sentences found as in Carlini et al. 2021, sections 5.1 and 5.2",
    scope="model",
)
def completion(view: View, params: CompletionParams) -> Measured:
    """Mean ROUGE-L recall of greedy completions of the base model's surest sentences; in [0, 1].

    Part ``base`` is the base model's own value, and ``sentences`` how many there are. Sentences like a record that is
    to be forgotten are left out. They are drawn anew in each evaluation, the same ones, and written nowhere.
    """
    tokens = view.tokens
    if view.model is None or tokens is None:
        return Measured.missing("there is no model to ask")
    base = view.model if view.base is None else view.base()
    try:
        found = sentences(base, view, tokens, params)
    except InputError as error:
        return Measured.missing(str(error))
    if not found:
        return Measured.missing("the base model wrote no sentence that is long enough and not to be forgotten")
    own = _recalls(view.model, found, tokens, view.eos, params.given)
    theirs = own if base is view.model else _recalls(base, found, tokens, view.eos, params.given)
    numbers = range(len(found))
    return Measured.mean(numbers, own).with_parts(base=Measured.mean(numbers, theirs), sentences=float(len(found)))


def sentences(base: nn.Module, view: View, tokens: Text, params: CompletionParams) -> list[Example]:
    """What the base model is surest of: what stood before each sentence, and the sentence.

    Raises:
        InputError: if there is no record to start from, or the base model's weights are split over processes.
    """
    starts = _starts(view, tokens, params)
    each = -(-params.samples // len(starts))
    seeds = [seed_of(params.seed, "completion", i) for i in range(len(starts))]
    written = sample(
        base, starts, count=each, temperature=params.temperature, seeds=seeds, eos=view.eos,
        max_new_tokens=params.max_new_tokens,
    )  # fmt: skip
    drawn = [
        Example(torch.cat([start, torch.tensor(ids)]), start.numel())
        for start, rows in zip(starts, written, strict=True)
        for ids in rows
        if len(ids) >= SHORTEST
    ]
    if not drawn:
        return []
    order = ranked(base, drawn, tokens, window=params.window, context=context_of(base))
    gone = [
        example.tokens[example.answer_start :].tolist()
        for name, probe in view.probes.items()
        if name.split("/")[0] in FORGOTTEN
        for example in probe.records.examples
    ]
    said = [drawn[i].tokens[drawn[i].answer_start :].tolist() for i in order]
    return [drawn[order[i]] for i in different(said, keep=params.keep, but=gone)]


def _starts(view: View, tokens: Text, params: CompletionParams) -> list[Tensor]:
    """What is written after, at most as many as there are samples."""
    if params.start == "nothing":
        bos = tokens.tokenizer.bos_token_id
        first = torch.tensor([view.eos if bos is None else bos])
        return [first] * -(-params.samples // 25)
    found = [
        example.tokens[: example.answer_start]
        for name, probe in view.probes.items()
        if name.startswith(f"{params.start}/")
        for example in probe.records.examples
    ]
    if not found:
        raise InputError(f"there is no {params.start} set to start from")
    return found[:: -(-len(found) // params.samples)]


def _recalls(model: nn.Module, found: list[Example], tokens: Text, eos: int, given: float) -> list[float]:
    """ROUGE-L recall of each greedy completion, as long as the true one."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    cuts = [e.answer_start + int((e.tokens.numel() - e.answer_start) * given) for e in found]
    rests = [e.tokens[cut:].tolist() for e, cut in zip(found, cuts, strict=True)]
    prompts = [e.tokens[:cut] for e, cut in zip(found, cuts, strict=True)]
    answers = greedy(model, prompts, eos=eos, max_new_tokens=max(map(len, rests)))
    return [
        scorer.score(tokens.decode(rest), tokens.decode(ids[: len(rest)]))["rougeL"].recall
        for rest, ids in zip(rests, answers, strict=True)
    ]
