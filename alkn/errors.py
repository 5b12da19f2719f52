"""Errors that a user can act on. Everything else is a bug and keeps its traceback."""

from __future__ import annotations


class AlknError(Exception):
    """Base of the errors that the command line prints as one message, without a traceback."""

    exit_code = 1


class InputError(AlknError):
    """Something the user gave is wrong: a file, a setting, an id. Nothing was changed on disk."""

    exit_code = 2


class ChainBusy(InputError):
    """Another process is writing this chain."""


class ChainBroken(AlknError):
    """A file of the chain does not match the digest that its manifest holds."""


class TrainingDiverged(AlknError):
    """A loss or a weight stopped being a finite number."""
