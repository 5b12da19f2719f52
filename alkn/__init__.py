"""ALKN: continual unlearning for language models."""
