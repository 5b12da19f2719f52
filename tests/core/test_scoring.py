"""Scoring, gradients, batches and greedy answers, next to plain full forwards one record at a time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alkn.core.blocks import decoder_blocks
from alkn.core.generation import at_once, cache_bytes, greedy
from alkn.core.labelled import has_plain_head, runs_of
from alkn.core.scoring import (
    Example,
    answer_logits,
    answer_states,
    bucketed,
    collate,
    mean_gradient,
    score,
    shuffled_batches,
    weighted_nll,
)

PLAIN = ["llama", "llama_untied", "gpt2", "gpt2_untied", "qwen2", "qwen2_untied"]
CHANGED = ["gemma2", "granite", "cohere"]


@pytest.mark.parametrize("kind", PLAIN + CHANGED)
@pytest.mark.parametrize("max_tokens", [8192, 60])
def test_score_against_one_full_forward_a_record(
    kind: str, max_tokens: int, make_model: Any, make_examples: Any, full_forward: Any
) -> None:
    """Records of 5 to 17 tokens, in one padded batch and in several; logits are far from uniform."""
    model = make_model(kind, std=0.3)
    examples = make_examples(11, answer=(1, 8))
    scores = score(model, examples, max_tokens=max_tokens)
    assert len({e.tokens.numel() for e in examples}) > 5
    with torch.no_grad():
        expected = [full_forward(model, example) for example in examples]
    for i, (nll, logits) in enumerate(expected):
        assert float(scores.nll[i]) == pytest.approx(float(nll.mean()), rel=1e-4)
        assert float(scores.probability[i]) == pytest.approx(float(np.exp(-nll.mean())), rel=1e-3)
        np.testing.assert_allclose(scores.token_probs[i].numpy(), np.exp(-nll.numpy()), rtol=1e-3, atol=1e-8)
        targets = examples[i].tokens[examples[i].answer_start :]
        assert torch.equal(scores.token_hits[i], logits.argmax(-1) == targets)
    assert float(scores.nll.std()) > 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_states_are_what_the_blocks_say_at_the_labels(kind: str, make_model: Any, make_examples: Any) -> None:
    """Against what hooks on the blocks see of each record alone; the last block's go through the final norm."""
    model, examples = make_model(kind, std=0.3), make_examples(5)
    batch = collate(examples, range(5), device=torch.device("cpu"))
    seen: dict[int, Tensor] = {}
    blocks = decoder_blocks(model)
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, n=n: seen.update({n: out if torch.is_tensor(out) else out[0]}))
        for n, block in enumerate(blocks)
    ]
    wanted: list[list[Tensor]] = [[] for _ in blocks]
    with torch.no_grad():
        for e in examples:
            last = model.base_model(input_ids=e.tokens[None]).last_hidden_state
            for n, rows in enumerate(wanted):
                rows.append((seen[n] if n + 1 < len(blocks) else last)[0, e.answer_start - 1 : -1])
        for hook in hooks:
            hook.remove()
        logits, states = answer_states(model, batch)
        torch.testing.assert_close(logits, answer_logits(model, batch))
    assert len(states) == len(blocks) >= 2
    for found, rows in zip(states, wanted, strict=True):
        torch.testing.assert_close(found, torch.cat(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_rows_of_similar_length_are_run_apart(
    kind: str, make_model: Any, make_examples: Any, full_forward: Any
) -> None:
    """Two long records among ten short ones are a run of their own; logits and gradient are each record's alone."""
    model, rtol = make_model(kind, std=0.3).double(), 1e-5 if kind == "gemma2" else 1e-9  # gemma2 norms in float32
    short = make_examples(10, answer=(1, 6))
    long = make_examples(2, seed=1, prompt=(50, 52), answer=(4, 8))
    examples = [*short[:3], long[0], *short[3:8], long[1], *short[8:]]
    assert has_plain_head(model) is (kind != "gemma2"), "which is asked of the model once"
    runs: list[tuple[int, ...]] = []
    blocks = decoder_blocks(model)
    hook = blocks[0].register_forward_hook(lambda _m, given, _out: runs.append(tuple(given[0].shape[:2])))
    logits, states = answer_states(model, collate(examples, range(12), device=torch.device("cpu")))
    hook.remove()
    assert [rows for rows, _ in runs] == [10, 2]
    assert runs[0][1] < max(e.tokens.numel() for e in short), "the end-of-sequence is a label and no input"
    alone = torch.cat([full_forward(model, example)[1] for example in examples])
    torch.testing.assert_close(logits, alone, rtol=rtol, atol=1e-9)
    for number, found in enumerate(states, 1):
        said = [
            model(input_ids=e.tokens[None], output_hidden_states=True).hidden_states[number][0, e.answer_start - 1 : -1]
            for e in examples
        ]
        torch.testing.assert_close(found, torch.cat(said), rtol=rtol, atol=1e-9)
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    weights = list(model.parameters())
    for found, expected in zip(
        torch.autograd.grad((logits * direction).sum(), weights),
        torch.autograd.grad((alone * direction).sum(), weights),
        strict=True,
    ):
        assert float((found - expected).norm()) <= rtol * float(expected.norm())


@pytest.mark.parametrize("cost", [0, 3, 20, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_no_split_of_the_rows_costs_less(cost: int, seed: int) -> None:
    """Against every way to split seven rows, of neighbours by length or not."""
    widths = torch.randint(1, 40, (7,), generator=torch.Generator().manual_seed(seed)).tolist()

    def splits(rows: list[int]) -> Iterator[list[list[int]]]:
        if not rows:
            yield []
            return
        first, rest = rows[0], rows[1:]
        for count in range(len(rest) + 1):
            for others in itertools.combinations(rest, count):
                for more in splits([row for row in rest if row not in others]):
                    yield [[first, *others], *more]

    def total(runs: list[list[int]]) -> int:
        return sum(cost + len(run) * max(widths[row] for row in run) for run in runs)

    everything = list(splits(list(range(7))))
    assert len(everything) == 877, "the number of partitions of seven things (Bell)"
    found = runs_of(widths, cost)
    assert sorted(row for run in found for row in run) == list(range(7))
    assert total(found) == min(map(total, everything))
    assert all(widths[run[-1]] == max(widths[row] for row in run) for run in found)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_heads_are_recognised(kind: str, make_model: Any) -> None:
    assert has_plain_head(make_model(kind))


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_capped_and_scaled_logits_are_recognised(kind: str, std: float, make_model: Any) -> None:
    """Also on an untrained model, whose logits are so small that a cap does not bend them."""
    assert not has_plain_head(make_model(kind, std=std))


def test_a_cap_that_only_later_matters_is_kept(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """A model that is looked at untrained and has large logits afterwards is still scored right."""
    model, examples = make_model("gemma2"), make_examples(3)
    score(model, examples)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2000)
        expected = [float(full_forward(model, e)[0].mean()) for e in examples]
    assert score(model, examples).nll.tolist() == pytest.approx(expected, rel=1e-4)


def test_exact_memorization_by_hand(make_model: Any) -> None:
    """Answer tokens are the model's own first choice where the pattern says so, and another one elsewhere."""
    model = make_model("llama", std=0.3)
    patterns = ([1, 1, 1, 1], [0, 1, 0], [0, 0], [1, 0, 1, 1, 0])
    examples = []
    for number, pattern in enumerate(patterns):
        tokens = [10 + number, 20, 30]
        for hit in pattern:
            with torch.no_grad():
                choice = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(choice if hit else (choice + 1) % 300)
        examples.append(Example(torch.tensor(tokens), 3))
    scores = score(model, examples)
    assert scores.exact_memorization.tolist() == pytest.approx([1.0, 1 / 3, 0.0, 3 / 5])
    assert [hits.int().tolist() for hits in scores.token_hits] == list(map(list, patterns))


def test_score_is_in_evaluation_mode_and_gives_the_mode_back(make_model: Any, make_examples: Any) -> None:
    """GPT-2 has dropout; a model in training mode is scored without it and stays in training mode."""
    model, examples = make_model("gpt2", std=0.3), make_examples(3)
    expected = score(model, examples).nll
    model.train()
    assert torch.equal(score(model, examples).nll, expected)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_answer_without_end_of_sequence_or_with_one_token_is_fine(make_model: Any, full_forward: Any) -> None:
    """The shortest record: one token of prompt, one of answer."""
    model, example = make_model("llama", std=0.3), Example(torch.tensor([5, 9]), 1)
    assert example.answer_length == 1
    expected = full_forward(model, example)[0].item()
    assert float(score(model, [example]).nll[0]) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_score_is_an_error(make_model: Any, make_examples: Any) -> None:
    with pytest.raises(ValueError, match="the set of examples is empty"):
        score(make_model("llama"), [])
    with pytest.raises(ValueError, match="no record was picked"):
        mean_gradient(make_model("llama"), make_examples(1), [])


def test_collate_by_hand() -> None:
    """Labelled positions are the ones before each answer token, in the flat padded batch."""
    examples = [Example(torch.tensor([1, 2, 3, 4, 5]), 3), Example(torch.tensor([6, 7]), 1)]
    batch = collate(examples, [1, 0], device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[6, 7, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.positions.tolist() == [0, 7, 8]
    assert batch.targets.tolist() == [7, 4, 5]
    assert batch.rows.tolist() == [0, 1, 1]
    assert batch.records == (1, 0)


def test_weighted_nll_against_numpy() -> None:
    """Σ w · nll over the number of labels, not over Σ w."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    targets, weights = torch.tensor([0, 6, 3, 3]), torch.tensor([1.0, 0.0, 0.5, 0.25])
    z = logits.double().numpy()
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(4), targets.numpy()]
    assert float(weighted_nll(logits, targets, None)) == pytest.approx(nll.mean(), rel=1e-6)
    assert float(weighted_nll(logits, targets, weights)) == pytest.approx((nll * weights.numpy()).sum() / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt2_untied", "gemma2"])
@pytest.mark.parametrize("max_tokens", [8192, 40])
def test_mean_gradient_against_autograd(
    kind: str, max_tokens: int, make_model: Any, make_examples: Any, full_forward: Any
) -> None:
    """In float64: the mean over records of each record's mean, one record named twice, answers of 1 to 8 tokens."""
    model, examples = make_model(kind, std=0.2).double(), make_examples(6, answer=(1, 8))
    picks = [4, 0, 4, 2, 5]
    found = mean_gradient(model, examples, picks, max_tokens=max_tokens)
    assert all(p.grad is None for p in model.parameters())
    loss = torch.stack([full_forward(model, examples[i])[0].mean() for i in picks]).mean()
    names, params = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
    assert found.keys() == expected.keys()
    for name in names:
        scale = float(expected[name].abs().max())
        np.testing.assert_allclose(found[name].numpy(), expected[name].numpy(), rtol=1e-4, atol=1e-5 * scale)


def test_mean_gradient_skips_frozen_parameters_and_drops_old_gradients(make_model: Any, make_examples: Any) -> None:
    """A gradient that was lying about does not leak into the result."""
    model, examples = make_model("llama", std=0.2), make_examples(2)
    clean = mean_gradient(model, examples, [0, 1])
    model.model.norm.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    again = mean_gradient(model, examples, [0, 1])
    assert set(clean) - set(again) == {"model.norm.weight"}
    assert all(torch.equal(clean[name], again[name]) for name in again)


@pytest.mark.parametrize(("max_tokens", "max_records"), [(40, 128), (1, 128), (8192, 4), (8192, 128)])
def test_buckets_cover_every_index_once_within_limits(max_tokens: int, max_records: int) -> None:
    """Longest first; a batch holds at most its tokens, unless one record alone is longer."""
    lengths = torch.randint(1, 30, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(bucketed(lengths, max_tokens=max_tokens, max_records=max_records))
    assert sorted(itertools.chain(*batches)) == list(range(57))
    for batch in batches:
        assert len(batch) <= max_records
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    widths = [lengths[i] for batch in batches for i in batch]
    assert widths == sorted(widths, reverse=True)
    assert batches == list(bucketed(lengths, max_tokens=max_tokens, max_records=max_records))


def test_shuffled_batches_cover_every_index_once_and_repeat() -> None:
    """101 records in batches of 8: 12 full ones and one of 5; the order comes from the generator alone."""
    lengths = torch.randint(5, 50, (101,), generator=torch.Generator().manual_seed(9)).tolist()

    def epoch(seed: int) -> list[list[int]]:
        return list(shuffled_batches(lengths, batch_size=8, generator=torch.Generator().manual_seed(seed), window=4))

    first = epoch(1)
    assert sorted(itertools.chain(*first)) == list(range(101))
    assert sorted(map(len, first)) == [5] + [8] * 12
    assert first == epoch(1) != epoch(2)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first if len(b) == 8]
    assert np.mean(spread) < 20, "batches of random records would spread over about 36 lengths"


def test_second_epoch_differs_from_the_first() -> None:
    """One generator goes on over the epochs."""
    generator = torch.Generator().manual_seed(1)
    one, two = (list(shuffled_batches([5] * 40, batch_size=8, generator=generator)) for _ in range(2))
    assert one != two


def by_hand(model: nn.Module, prompt: Tensor, *, eos: int, count: int) -> list[int]:
    """The plain argmax loop, without cache, batch or padding."""
    tokens = prompt.tolist()
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == eos:
            return tokens[prompt.numel() : -1]
    return tokens[prompt.numel() :]


def prompts_of(make_examples: Callable[..., list[Example]]) -> list[Tensor]:
    return [e.tokens[: e.answer_start] for e in make_examples(9, prompt=(1, 12))]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])
def test_greedy_equals_the_argmax_loop(kind: str, make_model: Any, make_examples: Any) -> None:
    """Left-padded batches of prompts of 1 to 12 tokens; end-of-sequence is a token that some prompts lead to."""
    model, prompts = make_model(kind, std=0.3), prompts_of(make_examples)
    eos = by_hand(model, prompts[0], eos=-1, count=4)[3]
    expected = [by_hand(model, p, eos=eos, count=10) for p in prompts]
    assert len(expected[0]) < 10 and max(map(len, expected)) == 10
    assert greedy(model, prompts, eos=eos, max_new_tokens=10) == expected
    assert greedy(model, prompts, eos=eos, max_new_tokens=10, max_tokens=40) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])
def test_bytes_of_a_cached_token(kind: str, make_model: Any) -> None:
    """Against the tensors that the model itself keeps for seven tokens."""
    model = make_model(kind)
    cache = model(input_ids=torch.arange(7).unsqueeze(0), use_cache=True).past_key_values
    kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    found = cache_bytes(model)
    assert found is not None and found * 7 == kept
    assert at_once(model, 80 << 30) == ((8 << 30) // found, 1024)
    assert at_once(model, 16 << 30) == ((2 << 30) // found, 1024), "an eighth of a small card"
    assert at_once(model, None) == (16_384, 128), "a CPU"
    assert cache_bytes(model.bfloat16()) == found // 2


def test_a_model_without_attention_has_no_such_cache() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    assert cache_bytes(model) is None and at_once(model, 80 << 30) == at_once(model, None)


def test_greedy_reports_its_progress(make_model: Any, make_examples: Any) -> None:
    """Before the first batch and after every one, up to all prompts."""
    calls: list[tuple[str, int, int]] = []
    prompts = prompts_of(make_examples)
    greedy(
        make_model("llama"),
        prompts,
        eos=0,
        max_new_tokens=2,
        max_tokens=40,
        progress=lambda *c: calls.append(c),
    )
    assert len(calls) > 2 and calls[0] == ("generate", 0, 9) and calls[-1] == ("generate", 9, 9)
    assert [c[1] for c in calls] == sorted(c[1] for c in calls)


def test_greedy_ignores_the_models_own_generation_settings(make_model: Any, make_examples: Any) -> None:
    """Published models come with sampling, penalties and other ends; an answer is the first choice, always."""
    model, prompts = make_model("llama", std=0.3), prompts_of(make_examples)
    expected = greedy(model, prompts, eos=0, max_new_tokens=8)
    settings = model.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size, settings.min_new_tokens = 5.0, 1, 8
    settings.do_sample, settings.temperature, settings.top_k = True, 2.0, 50
    settings.suppress_tokens = sorted({t for answer in expected for t in answer})
    before = copy.deepcopy(settings.to_dict())
    assert greedy(model, prompts, eos=0, max_new_tokens=8) == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_stays_in_the_models_context(kind: str, make_model: Any) -> None:
    """A prompt of 60 of 64 tokens leaves room for 4, whatever stands beside it in the batch."""
    model = make_model(kind, std=0.3)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 300, (n,), generator=generator) for n in (60, 50, 3, 64)]
    expected = [by_hand(model, p, eos=-1, count=c) for p, c in zip(prompts, (4, 10, 10, 0), strict=True)]
    assert greedy(model, prompts, eos=299, max_new_tokens=10) == expected
