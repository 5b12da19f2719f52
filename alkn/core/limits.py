"""What a model can take, by its configuration: the longest input, and the token ids.

A model that sees or hears as well has a configuration inside its configuration, which is the one for text.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config_of(model: nn.Module) -> Any:
    """The transformers configuration of the part of a model that reads text: its own, or one inside it."""
    causal_lm: Any = model
    return causal_lm.config.get_text_config()


def longest_input(config: Any) -> int | None:
    """The longest input in tokens by a transformers configuration; ``None``: it does not tell."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def context_of(model: nn.Module) -> int | None:
    """The longest input of a model in tokens; ``None``: its configuration does not tell."""
    return longest_input(text_config_of(model))


def vocabulary_of(model: nn.Module) -> int:
    """V: token ids of a model are 0..V-1."""
    return int(text_config_of(model).vocab_size)
