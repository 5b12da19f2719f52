"""Attacks on an unlearned model, one file each; the registry reads this package."""
