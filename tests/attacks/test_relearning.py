"""The relearning attack: what it measures, that it leaves the model alone, and that it finds what was only hidden."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from alkn import registry
from alkn.attacks.relearning import RelearningParams, evenly, relearn_requests
from alkn.core.attack import Target
from alkn.core.scoring import Example, score
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.errors import InputError
from alkn.models import Architecture, new_model

SIZE = Architecture(hidden_size=32, intermediate_size=64, layers=2, heads=4, vocab_size=300, context=64)


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


def train(model: nn.Module, records: list[Example], *, epochs: int) -> nn.Module:
    hp = Hyperparameters(lr=1e-2, epochs=epochs, batch_size=8, betas=(0.9, 0.95))
    fine_tune(model, records, hp, loss=answer_loss(), generator=torch.Generator().manual_seed(0))
    return model


def test_every_tenth_by_position() -> None:
    assert evenly(25, 0.1) == [0, 10, 20]
    assert evenly(400, 0.1) == list(range(0, 400, 10))
    assert evenly(7, 0.5) == [0, 2, 4, 6]
    assert evenly(8, 0.3) == [0, 3, 7]  # 0, 3.33, 6.67, then 10
    assert evenly(3, 0.9) == [0, 1, 2]
    assert evenly(1, 0.1) == [0]


def test_the_first_point_is_the_score_of_the_given_model(memorised) -> None:
    """Also at a stored precision below float32, where the copy that is trained would score otherwise."""
    model = memorised.model().to(torch.bfloat16)
    requests = {"a": memorised.forget, "b": memorised.second}
    curve = relearn_requests(model, requests, share=0.25, steps=(0, 1))
    # Positions 0, 4, 8 of the twelve are taught: 0 and 4 of the first request, 2 of the second.
    rest = [*(memorised.forget[i] for i in (1, 2, 3, 5)), *(memorised.second[i] for i in (0, 1, 3, 4, 5))]
    expected = score(model, rest)
    assert curve.points[0].at == 0
    assert curve.points[0].known.p == pytest.approx(float(expected.probability.mean()), abs=1e-12)
    assert curve.points[0].known.exact_memorization == pytest.approx(float(expected.exact_memorization.mean()))
    assert curve.budget["taught"] == 3 and curve.budget["measured"] == 9


def test_the_requests_at_the_end_average_to_the_last_point(memorised) -> None:
    curve = relearn_requests(memorised.model(), {"a": memorised.forget, "b": memorised.second}, share=0.25, steps=(2,))
    (point,) = curve.points
    mean = (4 * point.requests["a"].p + 5 * point.requests["b"].p) / 9
    assert point.at == 2 and point.known.p == pytest.approx(mean)


def test_steps_are_those_of_adamw_on_the_taught_records(memorised, make_model) -> None:
    """Two steps on one record, against AdamW written out."""
    model = make_model("llama", seed=4)
    records = memorised.forget[:4]
    curve = relearn_requests(model, {"forgotten": records}, share=0.25, steps=(2,), lr=1e-2, batch_size=16)
    other = copy.deepcopy(model)
    weights = list(other.parameters())
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    tokens, start = records[0].tokens, records[0].answer_start
    for t in (1, 2):
        logits = other(input_ids=tokens[None]).logits[0, start - 1 : -1]
        grads = torch.autograd.grad(nn.functional.cross_entropy(logits, tokens[start:]), weights)
        with torch.no_grad():
            for w, g, m, v in zip(weights, grads, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                w -= 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert curve.points[0].known.p == pytest.approx(float(score(other, records[1:]).probability.mean()), rel=1e-4)
    assert curve.points[0].known.p != pytest.approx(float(score(model, records[1:]).probability.mean()), rel=1e-3)


def test_the_given_model_is_unchanged(memorised) -> None:
    model = memorised.model()
    model.train()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    before = bytes_of(model)
    relearn_requests(model, {"forgotten": memorised.forget}, share=0.5, steps=(0, 3))
    assert bytes_of(model) == before
    assert model.training and not model.get_parameter("model.embed_tokens.weight").requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_what_was_only_hidden_comes_back(make_examples) -> None:
    """A model whose answers were pushed down by a few steps regains more than one that never saw the records."""
    forget, other = make_examples(30, seed=11, prompt=(4, 6), answer=(3, 6)), make_examples(20, seed=12)
    hidden = train(new_model(SIZE, vocab_size=300, eos_token_id=0, seed=0), forget + other, epochs=60)
    fresh = train(new_model(SIZE, vocab_size=300, eos_token_id=0, seed=0), other, epochs=60)

    def ascent(model: nn.Module, batch) -> torch.Tensor:
        return -answer_loss()(model, batch)

    # Until it is hidden, and no step more: how many that takes depends on the machine's rounding.
    hp, generator = Hyperparameters(lr=1e-3, epochs=1, batch_size=30), torch.Generator().manual_seed(0)
    for _ in range(100):
        if score(hidden, forget).probability.mean() < 0.05:
            break
        fine_tune(hidden, forget, hp, loss=ascent, generator=generator)
    regained = relearn_requests(hidden, {"forgotten": forget}, share=0.3, steps=(0, 40), lr=3e-3)
    ceiling = relearn_requests(fresh, {"forgotten": forget}, share=0.3, steps=(0, 40), lr=3e-3)
    start, end = regained.points
    assert start.known.p < 0.1
    assert end.known.p > start.known.p + 0.1
    assert ceiling.points[-1].known.p < 0.01
    assert end.known.exact_memorization > ceiling.points[-1].known.exact_memorization + 0.4


def test_same_seed_same_curve(memorised) -> None:
    def run(seed: int) -> object:
        params = RelearningParams(share=0.5, steps=(0, 4), batch_size=2, seed=seed)
        target = Target(memorised.model(), {"a": memorised.forget, "b": memorised.second})
        return registry.attacks["relearning"].call(target, params).as_dict()

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_request_without_a_measured_record_says_so(memorised) -> None:
    curve = relearn_requests(
        memorised.model(), {"a": memorised.forget[:1], "b": memorised.second}, share=0.1, steps=(0,)
    )
    assert set(curve.points[0].requests) == {"b"} and set(curve.missing) == {"a"}
    with pytest.raises(InputError, match="no record is left"):
        relearn_requests(memorised.model(), {"forgotten": memorised.forget[:1]})


@pytest.mark.parametrize("steps", [(), (5, 5), (5, 0), (-1, 5)])
def test_steps_must_rise(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="each larger"):
        RelearningParams(steps=steps)
