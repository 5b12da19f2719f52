"""Context and vocabulary of a model, which may stand in a configuration inside its configuration."""

from transformers import BloomConfig, LlamaConfig, LlavaConfig

from alkn.core.limits import context_of, vocabulary_of

TEXT = LlamaConfig(max_position_embeddings=77, vocab_size=123)


def test_they_are_the_models_own() -> None:
    assert context_of(TEXT) == 77
    assert vocabulary_of(TEXT) == 123


def test_of_a_model_that_sees_as_well_they_are_the_texts() -> None:
    seeing = LlavaConfig(text_config=TEXT)
    assert not hasattr(seeing, "max_position_embeddings")
    assert context_of(seeing) == 77
    assert vocabulary_of(seeing) == 123


def test_a_model_without_places_has_no_longest_input() -> None:
    assert context_of(BloomConfig(vocab_size=9)) is None
    assert vocabulary_of(BloomConfig(vocab_size=9)) == 9
