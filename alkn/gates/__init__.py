"""Gates, one rule a file."""
