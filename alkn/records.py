"""What tasks hand on to each other: ids, paths and digests, never a model and never a record's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alkn.core.unlearning import StopRule
from alkn.settings import Settings


@dataclass(frozen=True)
class Plan:
    """One step before it is made: what goes in.

    Attributes:
        request: the request's id.
        previous: the step it starts from, ``base`` or an accepted id.
        earlier: the accepted steps before it, oldest first.
        settings: the settings it is made with.
        inputs: name -> digest of everything that goes in.
        limits: the targets as numbers.
        attested: requests among these whose records were erased: nothing can be measured on them.
    """

    request: str
    previous: str
    earlier: tuple[str, ...]
    settings: Settings
    inputs: Mapping[str, str]
    limits: StopRule
    attested: tuple[str, ...] = ()

    def set_of(self, request: str) -> str:
        """The name of a request's records in the evaluation of this step."""
        return "forget" if request == self.request else f"earlier/{request}"


@dataclass(frozen=True)
class Unlearned:
    """What the method did.

    Attributes:
        reached: whether its stop rule was met.
        before, after: P and exact memorization of the forget set in memory.
        steps: optimizer steps it took, or rounds of a method that works in rounds.
        passes: record passes spent on gradients.
        seconds: wall time; 0 if the work was found done.
    """

    reached: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    steps: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class Sealed:
    """A finished step: its verdict and its manifest.

    Attributes:
        request: the request's id.
        accepted: whether every gate that was asked passed.
        reason: the gates that failed, with their numbers.
        manifest: the manifest's content.
    """

    request: str
    accepted: bool
    reason: str
    manifest: Mapping[str, Any]
