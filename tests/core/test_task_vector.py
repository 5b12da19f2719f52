"""Task vectors: arithmetic, exact round trips, both forms on disk, and what does not match."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from alkn.core.task_vector import TaskVector


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (20, 8), "layer.0.bias": (8,), "scalar": (), "norm.weight": (3, 2, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def keys_of(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_between_is_the_second_minus_the_first() -> None:
    """By hand, on mappings; neither side changes."""
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([4.0, -1.0])}
    assert TaskVector.between(a, b).tensors["w"].tolist() == [3.0, -3.0]
    assert a["w"].tolist() == [1.0, 2.0] and b["w"].tolist() == [4.0, -1.0]


def test_arithmetic_by_numpy() -> None:
    """Sum, negation, count of entries that are not zero, Euclidean norm."""
    a, b = tensors(1), tensors(2)
    a["embed.weight"][:5] = 0
    total = TaskVector(a) + TaskVector(b)
    negated = -TaskVector(a)
    for name in a:
        np.testing.assert_array_equal(total.tensors[name].numpy(), a[name].numpy() + b[name].numpy())
        np.testing.assert_array_equal(negated.tensors[name].numpy(), -a[name].numpy())
    flat = np.concatenate([t.numpy().reshape(-1) for t in a.values()]).astype(np.float64)
    assert TaskVector(a).nnz == np.count_nonzero(flat) == 160 + 8 + 1 + 12 - 40
    assert TaskVector(a).norm == pytest.approx(np.linalg.norm(flat), rel=1e-12)
    assert TaskVector({"w": torch.tensor([3.0, 0.0, -4.0])}).norm == 5.0


def test_apply_scales_in_place() -> None:
    """θ + scale · vector, on a mapping and on a module."""
    linear = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    vector = TaskVector({"weight": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "bias": torch.tensor([0.0, -8.0])})
    vector.apply_(linear, -0.5)
    assert torch.equal(linear.weight, before["weight"] - 0.5 * vector.tensors["weight"])
    assert torch.equal(linear.bias, before["bias"] - 0.5 * vector.tensors["bias"])
    weights = {"w": torch.ones(2)}
    TaskVector({"w": torch.tensor([1.0, 3.0])}).apply_(weights, 2.0)
    assert weights["w"].tolist() == [3.0, 7.0]


def test_adding_back_restores_the_model_exactly(make_model: type) -> None:
    """θ_t + (θ_{t-1} − θ_t) is θ_{t-1} bit for bit where a weight moved by less than its half, tied head included."""
    before = make_model("llama")
    after = copy.deepcopy(before)
    with torch.no_grad():
        for p in after.parameters():
            p.mul_(1 + 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(1)))
    start = {name: p.detach().clone() for name, p in before.named_parameters()}
    vector = TaskVector.between(after, before)
    assert vector.nnz > 20_000
    vector.apply_(after, 1.0)
    assert equal({n: p.detach() for n, p in after.named_parameters()}, start)
    assert torch.equal(after.lm_head.weight, after.model.embed_tokens.weight)


def test_adding_back_large_changes_is_off_by_rounding_only() -> None:
    """A weight that moved far comes back to within one rounding of the vector's own size."""
    a, b = tensors(1), tensors(2)
    vector = TaskVector.between(a, b)
    vector.apply_(a, 1.0)
    for name in a:
        size = torch.maximum(vector.tensors[name].abs(), b[name].abs())
        assert bool(((a[name] - b[name]).abs() <= size * 2**-23).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    """Dense, sparse, empty and all-zero tensors come back as they were, precision included."""
    made = {name: t.to(dtype) for name, t in tensors().items()}
    made["embed.weight"][torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) > 0.1] = 0
    made |= {"zero": torch.zeros(4, 3, dtype=dtype), "none": torch.zeros(0, 3, dtype=dtype)}
    TaskVector(made).save(tmp_path / "v.safetensors")
    assert {"embed.weight.values", "embed.weight.index", "layer.0.bias.dense", "zero.values"} <= keys_of(
        tmp_path / "v.safetensors"
    )
    assert equal(TaskVector.load(tmp_path / "v.safetensors").tensors, made)


def test_each_tensor_takes_the_smaller_form(tmp_path: Path) -> None:
    """In float32 an entry costs 4 bytes dense and 8 sparse, so one half is where they meet."""
    half, fewer = torch.zeros(1000), torch.zeros(1000)
    half[:500], fewer[:499] = 1.0, 1.0
    TaskVector({"half": half, "fewer": fewer}).save(tmp_path / "v.safetensors")
    assert keys_of(tmp_path / "v.safetensors") == {"half.dense", "fewer.values", "fewer.index"}


def test_a_sparse_vector_takes_a_smaller_file(tmp_path: Path) -> None:
    """One percent of the entries need about two percent of the bytes."""
    dense = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0))
    sparse = dense * (torch.arange(1000) % 100 == 0)
    TaskVector({"w": dense}).save(tmp_path / "dense.safetensors")
    TaskVector({"w": sparse}).save(tmp_path / "sparse.safetensors")
    assert (tmp_path / "dense.safetensors").stat().st_size > 400_000
    assert (tmp_path / "sparse.safetensors").stat().st_size < 9_000
    assert torch.equal(TaskVector.load(tmp_path / "sparse.safetensors").tensors["w"], sparse)


def test_two_saves_are_the_same_bytes(tmp_path: Path) -> None:
    """Also when the tensors were entered in another order, and with several sparse tensors."""
    made = tensors()
    made |= {f"sparse.{i}": torch.eye(9 + i) for i in range(6)}
    TaskVector(made).save(tmp_path / "a.safetensors")
    for name, again in (("b", made), ("c", dict(reversed(made.items())))):
        TaskVector(again).save(tmp_path / f"{name}.safetensors")
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(json.loads(file.metadata()["shapes"])) == [f"sparse.{i}" for i in range(6)]


def test_missing_parameters_are_named_up_to_five() -> None:
    """From either side, in all three operations."""
    one = {f"p{i}": torch.zeros(1) for i in range(9)}
    two = {f"p{i}": torch.zeros(1) for i in range(1, 8)} | {"a": torch.zeros(1)} | {"b": torch.zeros(1)}
    more = one | {f"q{i}": torch.zeros(1) for i in range(7)}
    message = "^4 parameters are on one side only, first: a, b, p0, p8$"
    with pytest.raises(ValueError, match=message):
        TaskVector.between(one, two)
    with pytest.raises(ValueError, match=message):
        TaskVector(one) + TaskVector(two)
    with pytest.raises(ValueError, match="^7 parameters are on one side only, first: q0, q1, q2, q3, q4$"):
        TaskVector(one).apply_(more, 1.0)


def test_other_shapes_are_named_up_to_five_and_nothing_is_changed() -> None:
    """Shapes that would broadcast too."""
    one = {f"p{i}": torch.ones(2, 3) for i in range(7)}
    two = {name: torch.ones(3) for name in one}
    with pytest.raises(ValueError, match=r"^7 shapes differ, first: p0 \(2, 3\) against \(3,\), p1 .*p4") as error:
        TaskVector.between(one, two)
    assert "p5" not in str(error.value)
    with pytest.raises(ValueError, match="7 shapes differ"):
        TaskVector(two).apply_(one, 1.0)
    assert all(torch.equal(t, torch.ones(2, 3)) for t in one.values())
