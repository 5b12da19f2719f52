"""Context and vocabulary of a model, which may stand in a configuration inside its configuration."""

from torch import nn
from transformers import BloomConfig, LlamaConfig, LlavaConfig, PreTrainedConfig

from alkn.core.limits import context_of, longest_input, vocabulary_of

TEXT = LlamaConfig(max_position_embeddings=77, vocab_size=123)


def having(config: PreTrainedConfig) -> nn.Module:
    """A model without weights, of which only the configuration is read."""
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    return model


def test_they_are_the_models_own() -> None:
    assert context_of(having(TEXT)) == 77
    assert vocabulary_of(having(TEXT)) == 123


def test_of_a_model_that_sees_as_well_they_are_the_texts() -> None:
    seeing = LlavaConfig(text_config=TEXT)
    assert not hasattr(seeing, "max_position_embeddings")
    assert longest_input(seeing) == 77
    assert context_of(having(seeing)) == 77
    assert vocabulary_of(having(seeing)) == 123


def test_a_model_without_places_has_no_longest_input() -> None:
    assert context_of(having(BloomConfig(vocab_size=9))) is None
    assert vocabulary_of(having(BloomConfig(vocab_size=9))) == 9
