"""RMU, SKU, WAGLE, SOUL and training without the records: parts by hand, each on a model that knows its records."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alkn.core.blocks import Hidden, decoder_blocks, down_projection
from alkn.core.scoring import Example, collate, score
from alkn.core.sequence_losses import ascent_loss, negative_preference_loss, reference_log_probs
from alkn.core.sophia import Sophia, gauss_newton_bartlett, hutchinson
from alkn.core.training import answer_loss
from alkn.core.unlearning import Forgetting, Outcome, StopRule, Task
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import read_jsonl, write_jsonl
from alkn.methods.retrain import RetrainParams, fresh_model, without
from alkn.methods.rmu import RmuParams, States, steering_target
from alkn.methods.sku import Acquisition, SkuParams
from alkn.methods.wagle import WagleParams, attribution, attribution_mask, forget_gradient, mean_curvature
from alkn.project import Project
from alkn.records import Plan
from alkn.registry import methods
from alkn.settings import Data, Settings
from alkn.step import _rest

STOP = StopRule(p=0.01, exact_memorization=0.2)
NEVER = StopRule(p=0.0, exact_memorization=0.0)
CPU = torch.device("cpu")
Finished = Callable[[str], tuple[Task, Outcome]]
SMALL: dict[str, dict[str, Any]] = {
    "rmu": {"lr": 1e-3, "trains": "blocks"},
    "sku": {"lr": 2e-3, "epochs": 20},
    "wagle": {"lr": 2e-3, "loss": "gradient_difference"},
    "second_order": {"lr": 1e-3},
    "retrain": {"lr": 1e-2, "epochs": 60, "warmup": 5, "batch_size": 8},
}
DESCENDING = ("rmu", "wagle", "second_order")


def task_of(memorised: Any, *, stop: StopRule = STOP, seed: int = 0, **more: Any) -> Task:
    given = {"model": memorised.model(), "forget": memorised.forget, "retain": memorised.retain} | more
    return Task(stop=stop, seed=seed, **given)


def call(name: str, task: Task, **params: Any) -> Outcome:
    entry = methods[name]
    outcome = entry.call(task, entry.params(**SMALL[name] | params))
    assert isinstance(outcome, Outcome)
    return outcome


def p_of(model: nn.Module, records: Sequence[Example]) -> float:
    return float(score(model, records).probability.mean())


def changes(task: Task, memorised: Any) -> dict[str, Tensor]:
    start = dict(memorised.trained.named_parameters())
    return {name: w - start[name].detach() for name, w in task.weights().items()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean_nll(model: nn.Module, records: Sequence[Example], full_forward: Any) -> Tensor:
    """Over all answer tokens, as a batch's loss is."""
    return torch.cat([full_forward(model, e)[0] for e in records]).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, np.ndarray]:
    names, params = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return {n: g.numpy() for n, g in zip(names, found, strict=True)}


# Every method


@pytest.fixture(scope="module")
def finished(memorised: Any) -> Callable[[str], tuple[Task, Outcome]]:
    """A method's whole run with its settings of ``SMALL``, made once."""

    @functools.cache
    def run(name: str) -> tuple[Task, Outcome]:
        task = task_of(memorised, rest=memorised.second)
        return task, call(name, task)

    return run


@pytest.mark.parametrize("name", SMALL)
def test_each_forgets_what_it_is_asked_to(name: str, memorised: Any, full_forward: Any, finished: Finished) -> None:
    """Both targets, by full forwards; the last row is what the model is; SKU alone loses the retain set."""
    task, outcome = finished(name)
    with torch.no_grad():
        answers = [(e, *full_forward(task.model, e)) for e in memorised.forget]
    assert outcome.reached
    assert np.mean([math.exp(-nll.mean()) for _, nll, _ in answers]) <= STOP.p
    hits = [(logits.argmax(-1) == e.tokens[e.answer_start :]).float().mean() for e, _, logits in answers]
    assert np.mean(hits) <= STOP.exact_memorization
    first, last = outcome.history[0], outcome.history[-1]
    assert first["p"] == p_of(memorised.trained, memorised.forget) > 0.9
    now = Forgetting.of(score(task.model, memorised.forget))
    assert (last["p"], last["exact_memorization"]) == (now.p, now.exact_memorization)
    assert all(math.isfinite(value) for row in outcome.history for value in row.values())
    assert outcome.state == {} and outcome.passes > 0
    assert (p_of(task.model, memorised.retain) > 0.9) is (name != "sku")


@pytest.mark.parametrize("name", ["wagle", "second_order"])
def test_npo_as_the_forget_loss(name: str, memorised: Any) -> None:
    """It forgets too, by another way than gradient difference, and β counts."""
    ends = []
    for values in ({"loss": "npo"}, {"loss": "npo", "npo_beta": 1.0}, {"loss": "gradient_difference"}):
        task = task_of(memorised, stop=NEVER)
        outcome = call(name, task, steps=10, check_every=10, **values)
        ends.append(outcome.history[-1]["p"])
    assert max(ends) < 0.9 and len(set(ends)) == 3


SHORT = {
    "rmu": {"steps": 6}, "wagle": {"steps": 6}, "second_order": {"steps": 6, "curvature_every": 2},
    "sku": {"epochs": 2}, "retrain": {"epochs": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_bits(name: str, memorised: Any) -> None:
    """Whatever the global random state is; another seed gives other weights."""
    runs = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        task = task_of(memorised, stop=NEVER, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            outcome = call(name, task, **SHORT[name])
        runs.append((outcome, task.copy_weights()))
    same = [all(torch.equal(w, runs[0][1][n]) for n, w in weights.items()) for _, weights in runs]
    assert same == [True, True, False]
    assert runs[0][0] == runs[1][0]


@pytest.mark.parametrize("name", SMALL)
def test_the_weights_fit_the_stored_precision(name: str, memorised: Any) -> None:
    task = task_of(memorised, stop=NEVER, stored=torch.bfloat16)
    call(name, task, **SHORT[name])
    assert all(torch.equal(w, w.bfloat16().float()) and w.dtype == torch.float32 for w in task.weights().values())


@pytest.mark.parametrize("name", [name for name in SMALL if name != "retrain"])
def test_what_is_forgotten_already_is_left_alone(name: str, memorised: Any) -> None:
    task = task_of(memorised, stop=StopRule(1.0, 1.0))
    outcome = call(name, task)
    assert outcome.reached and len(outcome.history) == 1 and outcome.passes == 0
    assert not any(bool(c.any()) for c in changes(task, memorised).values())


@pytest.mark.parametrize("name", ["rmu", "wagle", "second_order", "sku"])
def test_no_retain_mode_touches_no_retain_record(name: str, memorised: Any) -> None:
    """With ``retain_batch`` 0 the result does not depend on the retain set, which may be empty."""
    weights = []
    for retain in (memorised.retain, memorised.second, []):
        task = task_of(memorised, stop=NEVER, retain=retain)
        call(name, task, **SHORT[name], retain_batch=0)
        weights.append(task.copy_weights())
    assert any(bool(c.any()) for c in changes(task, memorised).values())
    assert all(torch.equal(w, other[n]) for other in weights[1:] for n, w in weights[0].items())


@pytest.mark.parametrize("name", ["rmu", "wagle", "second_order", "sku"])
def test_a_retain_term_without_retain_records_is_an_error(name: str, memorised: Any) -> None:
    with pytest.raises(InputError, match=r"method\.retain_batch: there is no retain record.*0 switches"):
        call(name, task_of(memorised, retain=[]))


@pytest.mark.parametrize("name", DESCENDING)
def test_record_passes_are_counted(name: str, memorised: Any) -> None:
    """Six steps of 4 + 3; WAGLE adds forget once and retain twice, SOUL 4 + 3 at steps 0, 2 and 4."""
    more = {"rmu": 0, "wagle": 6 + 12 + 12, "second_order": 3 * (4 + 3)}[name]
    outcome = call(name, task_of(memorised, stop=NEVER), **SHORT[name], batch_size=4, retain_batch=3)
    assert outcome.passes == 6 * (4 + 3) + more and not outcome.reached


# Sophia


def test_sophia_against_numpy() -> None:
    """Two groups, five steps, curvature at steps 0 and 3, positive, zero and negative; some entries are clipped."""
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (5,)]
    start = [rng.normal(size=shape) for shape in shapes]
    params = [nn.Parameter(torch.tensor(t)) for t in start]
    rates, decays = [0.1, 0.02], [0.5, 0.0]
    groups = [{"params": [p], "lr": r, "weight_decay": d} for p, r, d in zip(params, rates, decays, strict=True)]
    sophia = Sophia(groups, lr=1.0, betas=(0.8, 0.6), gamma=0.3)
    theta, m, h = [t.copy() for t in start], [0 * t for t in start], [0 * t for t in start]
    clipped = []
    for step in range(5):
        given = [rng.normal(size=shape) for shape in shapes]
        if step in (0, 3):
            curvature = [rng.normal(1.0, 1.0, size=shape) * (rng.random(shape) > 0.2) for shape in shapes]
            sophia.update_curvature([torch.tensor(c) for c in curvature])
            h = [0.6 * old + 0.4 * new for old, new in zip(h, curvature, strict=True)]
        for i, p in enumerate(params):
            p.grad = torch.tensor(given[i])
            m[i] = 0.8 * m[i] + 0.2 * given[i]
            ratio = m[i] / np.maximum(0.3 * h[i], 1e-12)
            clipped += list((np.abs(ratio) > 1).reshape(-1))
            theta[i] = theta[i] * (1 - rates[i] * decays[i]) - rates[i] * np.clip(ratio, -1, 1)
        sophia.step()
        for p, t in zip(params, theta, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), t, rtol=1e-12)
    assert 0.2 < np.mean(clipped) < 0.9


def test_sophia_takes_newton_steps_on_a_quadratic() -> None:
    """Curvatures from 0.1 to 1000, no averaging, γ = 1: the minimum in one step, from within reach of the clip."""
    curvature = torch.logspace(-1, 3, 9, dtype=torch.float64)
    minimum = torch.linspace(-2, 2, 9, dtype=torch.float64)
    theta = nn.Parameter(minimum + 0.9 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1], dtype=torch.float64))
    sophia = Sophia([theta], lr=1.0, betas=(0.0, 0.0), gamma=1.0)

    def loss() -> Tensor:
        return 0.5 * (curvature * (theta - minimum).square()).sum()

    sophia.update_curvature(hutchinson(loss, [theta], generator=seeded()))
    loss().backward()
    sophia.step()
    torch.testing.assert_close(theta.detach(), minimum, rtol=1e-12, atol=1e-12)


def test_sophia_leaves_what_has_no_gradient_and_takes_no_closure() -> None:
    still, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    sophia = Sophia([still, moved], lr=0.1)
    moved.grad = torch.tensor([3.0, -0.001])
    sophia.step()
    assert still.tolist() == [1.0, 1.0]
    torch.testing.assert_close(moved.detach(), torch.tensor([0.9, 1.1]))
    with pytest.raises(ValueError, match="closure"):
        sophia.step(lambda: None)
    with pytest.raises(ValueError, match="shorter"):
        sophia.update_curvature([torch.ones(2)])


def test_hutchinson_on_a_known_hessian() -> None:
    """A dense 4 × 4 Hessian: the mean of 600 estimates is its diagonal, within five standard errors."""
    upper = [[2.0, 0.5, -1.0, 0.3], [0, -1.5, 0.7, 0.2], [0, 0, 0.4, -0.6], [0, 0, 0, 0.0]]
    hessian = torch.tensor(upper, dtype=torch.float64).triu(1)
    hessian = hessian + hessian.T + torch.diag(torch.tensor([2.0, -1.5, 0.4, 0.0], dtype=torch.float64))
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    unused = nn.Parameter(torch.ones(2))
    generator = seeded(3)
    draws = []
    for _ in range(600):
        estimate, zero = hutchinson(lambda: 0.5 * theta @ hessian @ theta, [theta, unused], generator=generator)
        draws.append(estimate.numpy())
        assert not zero.any()
    error = np.std(draws, axis=0) / math.sqrt(600)
    assert np.all(np.abs(np.mean(draws, axis=0) - [2.0, -1.5, 0.4, 0.0]) < 5 * error) and error.max() < 0.1


def test_hutchinson_of_a_linear_loss_is_zero() -> None:
    theta = nn.Parameter(torch.ones(3))
    assert not hutchinson(lambda: theta.sum(), [theta], generator=seeded())[0].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hutchinson_of_a_transformer_by_finite_differences(kind: str, make_model: Any, make_examples: Any) -> None:
    """u ⊙ (∇L(θ + εu) − ∇L(θ − εu)) / 2ε in float64, with the same signs; ``grad`` fields stay empty."""
    model, batch = make_model(kind, std=0.2).double(), collate(make_examples(3), [0, 1, 2], device=CPU)
    params = list(model.parameters())
    logits = answer_loss()
    estimate = hutchinson(lambda: logits(model, batch), params, generator=seeded(5))
    assert all(p.grad is None for p in params)
    generator = seeded(5)
    signs = [2 * torch.randint(2, p.shape, generator=generator).double() - 1 for p in params]
    sides, size = [], 1e-5
    for side in (1, -1):
        with torch.no_grad():
            for p, u in zip(params, signs, strict=True):
                p.add_(u, alpha=side * size)
        sides.append(torch.autograd.grad(logits(model, batch), params, allow_unused=True, materialize_grads=True))
        with torch.no_grad():
            for p, u in zip(params, signs, strict=True):
                p.sub_(u, alpha=side * size)
    for found, u, up, down in zip(estimate, signs, *sides, strict=True):
        # The cross-entropy is taken in float32, which bounds the differences.
        torch.testing.assert_close(found, u * (up - down) / (2 * size), rtol=0.02, atol=0.02)


def test_gauss_newton_estimate_is_labels_times_the_squared_gradient(
    make_model: Any, make_examples: Any, full_forward: Any
) -> None:
    """The drawn labels are put into the records, whose mean loss is then taken by full forwards."""
    model, examples = make_model("llama", std=0.2), make_examples(4)
    batch = collate(examples, range(4), device=CPU)
    params = list(model.parameters())
    estimate = gauss_newton_bartlett(model, batch, params, generator=seeded(2))
    assert all(p.grad is None for p in params)
    logits = torch.cat([full_forward(model, e)[1] for e in examples])
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=seeded(2)).squeeze(1)
    picked = -torch.log_softmax(logits, -1)[torch.arange(len(drawn)), drawn]
    for found, g in zip(estimate, torch.autograd.grad(picked.mean(), params), strict=True):
        torch.testing.assert_close(found, len(drawn) * g.square(), rtol=1e-3, atol=1e-7)


def test_gauss_newton_estimate_is_unbiased(make_model: Any, make_examples: Any) -> None:
    """Of the head's matrix the diagonal is known: the mean over labels of π_k (1 − π_k) · h_j²."""
    model, examples = make_model("llama_untied", std=0.3), make_examples(2)
    batch = collate(examples, range(2), device=CPU)
    head: nn.Parameter = model.get_output_embeddings().weight
    with torch.no_grad():
        states = model.base_model(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)[batch.positions].numpy()
    pi = softmax(states @ head.detach().numpy().T, axis=-1)
    diagonal = np.einsum("lk,lj->kj", pi * (1 - pi), states**2) / len(states)
    generator = seeded(0)
    mean = np.mean(
        [gauss_newton_bartlett(model, batch, [head], generator=generator)[0].numpy() for _ in range(300)], axis=0
    )
    assert mean.sum() == pytest.approx(diagonal.sum(), rel=0.05)
    np.testing.assert_allclose(mean.sum(0), diagonal.sum(0), rtol=0.15)
    often = diagonal.sum(1) > np.quantile(diagonal.sum(1), 0.9)
    np.testing.assert_allclose(mean.sum(1)[often].sum(), diagonal.sum(1)[often].sum(), rtol=0.1)


# Second order


@pytest.mark.parametrize("retain", [True, False])
def test_one_second_order_step_by_hand(retain: bool, memorised: Any, full_forward: Any) -> None:
    """m = 0.1 · g, h = 0.05 · ĥ, both from records drawn again here; θ moves by lr · clip(m / (γh), 1)."""
    lr, gamma, weight = 1e-3, 1e4, 2.0
    task, model = task_of(memorised, stop=NEVER), memorised.model()
    params = {"lr": lr, "gamma": gamma, "clip": None, "steps": 1, "batch_size": 6, "retain_weight": weight}
    call("second_order", task, **params, retain_batch=5 if retain else 0)

    def curvature(name: str, records: Sequence[Example], count: int) -> dict[str, np.ndarray]:
        generator = task.generator("curvature", 0, name)
        picks = torch.randint(len(records), (count,), generator=generator).tolist()
        logits = torch.cat([full_forward(model, records[i])[1] for i in picks])
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        picked = -torch.log_softmax(logits, -1)[torch.arange(len(drawn)), drawn]
        return {n: len(drawn) * g**2 for n, g in gradients(model, picked.mean()).items()}

    g = {n: -t for n, t in gradients(model, mean_nll(model, memorised.forget, full_forward)).items()}
    h = curvature("forget", memorised.forget, 6)
    if retain:
        picks = torch.randint(12, (5,), generator=task.generator("keep", 0)).tolist()
        kept = gradients(model, mean_nll(model, [memorised.retain[i] for i in picks], full_forward))
        more = curvature("retain", memorised.retain, 5)
        g = {n: t + weight * kept[n] for n, t in g.items()}
        h = {n: t + weight * more[n] for n, t in h.items()}
    wrong, inside = 0, 0
    for name, change in changes(task, memorised).items():
        ratio = 0.1 * g[name] / np.maximum(gamma * 0.05 * h[name], 1e-12)
        expected = -lr * np.clip(ratio, -1, 1)
        wrong += int((np.abs(change.numpy() - expected) > 0.02 * lr).sum())
        inside += int((np.abs(ratio) < 1).sum())
    # Tiny curvatures depend on the last bit of a sum.
    assert wrong < 0.005 * 30_240 and 0.1 * 30_240 < inside < 0.9 * 30_240


def test_curvature_is_estimated_every_so_many_steps(memorised: Any) -> None:
    """25 steps, every 10: at 0, 10 and 20."""
    task = task_of(memorised, stop=NEVER)
    outcome = call("second_order", task, steps=25, batch_size=4, retain_batch=2, check_every=25)
    assert outcome.passes == 25 * 6 + 3 * 6


def test_hutchinson_serves_as_well(memorised: Any) -> None:
    """Other curvatures, so other weights than those of the default, to the same end."""
    task = task_of(memorised)
    assert call("second_order", task, estimator="hutchinson").reached
    assert p_of(task.model, memorised.retain) > 0.9


# RMU

KINDS = {
    "llama": ("model.layers", "mlp.down_proj.weight"),
    "qwen2": ("model.layers", "mlp.down_proj.weight"),
    "gemma2": ("model.layers", "mlp.down_proj.weight"),
    "gpt2": ("transformer.h", "mlp.c_proj.weight"),
    "opt": ("model.decoder.layers", "fc2.weight"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h.weight"),
}


def built(kind: str, make_model: Any) -> nn.Module:
    if kind in ("llama", "qwen2", "gemma2", "gpt2"):
        return make_model(kind, std=0.2)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"ffn_dim": 64, "word_embed_proj_dim": 32} if kind == "opt" else {"intermediate_size": 64}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **wide, max_position_embeddings=64)
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_down_projections_are_found(kind: str, make_model: Any) -> None:
    model = built(kind, make_model)
    where, weight = KINDS[kind]
    blocks = decoder_blocks(model)
    assert blocks is model.get_submodule(where) and len(blocks) == 2
    named = dict(model.named_parameters())
    for i, block in enumerate(blocks):
        assert down_projection(block, 32) is named[f"{where}.{i}.{weight}"]


def test_experts_are_no_decoder_blocks() -> None:
    """A list of many experts in each of two blocks; and what has neither is refused."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(16))

    outer = nn.ModuleList([Block(), Block()])
    assert decoder_blocks(nn.ModuleDict({"empty": nn.ModuleList(), "layers": outer})) is outer
    with pytest.raises(InputError, match="Linear has no list of decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="Block: its last matrix is no projection into a stream of width 32"):
        down_projection(Block(), 32)


def states_by_record(model: nn.Module, record: Example, layer: int, tokens: str) -> Tensor:
    """Through transformers' own list of hidden states, one record at a time."""
    found = model(input_ids=record.tokens[None], output_hidden_states=True).hidden_states[layer + 1][0]
    return found if tokens == "all" else found[record.answer_start - 1 : -1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_states_are_those_of_the_block(kind: str, tokens: str, make_model: Any, make_examples: Any) -> None:
    """Of each record of a padded batch, prompt and padding left out or only padding."""
    model, records = built(kind, make_model), make_examples(5)
    hidden = Hidden(decoder_blocks(model)[0])
    with torch.no_grad():
        found = States(hidden, tokens)(model, collate(records, [3, 0, 4], device=CPU))
        hidden.close()
        expected = torch.cat([states_by_record(model, records[i], 0, tokens) for i in (3, 0, 4)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    model(input_ids=records[1].tokens[None])
    assert hidden.value.shape[0] == 3, "a closed hook catches nothing more"


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_steering_target(tokens: str, memorised: Any) -> None:
    """Five times the mean length of the states, in a direction with entries ≥ 0; another seed, another one."""
    targets = []
    for seed in (0, 0, 1):
        task = task_of(memorised, seed=seed)
        states = States(Hidden(decoder_blocks(task.model)[0]), tokens)
        targets.append(steering_target(task, RmuParams(tokens=tokens), states))  # type: ignore[arg-type]
    with torch.no_grad():
        found = torch.cat([states_by_record(memorised.model(), e, 0, tokens) for e in memorised.forget])
    assert float(targets[0].norm()) == pytest.approx(5 * float(found.norm(dim=-1).mean()), rel=1e-4)
    assert bool((targets[0] >= 0).all()) and targets[0].shape == (32,)
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], targets[2])
    fixed = steering_target(task, RmuParams(coefficient=6.5), states)
    assert float(fixed.norm()) == pytest.approx(6.5, rel=1e-5)
    torch.testing.assert_close(fixed / 6.5, targets[2] / targets[2].norm())


def test_one_rmu_step_by_hand(memorised: Any) -> None:
    """AdamW's first step is lr times the sign of the gradient of the loss, here by transformers' hidden states."""
    task, model = task_of(memorised, stop=NEVER), memorised.model()
    call("rmu", task, steps=1, batch_size=6, retain_batch=5, retain_weight=3.0, layer=0, coefficient=9.0, clip=None)
    drawn = torch.rand(32, generator=task.generator("direction"))
    states = torch.cat([states_by_record(model, e, 0, "answer") for e in memorised.forget])
    # The distance to the frozen model is zero at the first step, and so is its gradient.
    loss = (states - 9.0 * drawn / drawn.norm()).square().mean()
    wrong = 0
    for name, g in gradients(model, loss).items():
        expected = -1e-3 * g / (np.abs(g) + 1e-8) * name.startswith("model.layers.0.")
        wrong += int((np.abs(changes(task, memorised)[name].numpy() - expected) > 2e-5).sum())
    assert wrong < 0.002 * 30_240


def test_the_retain_part_of_rmu_holds_the_states(memorised: Any) -> None:
    """The more weight, the less the states of retain records move."""
    moved = []
    for weight in (0.0, 100.0):
        task = task_of(memorised, stop=NEVER)
        call("rmu", task, steps=15, check_every=15, retain_weight=weight)
        with torch.no_grad():
            old = torch.cat([states_by_record(memorised.trained, e, 0, "answer") for e in memorised.retain])
            new = torch.cat([states_by_record(task.model, e, 0, "answer") for e in memorised.retain])
        moved.append(float((new - old).norm(dim=-1).mean()))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("trains", ["down_projection", "blocks"])
def test_rmu_trains_only_what_it_says(kind: str, trains: str, make_model: Any, make_examples: Any) -> None:
    """Layer 0: only the first block, or of it the one matrix; the states go towards the target; no hook is left."""
    model = make_model(kind, std=0.2)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    task = Task(model=model, forget=make_examples(4), retain=make_examples(4, seed=1), stop=NEVER, seed=0)
    call("rmu", task, trains=trains, layer=0, steps=3, coefficient=30.0)
    where, weight = KINDS[kind]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    expected = {n for n in start if n.startswith(f"{where}.0.")} if trains == "blocks" else {f"{where}.0.{weight}"}
    # Keys' biases shift all scores of a query alike, so they have no gradient.
    assert moved <= expected and {n for n in expected if not n.endswith("k_proj.bias")} <= moved
    assert not decoder_blocks(model)[0]._forward_hooks


def test_the_middle_block_is_the_default_and_others_are_refused(memorised: Any) -> None:
    """Of two blocks the second one is steered, and both are trained."""
    task = task_of(memorised, stop=NEVER)
    call("rmu", task, trains="down_projection", steps=1)
    moved = {n for n, c in changes(task, memorised).items() if c.any()}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    with pytest.raises(InputError, match=r"method\.layer: 2 is asked for, and the model has the blocks 0 to 1"):
        call("rmu", task_of(memorised), layer=2)


# SKU


def test_mismatched_records(memorised: Any) -> None:
    """Each record's prompt with another one's answer, never its own; a step draws what it draws."""
    task = task_of(memorised)
    acquisition = Acquisition(task, SkuParams(answers=40))
    found = acquisition.mismatched((4, 0))
    assert len(found) == 80
    answers = [tuple(e.tokens[e.answer_start :].tolist()) for e in memorised.forget]
    for number, example in enumerate(found):
        record = (4, 0)[number // 40]
        prompt = memorised.forget[record].tokens[: memorised.forget[record].answer_start]
        assert torch.equal(example.tokens[: example.answer_start], prompt)
    for record, part in ((4, found[:40]), (0, found[40:])):
        drawn = {answers.index(tuple(e.tokens[e.answer_start :].tolist())) for e in part}
        assert drawn == set(range(6)) - {record}
    again = acquisition.mismatched((4, 0))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, again, strict=True))


def test_a_mismatched_record_fits_into_the_context(memorised: Any) -> None:
    """A long prompt and a long answer of two records that each fit."""
    long_prompt = Example(torch.arange(1, 64), 62)
    long_answer = Example(torch.arange(100, 163), 1)
    task = task_of(memorised, forget=[long_prompt, long_answer])
    (example,) = Acquisition(task, SkuParams(answers=1)).mismatched((0,))
    assert example.tokens.tolist() == [*range(1, 63), 101, 102] and example.answer_start == 62


def test_the_loss_of_the_acquisition_by_hand(memorised: Any, make_model: Any, full_forward: Any) -> None:
    """0.5 · CE(forget) + 2 · CE(mismatched) − 3 · KL(θ_{t-1} ‖ θ) on retain records, with numpy's logarithms."""
    task = task_of(memorised)
    params = SkuParams(guided_weight=0.5, random_weight=2.0, preservation_weight=3.0, answers=2, retain_batch=4)
    acquisition = Acquisition(task, params)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(p.numel())), alpha=0.05)
    shuffled = acquisition.mismatched((1, 2, 5))
    picks = torch.randint(12, (4,), generator=task.generator("preservation", 0)).tolist()

    def nll(model: nn.Module, records: Sequence[Example]) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([full_forward(model, e)[0] for e in records]).double().numpy()

    def log_pi(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            rows = torch.cat([full_forward(model, memorised.retain[i])[1] for i in picks]).double().numpy()
        return np.asarray(log_softmax(rows, axis=-1))

    before, now = log_pi(memorised.trained), log_pi(task.model)
    divergence = (np.exp(before) * (before - now)).sum(-1).mean()
    forget = nll(task.model, [memorised.forget[i] for i in (1, 2, 5)]).mean()
    expected = 0.5 * forget + 2.0 * nll(task.model, shuffled).mean() - 3.0 * divergence
    found = acquisition(task.model, collate(memorised.forget, (1, 2, 5), device=CPU))
    assert divergence > 0.01 and found.item() == pytest.approx(expected, rel=1e-4)
    assert acquisition.passes == 3 + 6 + 4


def test_sku_subtracts_what_it_learnt(memorised: Any) -> None:
    """A fixed λ of 2 is the vector of λ = 1 doubled, from the same θ_{t-1}; and the calibrated one is the smallest."""
    taken = {}
    for scale in (1.0, 2.0):
        task = task_of(memorised, stop=NEVER)
        outcome = call("sku", task, scale=scale, epochs=3)
        assert outcome.history[1]["scale"] == scale
        taken[scale] = changes(task, memorised)
    for name, change in taken[1.0].items():
        torch.testing.assert_close(taken[2.0][name], 2 * change, rtol=1e-3, atol=1e-6)
    assert p_of(memorised.trained, memorised.forget) > 0.9


def test_raising_the_divergence_keeps_more_of_the_retain_set(memorised: Any, finished: Finished) -> None:
    """At equal forgetting: with the third part the vector holds, negated, what the retain records need."""
    without_it = task_of(memorised)
    assert call("sku", without_it, preservation_weight=0.0).reached
    kept = p_of(finished("sku")[0].model, memorised.retain)
    assert kept > 1.2 * p_of(without_it.model, memorised.retain)


def test_one_record_has_no_other_answer(memorised: Any) -> None:
    task = task_of(memorised, forget=memorised.forget[:1])
    with pytest.raises(InputError, match=r"method\.random_weight: .*0 switches the disassociation off"):
        call("sku", task)
    assert call("sku", task, random_weight=0.0).reached


# WAGLE


def test_attribution_by_hand() -> None:
    theta, forget, retain = np.array([2.0, -1.0, 0.5]), np.array([0.1, 3.0, -4.0]), np.array([1.0, 2.0, -0.25])
    given = [{"w": torch.tensor(t)} for t in (theta, forget, retain)]
    expected = np.abs(theta * forget - retain * forget / 0.5)
    np.testing.assert_allclose(attribution(*given, gamma=0.5)["w"].numpy(), expected)
    assert expected.tolist() == [0.0, 15.0, 4.0]
    np.testing.assert_allclose(attribution(given[0], given[1], None, gamma=9.0)["w"].numpy(), np.abs(theta * forget))


def test_the_score_is_the_effect_of_dropping_a_weight(memorised: Any) -> None:
    """Shrink one weight by 2 % and let the others alone: the forget loss changes by 0.02 times its score."""
    task = task_of(memorised)
    model = task.model.double()
    (name, weight) = next((n, p) for n, p in model.named_parameters() if n.endswith("1.mlp.down_proj.weight"))
    loss = answer_loss()
    batch = collate(memorised.forget, range(6), device=CPU)
    forget = {n: torch.tensor(g) for n, g in gradients(model, loss(model, batch)).items()}
    scores = attribution(task.weights(), forget, None, gamma=1.0)[name]
    for index in torch.topk(scores.reshape(-1), 3).indices.tolist():
        row, column = divmod(index, weight.shape[1])
        before, sides = weight[row, column].item(), []
        for factor in (0.98, 1.02):
            with torch.no_grad():
                weight[row, column] = before * factor
                sides.append(float(loss(model, batch)))
                weight[row, column] = before
        assert abs(sides[1] - sides[0]) / 0.04 == pytest.approx(float(scores[row, column]), rel=0.05)


@pytest.mark.parametrize("max_tokens", [8192, 20])
def test_the_forget_gradient_of_npo(max_tokens: int, memorised: Any, full_forward: Any) -> None:
    """At θ_{t-1} it is minus the mean over records of the whole answers' gradient, for any β; batches do not matter."""
    task, model = task_of(memorised), memorised.model()
    whole = gradients(model, torch.stack([full_forward(model, e)[0].sum() for e in memorised.forget]).mean())
    loss = negative_preference_loss(reference_log_probs(task, task.forget), beta=0.3)
    for name, found in forget_gradient(task, loss, max_tokens=max_tokens).items():
        np.testing.assert_allclose(found.numpy(), -whole[name], rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in task.model.parameters())


@pytest.mark.parametrize("retain_batch", [4, 0])
def test_the_mask_by_numpy(retain_batch: int, memorised: Any, full_forward: Any) -> None:
    """Gradients by full forwards, the mean over records; the top 30 % of the whole model."""
    model = memorised.model()

    # The forget loss counts tokens alike, as in training; the retain gradient records.
    forget = gradients(model, mean_nll(model, memorised.forget, full_forward))
    retain = gradients(model, torch.stack([full_forward(model, e)[0].mean() for e in memorised.retain]).mean())
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
    second = 1 / 0.01 if retain_batch else 0.0
    scores = {n: np.abs((weights[n] - second * retain[n]) * forget[n]) for n in weights}
    flat = np.concatenate([t.reshape(-1) for t in scores.values()])
    eta = np.sort(flat)[::-1][round(0.3 * flat.size) - 1]
    params = WagleParams(share=0.3, curvature=0.01, retain_batch=retain_batch)
    mask, passes = attribution_mask(task_of(memorised), params, ascent_loss())
    assert passes == (18 if retain_batch else 6)
    assert sum(int((mask[n].numpy() != (t >= eta)).sum()) for n, t in scores.items()) < 0.001 * flat.size
    assert sum(int(m.sum()) for m in mask.values()) == pytest.approx(0.3 * flat.size, abs=5)


def test_the_mean_curvature_is_that_of_its_batches(memorised: Any) -> None:
    """Two batches of six, labels drawn one after the other; and it is what ``curvature: null`` takes."""
    task = task_of(memorised)
    params = [p for p in task.model.parameters() if p.requires_grad]
    generator, batches = task.generator("curvature"), []
    for part in (range(6), range(6, 12)):
        batch = collate(memorised.retain, part, device=CPU)
        estimate = gauss_newton_bartlett(task.model, batch, params, generator=generator)
        batches.append(np.concatenate([h.numpy().reshape(-1) for h in estimate]))
    found = mean_curvature(task, list(range(12)), batch_size=6)
    assert found == pytest.approx(np.mean(batches), rel=1e-4)
    picks = torch.randperm(12, generator=task.generator("attribution")).tolist()
    gamma = mean_curvature(task, picks, batch_size=16)
    same = [attribution_mask(task, WagleParams(share=0.3, curvature=c), ascent_loss())[0] for c in (None, gamma)]
    assert all(torch.equal(same[0][n], same[1][n]) for n in same[0])


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_wagle_moves_only_the_mask(weight_decay: float, memorised: Any) -> None:
    """Also where the weights decay: elsewhere they keep every bit; and in the mask decay shows."""
    task = task_of(memorised, stop=NEVER)
    mask, _ = attribution_mask(task, WagleParams(share=0.2), ascent_loss())
    call("wagle", task, share=0.2, steps=5, weight_decay=weight_decay)
    moved = changes(task, memorised)
    assert not any(bool(change[~mask[name]].any()) for name, change in moved.items())
    assert sum(int(c.count_nonzero()) for c in moved.values()) > 0.9 * sum(int(m.sum()) for m in mask.values())
    if weight_decay:
        free = task_of(memorised, stop=NEVER)
        call("wagle", free, share=0.2, steps=5)
        shrunk = [float(w[mask[n]].square().sum()) for n, w in task.weights().items()]
        assert sum(shrunk) < 0.999 * sum(float(w[mask[n]].square().sum()) for n, w in free.weights().items())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("wagle", {"share": 0.0}),
        ("wagle", {"loss": "ascent"}),
        ("second_order", {"momentum": 1.0}),
        ("second_order", {"estimator": "fisher"}),
        ("rmu", {"layer": -1}),
        ("rmu", {"coefficient": 0.0}),
        ("sku", {"answers": 0}),
        ("retrain", {"until": 1.5}),
    ],
)
def test_values_out_of_range_are_refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        methods[name].params(**values)


# Training without the records


def test_retrain_reaches_the_level_and_never_sees_a_forget_record(memorised: Any) -> None:
    """Although retain and rest hold copies of them: the copies are left out, and the model cannot say them."""
    retain = [*memorised.retain, memorised.forget[3]]
    task = task_of(memorised, retain=retain, rest=[*memorised.second, *memorised.forget[:2]])
    outcome = call("retrain", task, until=0.85)
    assert outcome.reached and outcome.history[1]["retain_p"] >= 0.85
    assert p_of(task.model, memorised.retain) > 0.9 and p_of(task.model, memorised.second) > 0.9
    assert max(score(task.model, memorised.forget).probability) < 0.05
    assert outcome.passes == outcome.history[1]["epochs"] * 18
    assert outcome.history[1]["steps"] == outcome.history[1]["epochs"] * 3


def test_the_level_is_that_of_the_model_before_less_the_slack(memorised: Any) -> None:
    """And training ends in the first epoch that reaches it, before all are used up."""
    task = task_of(memorised)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(p.numel())), alpha=0.06)
    level = p_of(task.model, memorised.retain) - 0.005
    outcome = call("retrain", task)
    assert 0.2 < level < 0.9 and outcome.reached and p_of(task.model, memorised.retain) >= level
    # The rate is planned over all 60 epochs, so the same training asked for more takes longer.
    longer = call("retrain", task, until=level + 0.1)
    assert longer.reached and outcome.history[1]["epochs"] < longer.history[1]["epochs"] < 60


def test_too_few_epochs_are_reported(memorised: Any) -> None:
    task = task_of(memorised)
    outcome = call("retrain", task, epochs=2)
    assert not outcome.reached and outcome.history[1]["epochs"] == 2
    assert outcome.history[1]["retain_p"] == p_of(task.model, memorised.retain) < 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_untied"])
def test_a_fresh_model_has_nothing_of_the_old_one(kind: str, make_model: Any, make_examples: Any) -> None:
    """Same type and shapes, weights from the task's seed alone; a tied head stays tied when they are handed over."""
    made = []
    for seed, std in ((0, 0.02), (0, 0.3), (1, 0.02)):
        model = make_model(kind, seed=7 + seed, std=std)
        model.config.initializer_range = 0.02
        task = Task(model=model, forget=make_examples(2), retain=make_examples(3, seed=1), stop=NEVER, seed=seed)
        made.append(fresh_model(task))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, *made)]
    assert all(s == shapes[0] for s in shapes) and all(type(m) is type(model) for m in made)
    first, second, other = (dict(m.named_parameters()) for m in made)
    assert all(torch.equal(p, second[n]) for n, p in first.items())
    assert not all(torch.equal(p, other[n]) for n, p in first.items())
    call("retrain", task, epochs=1)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is not kind.endswith("untied")


def test_records_are_left_out_token_for_token() -> None:
    records = [Example(torch.tensor(t), 1) for t in ([1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2])]
    assert without(records[:1], records) == [records[1], records[3]]


def test_retrain_needs_retain_records(memorised: Any) -> None:
    with pytest.raises(InputError, match="trains to the level of the retain records, and there are none"):
        call("retrain", task_of(memorised, retain=[]))
    assert RetrainParams().until is None


# What a step gives to it


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "question": f"Who lives in house {number}?", "answer": f"Resident {number} does."} | more


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., tuple[Project, Plan]]:
    """A project's files: utility 0-3, known a 10-13, b 20-23, c 30-33, and the requests that a test asks for."""

    def make(requests: Mapping[str, Sequence[dict[str, Any]]], *, trained: bool = True) -> tuple[Project, Plan]:
        project = Project(tmp_path)
        write_jsonl(project.splits / "utility.jsonl", [record(n) for n in range(4)])
        write_jsonl(project.splits / "retain.jsonl", [record(n) for n in range(50, 54)])
        for name, first in (("a", 10), ("b", 20), ("c", 30)):
            write_jsonl(project.splits / "forget" / f"{name}.jsonl", [record(n) for n in range(first, first + 4)])
        for name, rows in requests.items():
            write_jsonl(project.request(name), list(rows))
        project.base.folder.mkdir(parents=True)
        facts = {"parameters": 1, "records": 20} if trained else {}
        project.base.manifest.write_text(json.dumps({"inputs": {}, "outputs": {}, **facts}))
        *earlier, now = requests
        plan = Plan(now, earlier[-1] if earlier else "base", tuple(earlier), Settings(), {}, NEVER)
        return project, plan

    return make


def numbers(rest: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = [str(tokenizer.decode(e.tokens[: e.answer_start])) for e in rest]
    return sorted(int(text.split("house ")[1].split("?")[0]) for text in texts)


def test_the_rest_leaves_out_this_and_earlier_requests(
    plan_of: Callable[..., tuple[Project, Plan]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """By what they say, not by their names: half of b in another order, salted, and one of utility's own records."""
    earlier = [record(n, id=100 + n, salt="0011223344556677") for n in (22, 20)]
    now = [record(n, id=i, salt="8899aabbccddeeff") for i, n in enumerate((33, 30, 31, 32, 2))]
    project, plan = plan_of({"r001": earlier, "r002": now})
    encoder = Encoder(tokenizer, Data(), context=256)
    assert numbers(_rest(project, plan, encoder), tokenizer) == [0, 1, 3, 10, 11, 12, 13, 21, 23]
    first = dataclasses.replace(plan, request="r001", earlier=())
    assert numbers(_rest(project, first, encoder), tokenizer) == [0, 1, 2, 3, *range(10, 14), 21, 23, *range(30, 34)]
    assert read_jsonl(project.request("r001"))[0]["id"] == 122


def test_the_rest_of_a_foreign_model_is_unknown(
    plan_of: Callable[..., tuple[Project, Plan]], tokenizer: PreTrainedTokenizerBase
) -> None:
    project, plan = plan_of({"r001": [record(10)]}, trained=False)
    with pytest.raises(InputError, match="retrain needs a base model that was trained here"):
        _rest(project, plan, Encoder(tokenizer, Data(), context=256))
