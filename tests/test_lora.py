"""Adapters against arithmetic by hand on three architectures, and methods that train them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alkn import registry
from alkn.core.scoring import answer_logits, collate, score
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.core.unlearning import Forgetting, Outcome, StopRule, Task
from alkn.errors import InputError
from alkn.files import digest_of, read_json
from alkn.lora import Adapters, Lora, linear_layers
from alkn.models import load_model
from alkn.project import Project
from alkn.settings import Settings, validate_settings
from alkn.step import make_step

ARCHITECTURES = ("llama", "gpt2_untied", "qwen2")
STOP = StopRule(p=0.05, exact_memorization=0.2)
CPU = torch.device("cpu")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fill(model: nn.Module, *, seed: int = 0) -> None:
    """Adapters as if they had been trained: every B drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def by_hand(
    kind: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor], scale: float
) -> dict[str, np.ndarray[Any, Any]]:
    """W + scale · B · A of every layer that has an A, in numpy; GPT-2's W is [in, out]."""
    out = {name: t.numpy().copy() for name, t in before.items()}
    for name, a in now.items():
        if ".lora_A." in name:
            layer = name.split(".lora_A.")[0]
            b = now[name.replace(".lora_A.", ".lora_B.")]
            change = scale * b.numpy() @ a.numpy()
            out[f"{layer}.weight"] += change.T if kind.startswith("gpt2") else change
    return out


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_merged_model_is_the_base_plus_the_scaled_product(
    kind: str, make_model: Callable[..., nn.Module], make_examples: Callable[..., list[Any]]
) -> None:
    """Names, tying and everything outside the blocks as before; the adapted forward is the merged one."""
    model = make_model(kind).double()
    examples = make_examples(3)
    batch = collate(examples, [0, 1, 2], device=CPU)
    before, plain = weights(model), answer_logits(model, batch).detach()

    adapters = Adapters(model, Lora(rank=3, alpha=6.0), seed=1)
    assert torch.equal(answer_logits(model, batch), plain), "B is zero at the start"
    fill(model)
    wanted = by_hand(kind, before, weights(model), 2.0)
    adapted = answer_logits(model, batch).detach()
    assert (adapted - plain).abs().max() > 1e-3
    adapters.merge()

    after = weights(model)
    assert list(after) == list(before)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {f"{name}.weight" for name in linear_layers(model)}
    assert len(moved) == (8 if kind.startswith("gpt2") else 14)
    for name, tensor in after.items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(answer_logits(model, batch), adapted, rtol=0, atol=1e-10)
    assert all(p.requires_grad for p in model.parameters())
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == (kind != "gpt2_untied")
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("train", ["b", "both"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_only_adapters_move(
    kind: str, train: Any, make_model: Callable[..., nn.Module], make_examples: Callable[..., list[Any]]
) -> None:
    """With decay on, which moves whatever the optimizer holds."""
    model, examples = make_model(kind), make_examples(8)
    Adapters(model, Lora(rank=2, train=train), seed=0)
    before = weights(model)
    fine_tune(
        model,
        examples,
        Hyperparameters(lr=1e-2, epochs=2, batch_size=4, weight_decay=0.1),
        loss=answer_loss(),
        generator=torch.Generator().manual_seed(0),
    )
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    trained = (".lora_B.", ".lora_A.") if train == "both" else (".lora_B.",)
    assert moved == {name for name in before if any(part in name for part in trained)}
    assert moved


def test_the_seed_decides_a_and_nothing_else_is_drawn(make_model: Callable[..., nn.Module]) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = make_model("llama")
        Adapters(model, Lora(rank=4), seed=seed)
        return {name: t for name, t in weights(model).items() if ".lora_A." in name}

    state = torch.get_rng_state()
    first, again, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_targets_are_chosen_by_name(make_model: Callable[..., nn.Module]) -> None:
    model = make_model("qwen2")
    Adapters(model, Lora(rank=2, targets=("q_proj", "down_proj")), seed=0)
    layers = {name.split(".lora_A.")[0] for name in weights(model) if ".lora_A." in name}
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"q_proj", "down_proj"} and len(layers) == 4


@pytest.mark.parametrize(("kind", "target"), [("llama", "lm_head"), ("llama", "embed_tokens"), ("gpt2", "q_proj")])
def test_a_target_that_is_no_linear_layer_of_the_blocks_is_refused(
    kind: str, target: str, make_model: Callable[..., nn.Module]
) -> None:
    model = make_model(kind)
    before = list(weights(model))
    with pytest.raises(InputError, match=f"lora.targets: .*{'c_proj' if kind == 'gpt2' else 'v_proj'}.*found {target}"):
        Adapters(model, Lora(rank=2, targets=(target,)), seed=0)
    assert list(weights(model)) == before


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_measured_is_the_merged_model_at_its_stored_precision(
    kind: str, make_model: Callable[..., nn.Module], make_examples: Callable[..., list[Any]]
) -> None:
    """Against a second model whose weights are computed by hand and rounded; afterwards every bit is as it was."""
    model, examples = make_model(kind, std=1.0), make_examples(6)
    second = copy.deepcopy(model)
    before = weights(model)
    adapters = Adapters(model, Lora(rank=2, alpha=2.0), seed=0)
    fill(model, seed=2)
    wanted = by_hand(kind, before, weights(model), 1.0)
    layers = {f"{name}.weight" for name in linear_layers(second)}
    with torch.no_grad():
        for name, p in second.named_parameters():
            merged = torch.from_numpy(wanted[name])
            p.copy_(merged.bfloat16().float() if name in layers else merged)
    expected = Forgetting.of(score(second, examples))

    task = Task(model, examples, (), STOP, 0, stored=torch.bfloat16)
    task.as_stored = lambda: adapters.as_stored(torch.bfloat16)
    exact, unrounded = weights(model), Forgetting.of(score(model, examples))
    for now in (task.measure_stored()[0], task.measure()[0]):
        assert now.p == pytest.approx(expected.p, rel=1e-5)
    assert abs(expected.p - unrounded.p) > 1e-3 * expected.p, "else this test says nothing about rounding"
    task.round_weights()
    after = weights(model)
    assert all(torch.equal(after[name], exact[name]) for name in exact)


def adapted(memorised: Any, **lora: Any) -> tuple[Task, Adapters]:
    refusals = [torch.tensor([9, 250, 31, 0]), torch.tensor([77, 8, 120, 64, 0])]
    task = Task(memorised.model(), memorised.forget, memorised.retain, STOP, 0, refusals=refusals)
    adapters = Adapters(task.model, Lora(**{"rank": 4, **lora}), seed=1)
    task.linear = lora.get("train", "b") == "b"
    return task, adapters


def call(name: str, task: Task, **params: Any) -> Outcome:
    entry = registry.methods[name]
    outcome: Outcome = entry.call(task, entry.params(**params))
    return outcome


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "interleaved": ("alkn", {"lr": 1e-2, "rehearsal": 32, "decay_steps": 60}),
    "rounds": ("alkn", {"preset": "rounds", "lr": 1e-2, "batch_size": 4}),
    "task_vector": ("task_vector", {"lr": 1e-2, "batch_size": 4}),
    "derived": ("alkn", {"preset": "derived", "lr": 1e-2, "batch_size": 4}),
    "paper": ("alkn", {"preset": "paper", "lr": 1e-2, "batch_size": 4, "scale": None}),
    "gradient_ascent": ("gradient_ascent", {"lr": 5e-3}),
    "gradient_difference": ("gradient_difference", {"lr": 5e-3}),
    "kl_minimization": ("kl_minimization", {"lr": 5e-3}),
    "npo": ("npo", {"lr": 5e-3}),
    "simnpo": ("simnpo", {"lr": 2e-2, "beta": 0.5, "forget_weight": 1.0}),
    "dpo": ("dpo", {"lr": 2e-2}),
    "idk": ("idk", {"lr": 5e-3, "steps": 100}),
    "undial": ("undial", {"lr": 1e-2, "strength": 25.0, "steps": 100}),
    "wga": ("wga", {"lr": 5e-3}),
    "satimp": ("satimp", {"lr": 1e-2, "saturation": 1.0, "forget_weight": 1.0}),
    "rmu": ("rmu", {"lr": 1e-2, "trains": "blocks"}),
    "sku": ("sku", {"lr": 1e-2, "epochs": 20}),
    "wagle": ("wagle", {"lr": 5e-3, "loss": "gradient_difference"}),
    "second_order": ("second_order", {"lr": 5e-3}),
}
END_ABOVE = ("idk", "undial")
"""They copy an answer or a teacher, which stops them above these targets; see test_baselines_likelihood.py."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_forgets_by_adapters_alone(name: str, memorised: Any) -> None:
    """The model knew all; merged, it has its own parameters again and scores what the method measured."""
    task, adapters = adapted(memorised)
    before = weights(memorised.trained)
    method, params = METHODS[name]
    outcome = call(method, task, **params)
    adapters.merge()
    after = weights(task.model)
    now = Forgetting.of(score(task.model, memorised.forget))
    assert outcome.history[0]["p"] > 0.9 and now.p < 0.1
    assert outcome.reached is STOP.met(now) is (name not in END_ABOVE)
    assert outcome.history[-1]["p"] == pytest.approx(now.p, abs=1e-4)
    assert list(after) == list(before)
    for layer, tensor in after.items():
        rank = np.linalg.matrix_rank((tensor - before[layer]).double().numpy(), tol=1e-4) if tensor.dim() == 2 else 0
        assert rank <= 4, layer
        assert torch.equal(tensor, before[layer]) or f"{layer.removesuffix('.weight')}" in linear_layers(task.model)
    if name in ("interleaved", "gradient_difference"):
        assert float(score(task.model, memorised.retain).probability.mean()) > 0.5


def test_no_method_is_left_out() -> None:
    ours = {name for name, entry in registry.methods.items() if entry.call.__module__.startswith("alkn.")}
    assert {method for method, _ in METHODS.values()} == ours - {"retrain"}


@pytest.mark.parametrize("name", ["task_vector", "rounds", "derived", "sku"])
def test_scaling_is_refused_where_both_factors_are_trained(name: str, memorised: Any) -> None:
    task, _ = adapted(memorised, train="both")
    method, params = METHODS[name]
    with pytest.raises(InputError, match="lora.train: .* not linear .*expected 'b'; found 'both'"):
        call(method, task, **params)


def test_both_factors_can_be_descended(memorised: Any) -> None:
    task, adapters = adapted(memorised, train="both")
    assert call("gradient_difference", task, lr=1e-2).reached
    adapters.merge()
    assert STOP.met(Forgetting.of(score(task.model, memorised.forget)))


def test_a_negation_is_exact_in_the_merged_weights(memorised: Any) -> None:
    """θ − λ(θ_ft − θ) of the merged weights, from θ and a θ_ft that were merged apart."""
    start = weights(memorised.trained)
    learnt, adapters = adapted(memorised)
    hp = Hyperparameters(lr=1e-2, epochs=2, batch_size=6, clip=1.0)
    fine_tune(learnt.model, learnt.forget, hp, loss=answer_loss(), generator=learnt.generator("order"))
    adapters.merge()
    theta_ft = weights(learnt.model)

    task, adapters = adapted(memorised)
    call("task_vector", task, lr=1e-2, epochs=2, batch_size=6, scale=3.0)
    adapters.merge()
    for name, tensor in weights(task.model).items():
        torch.testing.assert_close(tensor, start[name] - 3.0 * (theta_ft[name] - start[name]), rtol=0, atol=1e-5)


def test_used_coordinates_are_those_of_the_adapters(memorised: Any) -> None:
    """M goes from step to step for adapters of one rank, and is empty for those of another."""
    params = {"preset": "rounds", "overlap": "gradient_std", "criterion": "m", "steps": 1, "lr": 1e-2}
    task, _ = adapted(memorised)
    state = call("alkn", task, **params).state
    assert state and set(state) == {f"mask.{name}" for name in task.weights()}
    from alkn.methods.alkn_params import AlknParams, previous_mask

    same, _ = adapted(memorised)
    other, _ = adapted(memorised, rank=2)
    same.state, other.state = state, state
    kept, empty = (previous_mask(t, AlknParams(**params)) or {} for t in (same, other))
    assert all(torch.equal(kept[name], state[f"mask.{name}"]) for name in kept) and any(m.any() for m in kept.values())
    assert len(empty) == len(kept) and not any(m.any() for m in empty.values())


def test_rmu_trains_the_adapters_of_its_layers(memorised: Any) -> None:
    task, _ = adapted(memorised)
    before = weights(task.model)
    call("rmu", task, lr=1e-2, steps=2)
    moved = {name for name, tensor in weights(task.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"model.layers.{i}.mlp.down_proj.lora_B.rank4.weight" for i in (0, 1)}


def test_rmu_says_so_when_what_it_trains_has_no_adapter(memorised: Any) -> None:
    task, _ = adapted(memorised, targets=("q_proj",))
    with pytest.raises(InputError, match="lora.targets: none of the layers"):
        call("rmu", task)


def settings(**values: Any) -> Settings:
    return validate_settings(values, Path("params.yaml"))


def test_the_section_is_frozen_where_adapters_are_trained() -> None:
    assert "lora" not in settings().of_step() and settings(lora=None).of_step() == settings().of_step()
    part = settings(lora={"rank": 8, "targets": ["q_proj"]}).of_step()
    assert part["lora"] == {"rank": 8, "alpha": 16.0, "targets": ["q_proj"], "train": "b"}
    assert settings(**part).of_step() == part


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"rank": 0}}, "lora.rank: .*found 0"),
        ({"lora": {"train": "both"}}, "lora: expected a rank"),
        ({"lora": {"rnak": 4}}, "unknown key 'rnak'. Did you mean 'rank'"),
        ({"lora": {"rank": 4}, "method": "retrain"}, "lora.rank: 'retrain' trains a model of its own"),
    ],
)
def test_wrong_settings_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**values)


def test_a_whole_step(tiny_project: Callable[..., Project]) -> None:
    """Parent's names, rank of the change, the same bytes again; the adapters themselves are nowhere on disk."""
    # Four records have a sixteenth of the weight of a batch, and here a sixth of the usual schedule: it is raised.
    method = {"name": "alkn", "lr": 8e-3, "rehearsal": 16, "decay_steps": 20, "forget_weight": 4.0}
    digests = []
    for _ in range(2):
        project = tiny_project("r001", lora={"rank": 4}, method=method)
        sealed = make_step(project, "r001", previous="base", earlier=())
        assert sealed.accepted, sealed.reason
        digests.append(digest_of(project.step("r001").model))
    assert digests[0] == digests[1]
    before, after = (weights(load_model(step.model)) for step in (project.base, project.step("r001")))
    assert list(after) == list(before)
    ranks = {name: np.linalg.matrix_rank((t - before[name]).numpy(), tol=1e-4) for name, t in after.items()}
    assert {rank for name, rank in ranks.items() if "_proj" in name} == {4}
    assert all(torch.equal(t, before[name]) for name, t in after.items() if "_proj" not in name)
    report = read_json(project.step("r001").unlearning)
    assert report["reached"] and report["task_vector"]["nonzero"] > 0
