"""RMU: blocks, states and steps by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from baseline_cases import call, gradients
from method_cases import CPU, NEVER, changes, task_of
from torch import Tensor, nn

from alkn.core.blocks import Hidden, decoder_blocks, down_projection
from alkn.core.scoring import Example, collate
from alkn.core.unlearning import Task
from alkn.errors import InputError
from alkn.methods.rmu import RmuParams, States, steering_target

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
