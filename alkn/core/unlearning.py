"""What every method is given and what it gives back, and the rule it stops by."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from alkn.core.distributed import is_split, joined, local, part_of
from alkn.core.scoring import Example, Progress, Scores, no_progress, score
from alkn.errors import InputError

Teacher = Literal["parent", "origin"]
"""Whose words are kept: θ_{t-1}'s, or those of the model before every request that is replayed."""


@dataclass(frozen=True)
class Forgetting:
    """How much of the forget set a model still knows.

    Attributes:
        p: mean P over the records, in [0, 1].
        exact_memorization: mean share of answer tokens predicted right, in [0, 1].
    """

    p: float
    exact_memorization: float

    @classmethod
    def of(cls, scores: Scores) -> Forgetting:
        """The two numbers of a set's scores."""
        return cls(float(scores.probability.mean()), float(scores.exact_memorization.mean()))

    def worst(self, other: Forgetting) -> Forgetting:
        """The larger of each number."""
        return Forgetting(max(self.p, other.p), max(self.exact_memorization, other.exact_memorization))

    def row(self, number: int, **more: float) -> dict[str, float]:
        """A row of :attr:`Outcome.history`."""
        return {"round": number, "p": self.p, "exact_memorization": self.exact_memorization, **more}


@dataclass(frozen=True)
class StopRule:
    """Forgotten means both: P and exact memorization at or below their targets.

    P alone flatters: a few impossible tokens make a record improbable without making it forgotten.

    Attributes:
        p: largest mean P.
        exact_memorization: largest mean share of answer tokens predicted right.
    """

    p: float
    exact_memorization: float

    def met(self, now: Forgetting) -> bool:
        """Whether both numbers are at or below their targets."""
        return now.p <= self.p and now.exact_memorization <= self.exact_memorization

    def met_by(self, scores: Scores) -> Tensor:
        """Which records are at or below both targets by themselves, ``[records]``, boolean."""
        return (scores.probability <= self.p) & (scores.exact_memorization <= self.exact_memorization)


def seed_of(seed: int, *names: object) -> int:
    """A seed for one purpose: 63 bits of SHA-256 over the run's seed and the purpose's names."""
    text = "/".join(str(n) for n in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass
class Task:
    """One request, as a method sees it.

    Attributes:
        model: θ_{t-1} in float32 on its device; the method changes it in place into θ_t.
        forget: D_u, the encoded records of the request.
        retain: D_r, the encoded records that G_r and retain losses are drawn from.
        retain_domains: the domain of each of them; empty: they are of one.
        stop: when the request is forgotten.
        earlier: the encoded records of the earlier requests, those that can still be read; only a method that
            replays them is given them.
        seed: seed of this step; every random choice derives from it.
        state: tensors that the last accepted step left for this one (M, thresholds), on the CPU.
        eos: end-of-sequence id of what the model writes; ``None``: the last token of the first retain record.
        refusals: encoded ways of not answering, each ``[length]`` with the end of sequence.
        rest: what the base model was trained on without this and the earlier requests, where the project
            trained it itself; else empty. Only ``retrain`` may read it: it holds what utility is measured on.
        stored: precision in which the model will be stored; weights are rounded to it.
        as_stored: context in which the model computes with the weights that would be stored, where rounding
            what is trained does not give them (adapters); ``None``: it does.
        before: reads θ_{t-1} again, as a model of its own on the same device; ``None``: the model is copied.
        origin: reads the model before every one of ``earlier``, as a model of its own on the same device; ``None``:
            that is θ_{t-1}.
        linear: whether the model's weights are linear in what is trained, so that differences can be scaled.
        autocast: context of the forward passes in training.
        progress: told about long work.
    """

    model: nn.Module
    forget: Sequence[Example]
    retain: Sequence[Example]
    stop: StopRule
    seed: int
    retain_domains: Sequence[str] = ()
    earlier: Sequence[Example] = ()
    state: dict[str, Tensor] = field(default_factory=dict)
    eos: int | None = None
    refusals: Sequence[Tensor] = ()
    rest: Sequence[Example] = ()
    stored: torch.dtype = torch.float32
    as_stored: Callable[[], AbstractContextManager[None]] | None = None
    before: Callable[[], nn.Module] | None = None
    origin: Callable[[], nn.Module] | None = None
    linear: bool = True
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    progress: Progress = no_progress

    def generator(self, *names: object) -> Generator:
        """A fresh CPU generator for one purpose of this step."""
        return Generator().manual_seed(seed_of(self.seed, *names))

    def require_retain(self, keys: str, otherwise: str) -> None:
        """Refuse to go on without retain records.

        Args:
            keys: the settings that ask for them.
            otherwise: what can be set instead.

        Raises:
            InputError: if there are none.
        """
        if not self.retain:
            raise InputError(f"{keys}: there is no retain record to draw; {otherwise}")

    def teacher(self, which: Teacher = "parent") -> nn.Module:
        """One of the two as a frozen model of its own; to be asked for before the model is changed."""
        read = self.origin if which == "origin" and self.origin is not None else self.before
        made = read() if read is not None else copy.deepcopy(self.model)
        return made.requires_grad_(False).eval()

    def weights(self) -> dict[str, Tensor]:
        """The model's trainable parameters by name, not copied; of weights split over processes the own part."""
        return {name: local(p.detach()) for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """The present gradients by name, not copied, split as :meth:`weights`; parameters without one are left out."""
        return {name: local(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}

    @property
    def shards(self) -> dist.ProcessGroup | None:
        """The processes that hold the parts of :meth:`weights`; ``None``: each holds whole tensors."""
        return dist.group.WORLD if is_split(self.model) else None

    def part(self, whole: Tensor) -> Tensor:
        """Of a tensor shaped like a parameter: what belongs to this process's part of it, on the model's device."""
        own = part_of(whole) if self.shards is not None else whole
        return own.to(next(self.model.parameters()).device)

    def whole(self, part: Tensor) -> Tensor:
        """The parts of all processes together, on the CPU; the inverse of :meth:`part`."""
        return (joined(part) if self.shards is not None else part).cpu()

    def random(self, name: str, generator: Generator) -> Tensor:
        """Uniform numbers in [0, 1) for every entry of a parameter, split as :meth:`weights`."""
        return self.part(torch.rand(self.model.get_parameter(name).shape, generator=generator))

    def copy_weights(self) -> dict[str, Tensor]:
        """A copy of :meth:`weights`, for a difference to be taken and scaled.

        Raises:
            InputError: if the model's weights are not linear in what is trained: scaling would not be a negation.
        """
        if not self.linear:
            raise InputError(
                "lora.train: this method scales a difference of weights, and the product of two trained factors is"
                " not linear in them; expected 'b'; found 'both'"
            )
        return {name: t.clone() for name, t in self.weights().items()}

    def set_weights(self, start: dict[str, Tensor], change: dict[str, Tensor], scale: float) -> None:
        """θ ← start − scale · change, rounded to the stored precision; neither may be the model's own tensors."""
        with torch.no_grad():
            for name, p in self.weights().items():
                p.copy_(change[name]).mul_(scale)
                torch.sub(start[name], p, out=p)
        self.round_weights()

    def round_weights(self) -> None:
        """θ rounded to the stored precision; of adapters only what they are merged to is, see :meth:`measure`."""
        if self.as_stored is not None:
            return
        with torch.no_grad():
            for p in self.weights().values():
                if p.dtype != self.stored:
                    p.copy_(p.to(self.stored))

    def measure_stored(self, records: Sequence[Example] | None = None) -> tuple[Forgetting, Scores]:
        """:meth:`measure` under the model as it would be stored; the weights stay in float32."""
        if self.stored is torch.float32 or self.as_stored is not None:
            return self.measure(records)
        exact = self.copy_weights()
        self.round_weights()
        measured = self.measure(records)
        with torch.no_grad():
            for name, p in self.weights().items():
                p.copy_(exact[name])
        return measured

    def measure(self, records: Sequence[Example] | None = None) -> tuple[Forgetting, Scores]:
        """Score records, by default the forget set, with the model as it is; adapters as they would be stored."""
        with self.as_stored() if self.as_stored is not None else nullcontext():
            scores = score(self.model, self.forget if records is None else records)
        return Forgetting.of(scores), scores


@dataclass(frozen=True)
class Outcome:
    """What a method reports; the model itself was changed in place.

    Attributes:
        reached: whether the stop rule was met.
        history: one row a round (or a call): ``round``, ``p``, ``exact_memorization``, ``scale``, ...;
            finite numbers only, no time, no text. Row 0 is the model before the request.
        state: tensors for the next request, saved beside the model.
        passes: record passes spent on gradients, a record forward and backward counted once.
    """

    reached: bool
    history: list[dict[str, float]]
    state: dict[str, Tensor]
    passes: int


class Method(Protocol):
    """A method of unlearning: changes ``task.model`` in place."""

    def __call__(self, task: Task, params: object) -> Outcome:
        """Unlearn ``task.forget``."""
        ...
