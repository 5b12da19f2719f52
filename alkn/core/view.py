"""A model before all sets at once: what metrics of the whole model read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from alkn.core.measured import Measured
from alkn.core.probe import Probe


class Text(Protocol):
    """Text to token ids and back, by the model's tokenizer."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        ...


@dataclass(frozen=True)
class View:
    """What a metric with ``scope="model"`` gets.

    Attributes:
        measured: set -> metric -> value, of the metrics of single sets that were asked for.
        probes: set -> the model on it; computes scores where no metric did.
        model: the model itself, on its device.
        tokens: its tokenizer; ``None`` only where no metric of the model reads text.
        eos: end-of-sequence id.
        base: loads the model that the chain began with; ``None`` where this is that model.
    """

    measured: Mapping[str, Mapping[str, Measured]]
    probes: Mapping[str, Probe] = field(default_factory=dict)
    model: nn.Module | None = None
    tokens: Text | None = None
    eos: int = 0
    base: Callable[[], nn.Module] | None = None

    def under(self, kind: str) -> dict[str, Mapping[str, Measured]]:
        """Domain -> metric -> value of the sets of a kind: ``utility``, ``earlier``, ..."""
        return {n.split("/", 1)[1]: m for n, m in self.measured.items() if n.startswith(f"{kind}/")}
