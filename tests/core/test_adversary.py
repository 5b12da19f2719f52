"""The adversary inside the loop: his step and the gradient at his weights against a second model; what he is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alkn.attacks.relearning import relearn_requests
from alkn.core.adversary import Adversary, Resistance
from alkn.core.descent import Pace, descend
from alkn.core.scoring import Batch, collate
from alkn.core.training import answer_loss, suppression_loss
from alkn.core.unlearning import StopRule, Task
from alkn.errors import TrainingDiverged

CPU = torch.device("cpu")


def push_down(model: nn.Module, batch: Batch) -> Tensor:
    return -answer_loss()(model, batch)


def adversary_of(
    model: nn.Module, forget: Any, *, loss: Any = push_down, steps: int = 3, share: float = 0.34, **more: Any
) -> Adversary:
    resistance = Resistance(loss, weight=0.5, lr=1e-3, steps=steps, share=share)
    given = {"batch_size": 16, "generator": torch.Generator().manual_seed(0)} | more
    return Adversary(model, list(model.parameters()), forget, resistance, **given)


def gradient_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_two_calls_against_a_second_model(memorised: Any, full_forward: Any) -> None:
    """His two steps by ``torch.optim`` on a copy, losses by the plain forward; the model itself stays as it was."""
    model, forget = memorised.model(), memorised.forget
    others: list[tuple[int, ...]] = []

    def loss(run: nn.Module, batch: Batch) -> Tensor:
        others.append(batch.records)
        return push_down(run, batch)

    adversary = adversary_of(model, forget, loss=loss)
    second = memorised.model()
    stepper = torch.optim.AdamW(second.parameters(), lr=1e-3, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for call in range(2):
        held = [torch.full_like(p, 0.25) for p in model.parameters()]
        for p, g in zip(model.parameters(), held, strict=True):
            p.grad = g.clone()
        adversary(call)
        his = [i for i in range(6) if i not in others[-1]]
        assert len(his) == 2 and set(others[-1]) == set(others[0])

        def mean_nll(records: Any) -> Tensor:
            return torch.cat([full_forward(second, forget[i])[0] for i in records]).mean()

        for q, g in zip(second.parameters(), gradient_of(second, mean_nll(his)), strict=True):
            q.grad = g
        stepper.step()
        wanted = gradient_of(second, -0.5 * mean_nll(others[-1]))
        for p, g, w in zip(model.parameters(), held, wanted, strict=True):
            torch.testing.assert_close(p.grad, g + w, rtol=1e-3, atol=1e-6)
    assert max(float(w.abs().max()) for w in wanted) > 1e-4
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert adversary.passes == 2 * (2 + 4)


def test_earlier_requests_against_a_second_model(memorised: Any, full_forward: Any) -> None:
    """He has the same part of both; the others' losses are taken at his weights, an earlier request's by a factor."""
    model, forget, earlier = memorised.model(), memorised.forget, memorised.second[:3]
    records, others = [*forget, *earlier], []

    def loss(run: nn.Module, batch: Batch) -> Tensor:
        others.append(batch.records)
        return push_down(run, batch)

    resistance = Resistance(loss, weight=0.5, lr=1e-3, steps=3, share=0.34, earlier=0.25)
    generator = torch.Generator().manual_seed(0)
    adversary = Adversary(
        model, list(model.parameters()), forget, resistance, earlier=earlier, batch_size=16, generator=generator
    )
    second = memorised.model()
    stepper = torch.optim.AdamW(second.parameters(), lr=1e-3, weight_decay=0.0)
    model.zero_grad(set_to_none=True)
    adversary(0)
    new, old = others
    assert len(new) == 4 and set(new) < set(range(6)) and len(old) == 2 and set(old) < {6, 7, 8}
    his = [i for i in range(9) if i not in (*new, *old)]

    def mean_nll(picks: Any) -> Tensor:
        return torch.cat([full_forward(second, records[i])[0] for i in picks]).mean()

    for q, g in zip(second.parameters(), gradient_of(second, mean_nll(his)), strict=True):
        q.grad = g
    stepper.step()
    wanted = gradient_of(second, -0.5 * mean_nll(new) - 0.125 * mean_nll(old))
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-3, atol=1e-6)
    assert adversary.passes == 3 + 4 + 2


def test_he_starts_anew_from_the_model_with_other_records(memorised: Any) -> None:
    """How far he is from the model, by call: one Adam step is at most the rate an entry, and the third call is one."""
    model, seen = memorised.model(), []

    def loss(run: nn.Module, batch: Batch) -> Tensor:
        far = max(float((a.detach() - b).abs().max()) for a, b in zip(run.parameters(), start, strict=True))
        seen.append((far, batch.records))
        return push_down(run, batch)

    start = [p.detach().clone() for p in model.parameters()]
    adversary = adversary_of(model, memorised.forget, loss=loss, steps=2)
    for step in range(6):
        adversary(step)
    assert [far > 1.2e-3 for far, _ in seen] == [False, True] * 3
    assert all(0 < far <= 1.001e-3 for far, _ in seen[::2])
    assert seen[0][1] == seen[1][1] and len({frozenset(records) for _, records in seen}) > 1


def test_large_sets_are_drawn_from_and_a_single_record_is_nobodys(memorised: Any, make_examples: Any) -> None:
    model, many, sizes = memorised.model(), make_examples(12, seed=3), []

    def loss(run: nn.Module, batch: Batch) -> Tensor:
        sizes.append((len(batch.records), set(batch.records)))
        return push_down(run, batch)

    adversary = adversary_of(model, many, loss=loss, share=0.5, batch_size=4)
    for step in range(3):
        adversary(step)
    assert [size for size, _ in sizes] == [4, 4, 4] and adversary.passes == 24
    assert len(set.union(*(records for _, records in sizes))) <= 6, "he has the other six"
    for earlier in ([], many[1:2]):
        alone = adversary_of(model, many[:1], loss=loss, earlier=earlier)
        model.zero_grad(set_to_none=True)
        alone(0)
        assert alone.passes == 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_he_has_one_record_at_least_and_never_all(share: float, memorised: Any) -> None:
    found = []

    def loss(run: nn.Module, batch: Batch) -> Tensor:
        found.append(len(batch.records))
        return push_down(run, batch)

    adversary_of(memorised.model(), memorised.forget, loss=loss, share=share)(0)
    assert found == [5 if share < 0.5 else 1]


def test_a_loss_that_is_no_number_is_told(memorised: Any) -> None:
    nan = torch.tensor(float("nan"))
    adversary = adversary_of(memorised.model(), memorised.forget, loss=lambda run, batch: nan, steps=7)
    with pytest.raises(TrainingDiverged, match="step 8: the resisting loss is nan"):
        adversary(7)


def test_relearning_brings_back_less_where_he_was_expected(memorised: Any) -> None:
    """The same descent with and without him, then the attack; both forget, and both keep the retain set by a loss."""
    pace = Pace(
        lr=2e-3, steps=60, decay_steps=60, lr_floor=0.1, check_every=5, batch_size=16, retain_batch=0,
        weight_decay=0.0, clip=1.0,
    )  # fmt: skip
    push, back = suppression_loss(scale=1.0, midpoint=0.076), {}
    forget = [*memorised.forget, *memorised.second]
    for weight in (0.0, 0.3):
        task = Task(memorised.model(), forget, memorised.retain, StopRule(0.01, 0.2), seed=0)

        class Keep:
            passes = 0

            def __call__(self, step: int, model: nn.Module = task.model) -> Tensor:
                batch = collate(memorised.retain, range(len(memorised.retain)), device=CPU)
                return answer_loss()(model, batch)

        resist = Resistance(push, weight, lr=5e-3, steps=10, share=0.25) if weight else None
        outcome = descend(task, pace, forget=push, keep=Keep(), rest=True, resist=resist)
        assert outcome.reached
        curve = relearn_requests(task.model, {"forgotten": forget}, share=0.25, steps=(0, 40), lr=2e-3)
        back[weight] = curve.points[-1].known.p
    assert back[0.3] < back[0.0] / 4 and back[0.0] > 0.02, back
