"""The training loop: steps, hooks, clipping, schedules, repeatability, and divergence that is not passed over."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from randomness import seeded
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from alkn.core.scoring import Batch, Example, shuffled_batches
from alkn.core.training import (
    Hyperparameters,
    adamw,
    answer_loss,
    cosine,
    fine_tune,
    linear_warmup,
    steps_of,
)
from alkn.errors import TrainingDiverged

HP = Hyperparameters(lr=1e-2, epochs=3, batch_size=4)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def examples(make_examples: Any) -> list[Example]:
    return make_examples(10)


@pytest.mark.parametrize(("count", "epochs", "batch", "steps"), [(10, 3, 4, 9), (8, 2, 4, 4), (1, 1, 32, 1)])
def test_steps(count: int, epochs: int, batch: int, steps: int, make_model: Any, make_examples: Any) -> None:
    """epochs · ⌈records / batch⌉ losses, finite and above zero."""
    hp = Hyperparameters(lr=1e-3, epochs=epochs, batch_size=batch)
    losses = fine_tune(make_model("llama"), make_examples(count), hp, loss=answer_loss(), generator=seeded())
    assert steps_of(count, hp) == len(losses) == steps
    assert all(math.isfinite(v) and v > 0 for v in losses)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_a_plain_loop(
    kind: str, weighted: bool, make_model: Any, examples: list[Example], full_forward: Any
) -> None:
    """Same batches, one full forward a record, torch's own AdamW: same losses and, nearly, same weights."""
    hp = Hyperparameters(lr=1e-3, epochs=2, batch_size=4, weight_decay=0.1, betas=(0.8, 0.95), clip=0.5)
    token_weights = [torch.rand(e.answer_length, generator=seeded(i)) for i, e in enumerate(examples)]
    model = make_model(kind, std=0.1)
    twin = copy.deepcopy(model).eval()
    found = fine_tune(
        model.train(),
        examples,
        hp,
        loss=answer_loss(token_weights if weighted else None),
        generator=seeded(7),
    )
    optimizer = AdamW(twin.parameters(), lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1)
    generator, expected = seeded(7), []
    for _ in range(2):
        for batch in shuffled_batches([e.tokens.numel() for e in examples], batch_size=4, generator=generator):
            nll = [full_forward(twin, examples[i])[0] * (token_weights[i] if weighted else 1.0) for i in batch]
            loss = torch.cat(nll).sum() / sum(examples[i].answer_length for i in batch)
            optimizer.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in twin.parameters()))
            for p in twin.parameters():
                p.grad *= min(1.0, 0.5 / norm)
            optimizer.step()
            expected.append(loss.item())
    assert found == pytest.approx(expected, rel=1e-4)
    # Where a gradient is nearly zero, AdamW's first steps are its sign times the rate: both signs may happen.
    apart = torch.cat([(a - b).abs().reshape(-1) for a, b in zip(model.parameters(), twin.parameters(), strict=True)])
    moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).norm()
    assert (apart.norm() / moved).item() < 1e-3


def test_training_learns(make_model: Any, examples: list[Example]) -> None:
    """From ln(300) to less than a tenth of it."""
    hp = Hyperparameters(lr=1e-2, epochs=40, batch_size=5)
    losses = fine_tune(make_model("llama"), examples, hp, loss=answer_loss(), generator=seeded())
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert losses[-1] < 0.5


def test_hooks_in_order(make_model: Any, examples: list[Example]) -> None:
    """before_step: ready gradients and unmoved weights; after_step: moved weights; steps count from 0."""
    model = make_model("llama")
    calls: list[tuple[str, int]] = []
    seen = {"weights": weights(model)}

    def before(step: int, batch: Batch) -> None:
        calls.append(("before", step))
        assert set(batch.records) <= set(range(10)) and 1 <= len(batch.records) <= 4
        assert all(p.grad is not None for p in model.parameters())
        assert any(bool(p.grad.any()) for p in model.parameters())
        assert same(weights(model), seen["weights"])

    def after(step: int) -> None:
        calls.append(("after", step))
        assert not same(weights(model), seen["weights"])
        seen["weights"] = weights(model)

    progress: list[tuple[str, int, int]] = []
    fine_tune(
        model,
        examples,
        HP,
        loss=answer_loss(),
        generator=seeded(),
        before_step=before,
        after_step=after,
        progress=lambda *call: progress.append(call),
        label="round 2",
    )
    assert calls == [(name, step) for step in range(9) for name in ("before", "after")]
    assert progress == [("round 2", step, 9) for step in range(10)]
    assert all(p.grad is None for p in model.parameters())


def test_before_step_may_change_gradients(make_model: Any, examples: list[Example]) -> None:
    """Coordinates whose gradient it sets to zero do not move, the others do."""
    model = make_model("llama")
    start = weights(model)
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.arange(64 * 32).reshape(64, 32) % 3 == 0

    def before(_: int, __: Batch) -> None:
        dict(model.named_parameters())[name].grad.mul_(mask)

    fine_tune(model, examples, HP, loss=answer_loss(), generator=seeded(), before_step=before)
    changed = weights(model)[name] != start[name]
    assert not bool(changed[~mask].any())
    assert float(changed[mask].float().mean()) > 0.9


@pytest.mark.parametrize("clip", [0.01, None])
def test_clipping_bounds_the_whole_gradient(clip: float | None, make_model: Any, examples: list[Example]) -> None:
    """The norm over all parameters together, before the hook; without a clip it is larger."""
    model = make_model("llama", std=0.2)
    norms = []

    def before(_: int, __: Batch) -> None:
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))

    hp = Hyperparameters(lr=1e-4, epochs=1, batch_size=4, clip=clip)
    fine_tune(model, examples, hp, loss=answer_loss(), generator=seeded(), before_step=before)
    if clip is None:
        assert min(norms) > 0.1
    else:
        assert norms == pytest.approx([clip] * 3, rel=1e-3)


def test_parameter_groups(make_model: Any, examples: list[Example]) -> None:
    """A group's own rate counts; a rate of zero leaves its weights alone."""
    model = make_model("llama")
    start = weights(model)
    still = "model.layers.1.mlp.down_proj.weight"
    named = dict(model.named_parameters())
    groups = [{"params": [named.pop(still)], "lr": 0.0}, {"params": list(named.values()), "lr": 1e-3}]
    fine_tune(model, examples, HP, loss=answer_loss(), generator=seeded(), groups=groups)
    unmoved = [name for name, p in weights(model).items() if torch.equal(p, start[name])]
    assert unmoved == [still]


def rates(schedule: LambdaLR, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        out.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return out


def optimizer() -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=2.0)


def test_linear_schedule_by_hand() -> None:
    """Up over 2 steps, then down to zero over 4."""
    assert rates(linear_warmup(optimizer(), warmup=2, total=6), 7) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert rates(linear_warmup(optimizer(), warmup=0, total=2), 3) == [2.0, 1.0, 0.0]
    assert rates(linear_warmup(optimizer(), warmup=2, total=2), 3) == [1.0, 2.0, 0.0]


def test_cosine_schedule_by_hand() -> None:
    """Up over 2 steps, then a half cosine over 4 from 1 to the floor of 0.1, where it stays."""
    root = math.sqrt(0.5)
    middle = [0.1 + 0.45 * (1 + root), 0.1 + 0.45, 0.1 + 0.45 * (1 - root)]
    expected = [2 * f for f in (0.5, 1.0, 1.0, *middle, 0.1, 0.1)]
    assert rates(cosine(optimizer(), warmup=2, total=6, floor=0.1), 8) == pytest.approx(expected)


def test_the_schedule_is_followed(make_model: Any, examples: list[Example]) -> None:
    """A rate of zero from the second step on: the weights stay as the first step left them."""
    model = make_model("llama")
    states: list[dict[str, Tensor]] = [weights(model)]
    fine_tune(
        model,
        examples,
        HP,
        loss=answer_loss(),
        generator=seeded(),
        scheduler=lambda o: LambdaLR(o, lambda step: float(step == 0)),
        after_step=lambda _: states.append(weights(model)),
    )
    assert not same(states[0], states[1])
    assert all(same(states[1], later) for later in states[2:])


def test_same_seed_same_bits(make_model: Any, examples: list[Example]) -> None:
    """Whatever the global random state is; another seed gives another model. Dropout stays off."""
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        model = make_model("gpt2").train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            losses = fine_tune(model, examples, HP, loss=answer_loss(), generator=seeded(seed))
        results.append((losses, weights(model)))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])
    assert results[0][0] != results[2][0] and not same(results[0][1], results[2][1])


def test_a_loss_that_is_no_number_stops_the_training(make_model: Any, examples: list[Example]) -> None:
    """The message is the label and the step, and nothing of the data."""
    steps = iter([1.0, float("nan")])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return answer_loss()(model, batch) * next(steps)

    with pytest.raises(TrainingDiverged, match="^round 4: the loss of step 2 of 9 is nan$"):
        fine_tune(make_model("llama"), examples, HP, loss=loss, generator=seeded(), label="round 4")


def test_a_rate_far_too_large_is_noticed(make_model: Any, examples: list[Example]) -> None:
    """A real divergence: weights of 1e30 overflow."""
    hp = Hyperparameters(lr=1e30, epochs=3, batch_size=4)
    with pytest.raises(TrainingDiverged, match=r"^fine-tune: the loss of step [2-9] of 9 is (nan|inf)$"):
        fine_tune(make_model("gpt2"), examples, hp, loss=answer_loss(), generator=seeded())


def test_a_last_update_that_breaks_the_weights_is_noticed(make_model: Any, examples: list[Example]) -> None:
    """No loss comes after it: every loss is finite, and only the last rate is not; also where ``until`` ends it."""
    for until, last in ((None, 9), (lambda: True, 3)):
        losses: list[float] = []

        def loss(model: nn.Module, batch: Batch, losses: list[float] = losses) -> Tensor:
            value = answer_loss()(model, batch)
            losses.append(value.item())
            return value

        with pytest.raises(
            TrainingDiverged, match=f"^fine-tune: a weight is not a finite number after step {last} of 9$"
        ):
            fine_tune(
                make_model("llama"), examples, HP, loss=loss, generator=seeded(), until=until,
                scheduler=lambda o, last=last: LambdaLR(o, lambda step: math.inf if step == last - 1 else 1.0),
            )  # fmt: skip
        assert len(losses) == last and all(math.isfinite(value) for value in losses)


def test_adamw_is_torchs_own() -> None:
    """Three steps of two groups, the first of them empty, to the bit; on a GPU it is the fused one."""
    ours, plain = ([nn.Parameter(t.clone()) for t in (torch.arange(6.0), torch.ones(2, 3))] for _ in range(2))
    groups = [[{"params": []}, {"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}] for ps in (ours, plain)]
    first = adamw(groups[0], device=torch.device("cpu"), lr=0.01, weight_decay=0.2, betas=(0.8, 0.9))
    second = AdamW(groups[1], lr=0.01, weight_decay=0.2, betas=(0.8, 0.9), foreach=True)
    for step in range(3):
        for ps, optimizer in ((ours, first), (plain, second)):
            for p in ps:
                p.grad = torch.sin(p.detach() + step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert not torch.equal(ours[0], torch.arange(6.0))
    of_gpu = adamw(ours, device=torch.device("cuda"), lr=0.01).defaults
    assert (of_gpu["fused"], of_gpu["foreach"], of_gpu["weight_decay"], of_gpu["betas"]) == (
        True,
        False,
        0.0,
        (0.9, 0.999),
    )
    with pytest.raises(ValueError, match="empty parameter list"):
        adamw([], device=torch.device("cpu"), lr=0.01)
