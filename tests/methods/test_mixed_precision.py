"""``run.precision: bf16``: every pass that a gradient is taken of runs in it, and a CPU's attention in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alkn_cases import PRESETS
from baseline_cases import SHORT, SMALL
from method_cases import NEVER, task_of
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parameters_to_vector
from transformers import PreTrainedModel

from alkn import registry
from alkn.core.scoring import mean_gradient
from alkn.runtime import mixed

SIX_STEPS = {"decay_steps": 6, "steps": 6, "rehearsal": 12, "rehearsal_batch": 6, "check_every": 3}
IN_SMALL: dict[str, dict[str, Any]] = {
    "interleaved": SIX_STEPS,
    "resistant": SIX_STEPS,
    "rounds": {"steps": 2, "retain_sample": 9, "epochs": 1},
}
CASES = [
    *((name, {}) for name in sorted(registry.methods) if name != "alkn"),
    *(("alkn", {"preset": preset} | IN_SMALL.get(preset, {})) for preset in PRESETS),
]


@pytest.mark.parametrize(("name", "given"), CASES, ids=[given.get("preset", name) for name, given in CASES])
def test_every_gradient_is_of_a_pass_in_bf16(name: str, given: dict[str, Any], memorised: Any) -> None:
    """G_r, an attribution and an adversary's own steps too; what is measured is measured in float32."""
    refusal = memorised.second[0].tokens[memorised.second[0].answer_start :]
    task = task_of(memorised, stop=NEVER, rest=memorised.second, refusals=[refusal], autocast=mixed("cpu"))
    entry = registry.methods[name]
    steps = {"steps": 6} if "steps" in entry.params.model_fields and name != "alkn" else {}
    passes: list[tuple[bool, bool, bool]] = []

    def passed(module: nn.Module, _: object, said: Any) -> None:
        if not isinstance(module, PreTrainedModel) or not hasattr(said, "last_hidden_state"):
            return
        learning = torch.is_grad_enabled() and said.last_hidden_state.requires_grad
        passes.append((learning, torch.is_autocast_enabled("cpu"), bool(said.last_hidden_state.isfinite().all())))

    hook = register_module_forward_hook(passed)
    entry.call(task, entry.params(**steps | SMALL.get(name, {}) | SHORT.get(name, {}) | given))
    hook.remove()
    assert {inside for learning, inside, _ in passes if learning} == {True}
    assert not all(inside for learning, inside, _ in passes if not learning)
    assert all(finite for *_, finite in passes)
    assert {w.dtype for w in task.weights().values()} == {torch.float32}


def test_attention_is_float32_and_the_rest_bf16(make_model: Any, make_examples: Any) -> None:
    """What a block's output projection is given, and by hand: softmax(QKᵀ/√d)V of the rounded operands in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator).bfloat16() for _ in range(3))
    seen = torch.ones(5, 5).tril().bool()
    scores = (q.double() @ k.double().transpose(-1, -2)) / 8**0.5
    by_hand = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()
    added = torch.zeros(5, 5, dtype=torch.bfloat16).masked_fill(~seen, -torch.inf)
    with mixed("cpu")():
        for mask in ({"attn_mask": seen}, {"is_causal": True}, {"attn_mask": added}):
            found = scaled_dot_product_attention(q, k, v, **mask)
            assert found.dtype is torch.float32
            torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-6)
        assert (q.float() @ k.float().transpose(-1, -2)).dtype is torch.bfloat16
    assert scaled_dot_product_attention(q, k, v).dtype is torch.bfloat16, "outside, as it was"

    model, given = make_model("llama"), []
    blocks: list[nn.Module] = [m for name, m in model.named_modules() if name.endswith("o_proj")]
    hooks = [block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype)) for block in blocks]
    half = mean_gradient(model, make_examples(4), range(4), autocast=mixed("cpu"))
    assert set(given) == {torch.float32} and blocks
    for hook in hooks:
        hook.remove()
    whole = mean_gradient(model, make_examples(4), range(4))
    found, wanted = (parameters_to_vector(gradient.values()) for gradient in (half, whole))
    away = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < away < 2e-2, "rounded to eight bits, and no more than that"
