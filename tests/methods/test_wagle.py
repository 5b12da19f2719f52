"""WAGLE: attribution, mask and curvature by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from baseline_cases import call, gradients, mean_nll
from method_cases import CPU, NEVER, changes, task_of

from alkn.core.scoring import collate
from alkn.core.sequence_losses import ascent_loss, negative_preference_loss, reference_log_probs
from alkn.core.sophia import gauss_newton_bartlett
from alkn.core.training import answer_loss
from alkn.methods.forget_loss import forget_loss
from alkn.methods.wagle import WagleParams, attribution, attribution_mask, forget_gradient, mean_curvature


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


def test_npo_a_token_by_hand(memorised: Any, full_forward: Any) -> None:
    """−(2/β) · mean log σ(β · mean over tokens of log π_{t-1} − log π), by full forwards of both models."""
    task, beta = task_of(memorised), 0.7
    loss = forget_loss(task, "npo", beta=beta)
    old = [full_forward(task.model, e)[0].mean().item() for e in memorised.forget]
    with torch.no_grad():
        for number, p in enumerate(task.model.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        new = [full_forward(task.model, e)[0].mean().item() for e in memorised.forget]
        found = float(loss(task.model, collate(memorised.forget, range(6), device=CPU)))
    margins = np.array(new) - np.array(old)
    assert len({e.answer_length for e in memorised.forget}) > 1 and np.abs(margins).max() > 0.1
    assert found == pytest.approx(np.mean(2 / beta * np.log1p(np.exp(-beta * margins))), rel=1e-4)


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
