"""Low-rank adapters: what a method trains in place of the model's weights, merged into them when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from alkn.core.blocks import decoder_blocks
from alkn.errors import InputError
from alkn.registry import Params


class Lora(Params):
    """Low-rank training: W + (alpha / rank) · B · A in place of W.

    Attributes:
        rank: rows of A and columns of B; ``null``: the whole model is trained, without adapters.
        alpha: the adapters' scale is ``alpha / rank``.
        targets: last parts of the names of the layers that get adapters (``q_proj``, ...);
            ``null``: every linear layer of the decoder blocks.
        train: ``b``: A stays as it was drawn, so that weights are linear in what is trained; or ``both``.
    """

    rank: int | None = Field(None, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] | None = None
    train: Literal["b", "both"] = "b"

    @model_validator(mode="after")
    def _rank_is_given(self) -> Lora:
        if self.rank is None and self.model_fields_set - {"rank"} and self != Lora():
            raise ValueError("expected a rank beside the other keys; without one the whole model is trained")
        return self


class Adapters:
    """Adapters in a model, which stays the object that it was: its forward pass includes them.

    Only they require a gradient from then on. B starts at zero, so the model begins as it was. A is drawn
    from ``seed``; with the same seed in every step of a chain a coordinate of B means the same in all.

    Args:
        model: a transformers causal language model in the precision it is trained in; changed in place.
        lora: rank, scale, targets.
        seed: source of A.

    Raises:
        InputError: if a target is no linear layer of the decoder blocks.
    """

    def __init__(self, model: nn.Module, lora: Lora, *, seed: int) -> None:
        from peft import LoraConfig, LoraModel

        layers = linear_layers(model)
        chosen = _targeted(layers, lora.targets)
        # The name carries the rank: what an earlier step left about adapters of another rank does not fit these.
        self._name = f"rank{lora.rank}"
        self._trained = [p for p in model.parameters() if p.requires_grad]
        config = LoraConfig(
            r=lora.rank or 1,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # typed as int, used as a factor
            lora_dropout=0.0,
            target_modules=chosen,
            fan_in_fan_out=isinstance(layers[chosen[0]], Conv1D),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner: Any = LoraModel(model, {self._name: config}, self._name)
        self._layers: list[Any] = [model.get_submodule(name) for name in chosen]
        if lora.train == "b":
            for layer in self._layers:
                layer.lora_A.requires_grad_(False)

    @contextmanager
    def as_stored(self, dtype: torch.dtype) -> Iterator[None]:
        """The model computes with its merged weights rounded to ``dtype``: what would be read back from disk.

        B is zero meanwhile; weights and adapters are afterwards what they were, to the bit.
        """
        kept = [(layer.get_base_layer().weight, layer.lora_B[self._name].weight) for layer in self._layers]
        exact = [(weight.data, b.data) for weight, b in kept]
        for layer, (weight, b) in zip(self._layers, kept, strict=True):
            merged = weight.data + layer.get_delta_weight(self._name).detach()
            weight.data = merged.to(dtype).to(weight.dtype)
            b.data = torch.zeros_like(b.data)
        try:
            yield
        finally:
            for (weight, b), (weight_data, b_data) in zip(kept, exact, strict=True):
                weight.data, b.data = weight_data, b_data

    def merge(self) -> None:
        """Add the adapters to the weights and take them out: the model has its own parameters again, by name."""
        self._tuner.merge_and_unload()
        for p in self._trained:
            p.requires_grad_(True)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the decoder blocks, GPT-2's transposed ones too, by their whole names in the model.

    Embeddings and head are none: they may be one tensor.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = decoder_blocks(model)
    return {names[module]: module for module in blocks.modules() if isinstance(module, nn.Linear | Conv1D)}


def _targeted(layers: dict[str, nn.Module], targets: tuple[str, ...] | None) -> list[str]:
    known = sorted({name.rsplit(".", 1)[-1] for name in layers})
    unknown = sorted(set(targets or ()) - set(known))
    chosen = [name for name in layers if targets is None or name.rsplit(".", 1)[-1] in targets]
    if unknown or not chosen:
        raise InputError(
            f"lora.targets: expected linear layers of the decoder blocks, of which this model has"
            f" {', '.join(known) or 'none'}; found {', '.join(unknown) or 'none'}"
        )
    return chosen
