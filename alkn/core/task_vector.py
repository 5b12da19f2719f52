"""Task vectors: differences between two states of a model, added, negated, applied, saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def weights_of(model: nn.Module | Weights) -> dict[str, Tensor]:
    """Trainable parameters by name (tied ones once); a mapping is passed through."""
    if isinstance(model, nn.Module):
        return {name: p.detach() for name, p in model.named_parameters()}
    return dict(model)


class TaskVector:
    """A change of weights, one tensor a parameter.

    ``TaskVector.between(θ_t, θ_{t-1})`` is what step t took away. It is as sensitive as the
    records: added back, it restores the knowledge.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic".
    """

    def __init__(self, tensors: Weights) -> None:
        self.tensors: dict[str, Tensor] = dict(tensors)

    @classmethod
    def between(cls, a: nn.Module | Weights, b: nn.Module | Weights) -> TaskVector:
        """``b − a``, tensor by tensor.

        Raises:
            ValueError: naming the first five keys or shapes that do not match.
        """
        wa, wb = weights_of(a), weights_of(b)
        _check(wa, wb)
        return cls({name: wb[name] - wa[name] for name in wa})

    def apply_(self, model: nn.Module | Weights, scale: float) -> None:
        """Add ``scale`` times this vector to the model's weights, in place.

        Raises:
            ValueError: naming the first five keys or shapes that do not match.
        """
        target = weights_of(model)
        _check(target, self.tensors)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                target[name].add_(tensor.to(target[name].device, target[name].dtype), alpha=scale)

    def __neg__(self) -> TaskVector:
        """The vector with every sign turned."""
        return TaskVector({name: -t for name, t in self.tensors.items()})

    def __add__(self, other: TaskVector) -> TaskVector:
        """The sum of two vectors over the same parameters."""
        _check(self.tensors, other.tensors)
        return TaskVector({name: t + other.tensors[name] for name, t in self.tensors.items()})

    @property
    def nnz(self) -> int:
        """Number of entries that are not zero."""
        return sum(int(torch.count_nonzero(t)) for t in self.tensors.values())

    @property
    def norm(self) -> float:
        """Euclidean norm over all entries, accumulated in float64."""
        return float(sum(t.double().square().sum() for t in self.tensors.values()) ** 0.5)

    def save(self, path: Path) -> None:
        """Write as safetensors, each tensor in the smaller of its dense and its sparse form.

        The sparse form holds the values that are not zero and their flat positions (int32 where
        they fit, else int64). The caller writes to a temporary name and renames.
        """
        out: dict[str, Tensor] = {}
        shapes: dict[str, list[int]] = {}
        for name, tensor in self.tensors.items():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            where = flat.nonzero().reshape(-1)
            index = where.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
            sparse_bytes = index.numel() * (index.element_size() + flat.element_size())
            if sparse_bytes < flat.numel() * flat.element_size():
                out[f"{name}.values"], out[f"{name}.index"] = flat[where], index
                shapes[name] = list(tensor.shape)
            else:
                out[f"{name}.dense"] = flat.reshape(tensor.shape)
        # One metadata key: safetensors writes several in no fixed order, and the bytes must repeat.
        save_file(out, path, metadata={"shapes": json.dumps(shapes, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> TaskVector:
        """Read what :meth:`save` wrote; every tensor comes back dense."""
        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as f:
            shapes = json.loads((f.metadata() or {}).get("shapes", "{}"))
            for key in f.keys():  # noqa: SIM118 - safe_open is no mapping
                name, form = key.rsplit(".", 1)
                if form == "dense":
                    tensors[name] = f.get_tensor(key)
                elif form == "values":
                    values, index = f.get_tensor(key), f.get_tensor(f"{name}.index").long()
                    flat = torch.zeros(torch.Size(shapes[name]).numel(), dtype=values.dtype)
                    flat[index] = values
                    tensors[name] = flat.reshape(shapes[name])
        return cls(tensors)


def _check(a: Weights, b: Weights) -> None:
    keys = sorted(set(a) ^ set(b))
    if keys:
        raise ValueError(f"{len(keys)} parameters are on one side only, first: {', '.join(keys[:5])}")
    shapes = [f"{n} {tuple(a[n].shape)} against {tuple(b[n].shape)}" for n in a if a[n].shape != b[n].shape]
    if shapes:
        raise ValueError(f"{len(shapes)} shapes differ, first: {', '.join(shapes[:5])}")
