"""What a model can take, by its configuration: the longest input, and the token ids.

A model that sees or hears as well has a configuration inside its configuration, which is the one for text.
"""

from __future__ import annotations

from typing import Any


def context_of(config: Any) -> int | None:
    """The longest input in tokens; ``None``: the configuration does not tell.

    Args:
        config: a transformers configuration.
    """
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def vocabulary_of(config: Any) -> int:
    """V: token ids are 0..V-1.

    Args:
        config: a transformers configuration.
    """
    return int(config.get_text_config().vocab_size)
