"""Records in the model's own words, and the two losses that keep and suppress."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from randomness import seeded
from scipy.special import expit, log_softmax, logit
from torch import Tensor, nn

from alkn.core.damage import damaged
from alkn.core.generation import greedy
from alkn.core.rehearsal import Keeper, group_weights, rehearsal_set, spliced_prompts
from alkn.core.scoring import Batch, Example, answer_logits, answer_states, collate, endless_batches, score
from alkn.core.training import (
    Loss,
    anchored_loss,
    answer_loss,
    distillation_loss,
    level_loss,
    log_odds,
    state_distance,
    suppression_loss,
)
from alkn.core.unlearning import StopRule, Task
from alkn.errors import InputError

CPU = torch.device("cpu")


def answer_rows(model: nn.Module, examples: list[Example], full_forward: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities at all answer positions, one full forward a record, and the targets."""
    with torch.no_grad():
        logits = np.concatenate([full_forward(model, e)[1].double().numpy() for e in examples])
    return log_softmax(logits, axis=1), np.concatenate([e.tokens[e.answer_start :].numpy() for e in examples])


def test_suppression_against_numpy(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """softplus(s · (z − logit midpoint)) / s of the log-odds z, averaged over all answer tokens."""
    model, examples = make_model("llama", std=0.5), make_examples(5)
    log_p, targets = answer_rows(model, examples, full_forward)
    p = np.exp(log_p[np.arange(len(targets)), targets])
    z = np.log(p / (1 - p))
    found = suppression_loss(scale=2.0, midpoint=0.1)(model, collate(examples, range(5), device=CPU))
    expected = np.log1p(np.exp(2.0 * (z - np.log(0.1 / 0.9)))).mean() / 2.0
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_gradient_of_suppression_is_the_entropic_weight(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """Along the log-odds: σ(s · (z − logit midpoint)) a token, so what is forgotten is left alone."""
    model, examples = make_model("gpt2", std=0.5).double(), make_examples(3)
    batch = collate(examples, range(3), device=CPU)
    found = torch.autograd.grad(suppression_loss(scale=1.5, midpoint=0.2)(model, batch), list(model.parameters()))
    odds, weights = [], []
    for example in examples:
        nll, _ = full_forward(model, example)
        odds.append(-nll - torch.log1p(-torch.exp(-nll)))
        weights.append(torch.tensor(expit(1.5 * (odds[-1].detach().numpy() - math.log(0.25)))))
    expected = torch.autograd.grad((torch.cat(odds) * torch.cat(weights)).mean(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("reach", [None, 1.5])
def test_level_loss_against_numpy(reach: float | None, make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """Quadratic, linear beyond the reach: the mean over a record's tokens, then over records."""
    model, examples, scale = make_model("llama", std=0.5), make_examples(5), 2.0
    width = np.inf if reach is None else reach * scale
    levels = [torch.linspace(-9, 4, e.answer_length) for e in examples]
    means, off = [], []
    for example, level in zip(examples, levels, strict=True):
        log_p, tokens = answer_rows(model, [example], full_forward)
        d = np.abs(logit(np.exp(log_p[np.arange(len(tokens)), tokens])) - level.numpy().astype(np.float64))
        near = np.minimum(d, width)
        means.append(((near**2 / 2 + near * (d - near)) / scale).mean())
        off.extend(d)
    assert reach is None or min(off) < width < max(off), "both branches are in the mean"
    found = level_loss(levels, scale=scale, reach=reach)(model, collate(examples, range(5), device=CPU))
    assert found.item() == pytest.approx(np.mean(means), rel=1e-4)


def test_slope_of_the_level_loss(make_model: Any, make_examples: Any) -> None:
    """Along a token's log-odds: the distance in scales, up to the reach; nothing at the level itself."""
    model, examples = make_model("llama", std=0.5).double(), make_examples(5)
    batch = collate(examples, range(5), device=CPU)
    weights = list(model.parameters())
    odds = log_odds(answer_logits(model, batch), batch.targets)
    length = torch.bincount(batch.rows)
    mean = torch.autograd.grad((odds / length[batch.rows]).sum() / 5, weights)
    own = odds.detach().split([e.answer_length for e in examples])
    for offset, reach, slope in (
        (-50.0, 1.0, 1.0), (50.0, 1.0, -1.0), (0.0, 1.0, 0.0), (-4.5, None, 1.5), (1.5, None, -0.5),
    ):  # fmt: skip
        loss = level_loss([z + offset for z in own], scale=3.0, reach=reach)(model, batch)
        for found, expected in zip(torch.autograd.grad(loss, weights), mean, strict=True):
            torch.testing.assert_close(found, slope * expected, rtol=1e-4, atol=1e-7)


def test_distillation_against_numpy(make_model: Any, make_examples: Any, full_forward: Any) -> None:
    """Σ p · (log p − log q), averaged over answer tokens; zero at the teacher, whose weights get no gradient."""
    teacher, model, examples = make_model("llama", seed=1, std=0.5), make_model("llama", std=0.5), make_examples(5)
    batch = collate(examples, range(5), device=CPU)
    p, _ = answer_rows(teacher, examples, full_forward)
    q, _ = answer_rows(model, examples, full_forward)
    loss = distillation_loss(teacher)(model, batch)
    assert loss.item() == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-4)
    soft_p, soft_q = log_softmax(p / 3, axis=1), log_softmax(q / 3, axis=1)
    wanted = 9 * (np.exp(soft_p) * (soft_p - soft_q)).sum(1).mean()
    assert distillation_loss(teacher, temperature=3)(model, batch).item() == pytest.approx(wanted, rel=1e-4)
    loss.backward()
    assert all(w.grad is None for w in teacher.parameters()) and any(w.grad is not None for w in model.parameters())
    assert distillation_loss(copy.deepcopy(model))(model, batch).item() == pytest.approx(0.0, abs=1e-6)


def test_distance_of_hidden_states_worked_by_hand() -> None:
    """Relative in each block, whatever its scale: (1 + 4) / (4 + 1) and 100 / 2,500, and their mean."""
    wanted = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[30.0, 0.0], [0.0, 40.0]])]
    states = [torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[30.0, 6.0], [8.0, 40.0]])]
    assert state_distance(states, wanted).item() == pytest.approx((1.0 + 0.04) / 2)
    assert state_distance(wanted, wanted).item() == 0.0


def assert_descends_the_distance(model: nn.Module, batch: Batch, loss: Loss, plain: Loss, teacher: nn.Module) -> None:
    """What ``hidden`` adds to the gradient is .7 times that of the distance, worked out beside it."""
    weights = list(model.parameters())
    with torch.no_grad():
        wanted = answer_states(teacher, batch)[1]

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])

    added = gradient(loss(model, batch)) - gradient(plain(model, batch))
    far = 0.7 * gradient(state_distance(answer_states(model, batch)[1], wanted))
    assert float(far.norm()) > 0.1
    torch.testing.assert_close(added, far, rtol=1e-3, atol=1e-4 * float(far.norm()))


def test_what_is_kept_keeps_its_hidden_states(make_model: Any, make_examples: Any) -> None:
    """Both losses are what they were and the distance beside it, of which only the model has a gradient."""
    teacher, model, examples = make_model("llama", seed=1, std=0.5), make_model("llama", std=0.5), make_examples(5)
    batch = collate(examples, range(5), device=CPU)
    with torch.no_grad():
        far = [
            float((h - w).square().sum() / w.square().sum())
            for h, w in zip(answer_states(model, batch)[1], answer_states(teacher, batch)[1], strict=True)
        ]
    for loss, plain in (
        (distillation_loss(teacher, temperature=2, hidden=0.7), distillation_loss(teacher, temperature=2)),
        (anchored_loss(teacher, hidden=0.7), answer_loss()),
    ):
        value = loss(model, batch)
        assert value.item() == pytest.approx(plain(model, batch).item() + 0.7 * np.mean(far), rel=1e-4)
        value.backward()
        assert all(w.grad is None for w in teacher.parameters())
        assert_descends_the_distance(model, batch, loss, plain, teacher)
    weights = list(model.parameters())
    for p, both, first in zip(
        weights,
        torch.autograd.grad(anchored_loss(teacher, hidden=0.7)(model, batch), weights),
        torch.autograd.grad(answer_loss()(model, batch), weights),
        strict=True,
    ):
        assert not torch.equal(both, first) or p.numel() == 0


def test_endless_batches_take_every_record_once_a_round() -> None:
    """Also where a round ends inside a batch, and where a batch is larger than the set."""
    for count, size in ((7, 3), (6, 16), (5, 5)):
        batches = endless_batches(count, size, seeded())
        drawn = [i for _ in range(7 * count) for i in next(batches)]
        assert all(sorted(drawn[k : k + count]) == list(range(count)) for k in range(0, len(drawn) - count + 1, count))
    first, again, other = (next(endless_batches(50, 50, seeded(s))) for s in (1, 1, 2))
    assert first == again != other


def test_spliced_prompts_are_a_head_and_a_tail(make_examples: Any) -> None:
    """Of the prompts alone, never of an answer; each has at least two tokens of either."""
    examples = make_examples(12, prompt=(6, 10))
    prompts = [e.tokens[: e.answer_start].tolist() for e in examples]
    spliced = [p.tolist() for p in spliced_prompts(examples, 40, generator=seeded())]
    for tokens in spliced:
        fits = [
            (a, b)
            for a in prompts
            for b in prompts
            for cut in range(2, len(tokens) - 1)
            if tokens[:cut] == a[:cut] and len(tokens) - cut < len(b) and tokens[cut:] == b[cut - len(tokens) :]
        ]
        assert fits
    assert sum(tokens not in prompts for tokens in spliced) > 25
    assert spliced == [p.tolist() for p in spliced_prompts(examples, 40, generator=seeded())]


def test_written_records_are_the_models_own_answers(make_model: Any, make_examples: Any) -> None:
    """Greedy answers to spliced prompts, ended; empty ones are left out, and the model knows them best."""
    model, examples = make_model("llama", std=0.5), make_examples(12, prompt=(6, 10))
    prompts = spliced_prompts(examples, 20, generator=seeded(3))
    answers = greedy(model, prompts, eos=0, max_new_tokens=9)
    eos = next(answer[0] for answer in answers if answer)
    written = rehearsal_set(model, examples, 20, eos=eos, generator=seeded(3), max_new_tokens=9)
    expected = [(p, a) for p, a in zip(prompts, greedy(model, prompts, eos=eos, max_new_tokens=9), strict=True) if a]
    assert 0 < len(expected) < 20
    assert [e.tokens.tolist() for e in written] == [[*p.tolist(), *a, eos] for p, a in expected]
    assert [e.answer_start for e in written] == [p.numel() for p, _ in expected]
    hits = score(model, written).token_hits
    assert all(bool(h[:-1].all()) for h in hits)


def test_written_records_fit_into_the_context(make_model: Any, make_examples: Any) -> None:
    model = make_model("gpt2", std=0.3)
    written = rehearsal_set(model, make_examples(5, prompt=(50, 60)), 6, eos=299, generator=seeded())
    assert bool(torch.isfinite(score(model, written).nll).all())


def test_written_records_of_plain_text_differ(make_model: Any, make_examples: Any) -> None:
    """A text's prompt is its beginning-of-sequence: one greedy answer, as often as asked."""
    texts = [Example(torch.cat([torch.tensor([7]), e.tokens]), 1) for e in make_examples(8)]
    written = rehearsal_set(make_model("llama", std=0.3), texts, 20, eos=0, generator=seeded(), max_new_tokens=9)
    assert len({tuple(e.tokens.tolist()) for e in written}) > 1


def test_domains_share_by_a_power_of_their_sizes() -> None:
    """Three domains of 1, 4 and 9 records: a third each, by their roots 1, 2 and 3, and each record alike."""
    groups = ["a"] + ["b"] * 4 + ["c"] * 9
    for exponent, shares in (
        (0.0, (1 / 3, 1 / 3, 1 / 3)),
        (0.5, (1 / 6, 2 / 6, 3 / 6)),
        (1.0, (1 / 14, 4 / 14, 9 / 14)),
    ):
        weights = group_weights(groups, exponent)
        assert [float(weights[i:j].sum()) for i, j in ((0, 1), (1, 5), (5, 14))] == pytest.approx(shares)
        assert weights[1:5].unique().numel() == weights[5:].unique().numel() == 1


@pytest.mark.parametrize(("exponent", "share"), [(1.0, 1 / 6), (0.5, 1 / (1 + 5**0.5)), (0.0, 1 / 2)])
def test_a_small_domain_is_drawn_by_its_records_or_as_often_as_a_large_one(
    exponent: float, share: float, memorised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two records of one domain beside ten of another: in the keeping loss, and in both parts of a prompt."""
    domains = ["large"] * 10 + ["small"] * 2
    model = memorised.model()
    task = Task(model, memorised.forget, memorised.retain, StopRule(0.01, 0.1), seed=0, retain_domains=domains)
    picked: list[int] = []
    monkeypatch.setattr(
        "alkn.core.rehearsal.collate",
        lambda examples, picks, device: picked.extend(picks) or collate(examples, picks, device=device),
    )
    keeper = Keeper(task, rehearsal=0, retain_batch=16, exponent=exponent)
    for step in range(100):
        keeper(step)
    assert len(picked) == 1600 and np.mean([i >= 10 for i in picked]) == pytest.approx(share, abs=0.05)

    marked = [Example(torch.tensor([100 + i] * 5 + [200 + i] * 5 + [1, 0]), 10) for i in range(12)]
    weights = group_weights(domains, exponent) if exponent < 1 else None
    prompts = spliced_prompts(marked, 1000, generator=seeded(), weights=weights)
    for place, first in ((0, 110), (-1, 210)):
        assert np.mean([int(prompt[place]) >= first for prompt in prompts]) == pytest.approx(share, abs=0.05)


def test_the_teacher_writes_and_is_distilled(memorised: Any) -> None:
    """With θ_0 as the teacher its answers are written; the keeping loss is zero at its weights, not at the parent's."""
    base = memorised.model()
    parent = memorised.model()
    with torch.no_grad():
        for p in parent.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded()))
    written = {}
    for teacher in ("parent", "origin"):
        task = Task(
            copy.deepcopy(parent), memorised.forget, memorised.retain, StopRule(0.01, 0.1), seed=0,
            origin=lambda: copy.deepcopy(base),
        )  # fmt: skip
        keeper = Keeper(task, rehearsal=8, rehearsal_batch=8, teacher=teacher)  # type: ignore[arg-type]
        known = base if teacher == "origin" else parent
        mine = rehearsal_set(known, memorised.retain, 8, eos=0, generator=task.generator("rehearsal"))
        written[teacher] = [e.tokens.tolist() for e in keeper.pool[12:]]
        assert written[teacher] == [e.tokens.tolist() for e in mine]
        loss = keeper(0).item()
        assert loss == pytest.approx(0.0, abs=1e-6) if teacher == "parent" else loss > 0.01
        task.model.load_state_dict(known.state_dict())
        assert keeper(0).item() == pytest.approx(0.0, abs=1e-6)
    assert written["parent"] != written["origin"]


def test_the_keeper_holds_hidden_states_of_both_kinds_of_records(memorised: Any) -> None:
    """Beside cross-entropy and KL: the distance on the retain and on the written records of the step, each weighted."""
    base = memorised.model()
    task = Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.01, 0.1), seed=0)
    batches = {"retain_batch": 3, "rehearsal": 4, "rehearsal_batch": 2}
    plain, held = Keeper(task, **batches), Keeper(task, **batches, hidden=5.0)
    assert held(0).item() == pytest.approx(plain(0).item(), abs=1e-6), "at the teacher the distance is zero"
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded()))
        generator = task.generator("keep", 0)
        own = torch.randint(12, (3,), generator=generator).tolist()
        written = (12 + torch.randint(len(held.pool) - 12, (2,), generator=generator)).tolist()
        far = 0.0
        for picks in (own, written):
            batch = collate(held.pool, picks, device=CPU)
            far += float(state_distance(answer_states(task.model, batch)[1], answer_states(base, batch)[1]))
        assert far > 0.01
        assert held(0).item() == pytest.approx(plain(0).item() + 5 * far, rel=1e-4)
    assert held.passes == plain.passes, "the teacher's forward passes are not counted, as before"


def test_the_teacher_is_distilled_behind_damaged_answers(memorised: Any) -> None:
    """KL(teacher ‖ θ) by full forwards of both on the same damaged input; other damage at the next call."""
    task = Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.01, 0.1), seed=0)
    keeper = Keeper(task, rehearsal=4, rehearsal_batch=5, damage=0.7)
    teacher = memorised.model()
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded()))
    chances, found = task.generator("damage", "keep"), []
    for _ in range(2):
        picks = torch.randint(len(keeper.pool) - 12, (5,), generator=task.generator("keep", 0)) + 12
        batch = damaged(collate(keeper.pool, picks.tolist(), device=CPU), 0.7, chances)
        with torch.no_grad():
            known, now = (
                log_softmax(m(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].double().numpy(), -1)
                for m in (teacher, task.model)
            )
        found.append(keeper(0).item())
        assert found[-1] == pytest.approx(float((np.exp(known) * (known - now)).sum(1).mean()), rel=1e-4)
    assert found[0] != found[1]


def test_a_teacher_without_words_of_its_own_is_told(memorised: Any) -> None:
    """Every answer ends before it begins: there would be nothing to distil, and nobody would know."""
    task = Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.01, 0.1), seed=0)
    head = task.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[0].zero_()
        hook = head.register_forward_hook(lambda _module, _inputs, out: out.index_fill(-1, torch.tensor([0]), 1e4))
    with pytest.raises(InputError, match=r"method\.rehearsal: the model says nothing to any prompt"):
        Keeper(task, rehearsal=8, rehearsal_batch=2)
    hook.remove()


def kl(teacher: nn.Module, model: nn.Module, examples: Any, full_forward: Any) -> float:
    """KL(teacher ‖ model) over answer tokens, by numpy."""
    (p, _), (q, _) = (answer_rows(one, list(examples), full_forward) for one in (teacher, model))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def test_a_repair_comes_nearer_to_the_teacher(memorised: Any, full_forward: Any) -> None:
    """A model with noise on its weights, ten steps of eight; with a rate of next to nothing it stays where it is."""
    ends = {}
    for lr in (1e-3, 1e-12):
        task = Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.01, 0.1), seed=0)
        keeper = Keeper(task, rehearsal=8, steps=10, batch_size=8, lr=lr)
        with torch.no_grad():
            for p in task.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=seeded()))
        before = kl(keeper.teacher, task.model, memorised.retain, full_forward)
        keeper.repair(1)
        ends[lr] = kl(keeper.teacher, task.model, memorised.retain, full_forward) / before
    assert ends[1e-3] < 0.5 and ends[1e-12] == pytest.approx(1.0, rel=1e-3), ends


def test_the_temperature_of_the_teacher_counts(memorised: Any) -> None:
    values = []
    for temperature in (1.0, 3.0):
        task = Task(memorised.model(), memorised.forget, memorised.retain, StopRule(0.01, 0.1), seed=0)
        keeper = Keeper(task, rehearsal=8, rehearsal_batch=8, temperature=temperature)
        with torch.no_grad():
            for p in task.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=seeded()))
        values.append(keeper(0).item())
    assert values[0] != pytest.approx(values[1], rel=0.05)
