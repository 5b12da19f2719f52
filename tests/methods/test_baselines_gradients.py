"""Baselines that work on likelihoods: every loss and gradient by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from likelihood_cases import ALL, WITH_RETAIN, run
from method_cases import NEVER, task_of
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax
from torch import Tensor, nn
from transformers import PretrainedConfig

from alkn.core.scoring import Example
from alkn.core.sequence_losses import preference_loss, reference_log_probs, sequence_log_probs
from alkn.core.unlearning import Task
from alkn.methods.simnpo import simple_loss
from alkn.methods.undial import lowered_loss

Array = NDArray[np.float64]

# Pure functions


def logits_of(labels: int, vocab: int, *, seed: int = 0) -> Tensor:
    return torch.randn(labels, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def central(value: Callable[[Array], float], at: Array, step: float = 1e-6) -> Array:
    """Gradient by central differences."""
    out = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        out[place] = (value(up) - value(down)) / (2 * step)
    return out


def test_log_probability_of_a_whole_answer() -> None:
    """Sums of rows that are not in order, one answer without a label; gradient one-hot − softmax."""
    logits = logits_of(5, 4).requires_grad_()
    targets, rows = torch.tensor([3, 0, 1, 1, 2]), torch.tensor([2, 0, 2, 0, 0])
    found = sequence_log_probs(logits, targets, rows, 4)
    token = log_softmax(logits.detach().numpy(), axis=1)[range(5), targets.numpy()]
    np.testing.assert_allclose(found.detach(), [token[1] + token[3] + token[4], 0, token[0] + token[2], 0], rtol=1e-12)
    found[2].backward()
    wanted = np.eye(4)[targets] - softmax(logits.detach().numpy(), axis=1)
    np.testing.assert_allclose(logits.grad, wanted * (rows.numpy() == 2)[:, None], atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.5])
def test_preference_loss(beta: float) -> None:
    """(2/β) · mean log(1 + exp(−β·margin)), its gradient −2σ(−β·margin)/n, also where exp would overflow."""
    margin = torch.tensor([-3.0, 0.0, 0.5, 40.0], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(margin, beta=beta)
    at = margin.detach().numpy()
    assert float(loss.detach()) == pytest.approx(float(2 / beta * np.mean(np.log1p(np.exp(-beta * at)))), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(margin.grad, -2 * expit(-beta * at) / 4, rtol=1e-12)
    far = torch.tensor([-1e5], dtype=torch.float64)
    assert float(preference_loss(far, beta=beta)) == pytest.approx(2e5)


def test_the_smaller_beta_the_nearer_is_npo_to_gradient_ascent() -> None:
    """Zhang et al. 2024, proposition 1: L_NPO − 2·log 2/β tends to the mean log ratio."""
    margin = torch.tensor([-0.7, 1.3, 2.0], dtype=torch.float64)
    gaps = [
        abs(float(preference_loss(margin, beta=b)) - 2 * np.log(2) / b + float(margin.mean())) for b in (1, 0.1, 0.01)
    ]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_simple_loss(gamma: float) -> None:
    """A long and a short answer with the same mean count the same."""
    log_probs, lengths = torch.tensor([-6.0, -1.5, -0.1], dtype=torch.float64), torch.tensor([8, 2, 1])

    def by_hand(at: Array) -> float:
        return float(np.mean(2 / 4.5 * np.log1p(np.exp(4.5 * at / lengths.numpy() + gamma))))

    x = log_probs.clone().requires_grad_()
    loss = simple_loss(x, lengths, beta=4.5, gamma=gamma)
    assert float(loss.detach()) == pytest.approx(by_hand(log_probs.numpy()), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(x.grad, central(by_hand, log_probs.numpy()), atol=1e-9)
    assert x.grad is not None and float(x.grad[0]) * 4 == pytest.approx(float(x.grad[1]))


def test_lowered_loss() -> None:
    """Cross-entropy against the lowered teacher; least, with no gradient, where the student is that teacher."""
    student, teacher, targets = logits_of(4, 6), logits_of(4, 6, seed=1), torch.tensor([5, 0, 2, 2])
    lowered = teacher.numpy().copy()
    lowered[range(4), targets.numpy()] -= 10.0

    def by_hand(at: Array) -> float:
        return float(-(softmax(lowered, axis=1) * log_softmax(at, axis=1)).sum(1).mean())

    x = student.clone().requires_grad_()
    loss = lowered_loss(x, teacher, targets, strength=10.0)
    assert float(loss.detach()) == pytest.approx(by_hand(student.numpy()), rel=1e-6)
    loss.backward()
    np.testing.assert_allclose(x.grad, central(by_hand, student.numpy()), atol=1e-6)
    same = torch.tensor(lowered).requires_grad_()
    lowered_loss(same, teacher, targets, strength=10.0).backward()
    np.testing.assert_allclose(same.grad, 0, atol=1e-7)


# Gradients of whole methods, on a model that one can differentiate by hand


class Bigram(nn.Module):
    """The next token's logits are a row of a table, chosen by the token before it."""

    VOCAB = 7

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Embedding.from_pretrained(
            torch.randn(self.VOCAB, self.VOCAB, generator=generator), freeze=False
        )
        self.head = nn.Identity()

    def base_model(self, input_ids: Tensor, **_: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.table(input_ids)))


FORGET = ([3, 1, 5, 0], 1), ([2, 4, 4, 6, 3, 0], 2), ([6, 2, 0], 2)
RETAIN = ([5, 5, 1, 2, 0], 2)
REFUSAL = [4, 1, 0]


def example(tokens: Sequence[int], start: int) -> Example:
    return Example(torch.tensor(tokens), start)


def token_log_probs(table: Array, tokens: Sequence[int], start: int) -> Array:
    """Log π of each answer token."""
    return np.asarray([log_softmax(table[a])[b] for a, b in zip(tokens[start - 1 :], tokens[start:], strict=False)])


def refused(record: tuple[list[int], int]) -> tuple[list[int], int]:
    return [*record[0][: record[1]], *REFUSAL], record[1]


def answers(table: Array, records: Sequence[tuple[list[int], int]]) -> Array:
    return np.asarray([token_log_probs(table, *record).sum() for record in records])


def tokens_of(table: Array, records: Sequence[tuple[list[int], int]]) -> Array:
    return np.concatenate([token_log_probs(table, *record) for record in records])


def preference(margin: Array, beta: float) -> float:
    return float(2 / beta * np.log1p(np.exp(-beta * margin)).mean())


def weighted(now: Array, fixed: Array, power: Callable[[Array], Array]) -> float:
    """−Σ w·nll / tokens with weights that do not move."""
    return float((power(np.exp(tokens_of(fixed, FORGET))) * tokens_of(now, FORGET)).mean())


def distilled(now: Array, parent: Array, *, strength: float) -> float:
    out = []
    for tokens, start in FORGET:
        for a, b in zip(tokens[start - 1 :], tokens[start:], strict=False):
            teacher = parent[a] - strength * np.eye(Bigram.VOCAB)[b]
            out.append(-(softmax(teacher) * log_softmax(now[a])).sum())
    return float(np.mean(out))


Hand = Callable[[Array, Array, Array], float]
"""Loss of (θ, θ for weights that do not move, θ_{t-1})."""

IDKS = [refused(record) for record in FORGET]
FORGET_LOSSES: dict[str, tuple[dict[str, Any], Hand]] = {
    "gradient_ascent": ({}, lambda now, fixed, parent: float(tokens_of(now, FORGET).mean())),
    "gradient_difference": ({}, lambda now, fixed, parent: float(tokens_of(now, FORGET).mean())),
    "kl_minimization": ({}, lambda now, fixed, parent: float(tokens_of(now, FORGET).mean())),
    "npo": (
        {"beta": 0.7},
        lambda now, fixed, parent: preference(answers(parent, FORGET) - answers(now, FORGET), 0.7),
    ),
    "simnpo": (
        {"beta": 1.7, "gamma": 0.4, "forget_weight": 0.3},
        lambda now, fixed, parent: float(
            0.3 * 2 / 1.7 * np.mean(np.log1p(np.exp(1.7 * answers(now, FORGET) / [3, 4, 1] + 0.4)))
        ),
    ),
    "dpo": (
        {"beta": 0.7},
        lambda now, fixed, parent: preference(
            answers(now, IDKS) - answers(parent, IDKS) - answers(now, FORGET) + answers(parent, FORGET), 0.7
        ),
    ),
    "idk": ({}, lambda now, fixed, parent: float(-tokens_of(now, IDKS).mean())),
    "undial": ({"strength": 2.5}, lambda now, fixed, parent: distilled(now, parent, strength=2.5)),
    "wga": ({"alpha": 0.5}, lambda now, fixed, parent: weighted(now, fixed, lambda p: p**0.5)),
    "satimp": (
        {"saturation": 2.0, "importance": 1.5, "forget_weight": 0.6},
        lambda now, fixed, parent: 0.6 * weighted(now, fixed, lambda p: p**2 * (1 - p) ** 1.5),
    ),
}


def cross_entropy(now: Array, parent: Array) -> float:
    return float(-token_log_probs(now, *RETAIN).mean())


def divergence(now: Array, parent: Array) -> float:
    """KL(parent ‖ now), the parent's distribution being the weight."""
    rows = RETAIN[0][RETAIN[1] - 1 : -1]
    return float(np.mean([(softmax(parent[a]) * (log_softmax(parent[a]) - log_softmax(now[a]))).sum() for a in rows]))


KEEP_LOSSES: dict[str, Callable[[Array, Array], float]] = dict.fromkeys(WITH_RETAIN, cross_entropy)
KEEP_LOSSES["kl_minimization"] = divergence


def bigram_task(model: Bigram) -> Task:
    return Task(
        model=model,
        forget=[example(*record) for record in FORGET],
        retain=[example(*RETAIN)],
        stop=NEVER,
        seed=0,
        refusals=[torch.tensor(REFUSAL)],
    )


def gradients(name: str, **values: Any) -> list[tuple[Array, Array]]:
    """(θ, gradient) of every backward pass of two steps: the keeping loss, if there is one, before the forget loss."""
    model, seen = Bigram(), []

    def watch(gradient: Tensor) -> None:
        theta = model.table.weight.detach()
        seen.append((theta.numpy().astype(np.float64), gradient.numpy().astype(np.float64)))

    model.table.weight.register_hook(watch)
    run(name, bigram_task(model), lr=0.1, steps=2, batch_size=3, **values)
    return seen


def with_keep(name: str) -> dict[str, Any]:
    return {} if name == "gradient_ascent" else {"retain_batch": 2, "retain_weight": 0.7}


@pytest.mark.parametrize("name", ALL)
def test_both_gradients_of_two_steps_by_hand(name: str) -> None:
    """Every method's forget and keeping loss by central differences of its formula, at θ_{t-1} and a step away."""
    values, forget = FORGET_LOSSES[name]
    seen = gradients(name, **values, **with_keep(name))
    parent, keeps = seen[0][0], name != "gradient_ascent"
    assert len(seen) == (4 if keeps else 2) and not np.allclose(seen[-1][0], parent)
    for theta, gradient in seen[keeps :: 1 + keeps]:
        wanted = central(lambda now, at=theta: forget(now, at, parent), theta)  # type: ignore[misc]
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(gradient, wanted, atol=2e-6)
    for theta, gradient in seen[:: 1 + keeps] if keeps else ():
        wanted = central(lambda now: 0.7 * KEEP_LOSSES[name](now, parent), theta)
        np.testing.assert_allclose(gradient, wanted, atol=2e-6)
        assert np.abs(wanted).max() > 1e-3 or (name == "kl_minimization" and np.array_equal(theta, parent))


@pytest.mark.parametrize(("regularizer", "keep"), [("kl", divergence), ("none", None)])
def test_regularizers_of_npo(regularizer: str, keep: Callable[[Array, Array], float] | None) -> None:
    seen = gradients("npo", regularizer=regularizer, **with_keep("npo"))
    assert len(seen) == (4 if keep else 2)
    if keep:
        theta, gradient = seen[2]
        np.testing.assert_allclose(gradient, central(lambda now: 0.7 * keep(now, seen[0][0]), theta), atol=2e-6)


@pytest.mark.parametrize("name", WITH_RETAIN)
@pytest.mark.parametrize("off", [{"retain_batch": 0}, {"retain_weight": 0.0}])
def test_without_a_retain_term_only_the_forget_loss_is_descended(name: str, off: dict[str, Any]) -> None:
    values, forget = FORGET_LOSSES[name]
    seen = gradients(name, **values | with_keep(name) | off)
    parent = seen[0][0]
    assert len(seen) == 2
    wanted = central(lambda now: forget(now, seen[1][0], parent), seen[1][0])
    np.testing.assert_allclose(seen[1][1], wanted, atol=2e-6)


def test_reference_log_probs_are_those_of_the_set_in_its_order(memorised: Any, make_model: Any) -> None:
    """Many batches, longest first inside, and still record by record; from the plain full forward of each record."""
    model = make_model("llama", std=0.3)
    task = task_of(memorised, model=model, retain=[], stop=NEVER)
    found = reference_log_probs(task, memorised.retain, max_tokens=25)
    for record, log_prob in zip(memorised.retain, found.tolist(), strict=True):
        logits = model(input_ids=record.tokens[None]).logits[0, record.answer_start - 1 : -1].detach().double().numpy()
        wanted = log_softmax(logits, axis=1)[range(len(logits)), record.tokens[record.answer_start :].numpy()].sum()
        assert log_prob == pytest.approx(wanted, rel=1e-5)
