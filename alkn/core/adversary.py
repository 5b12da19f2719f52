"""Someone who relearns, inside the loop that forgets: what he would regain is pushed down before he comes.

Pushing down what the model says now leaves the records in it, a little training away. The adversary is a
second set of weights that starts at the model's, is trained on a few of the forget records, and starts anew
after so many steps. The forget loss of the *other* records is taken at his weights, and its gradient is added
to the model's: to first order in what he moved, that is the gradient of what his training would bring back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from alkn.core.distributed import average_gradients_, local
from alkn.core.scoring import Example, collate
from alkn.core.training import Loss, adamw, answer_loss, backward


@dataclass(frozen=True)
class Resistance:
    """What the adversary may do, and what is done about it.

    Attributes:
        loss: descended at his weights on records that he does not have; ``batch.records`` are positions in
            the forget set.
        weight: factor on that loss.
        lr: his AdamW's constant learning rate.
        steps: steps that he trains before he starts anew from the model, with other records.
        share: part of the forget records that he has; at least one of several, not all; of earlier requests too.
        earlier: factor on the loss on records of earlier requests, beside ``weight``.
    """

    loss: Loss
    weight: float
    lr: float
    steps: int
    share: float
    earlier: float = 0.0


class Adversary:
    """The second set of weights, and the gradient that is taken there.

    Args:
        model: what is attacked; its trained weights are borrowed and given back in every call.
        trained: the parameters that the loop trains, each with ``requires_grad``.
        forget: the forget records. A single one he does not have.
        earlier: records of earlier requests; the losses' positions go on through them. The same holds for a single one.
        resistance: what he may do, and what is done about it.
        batch_size: records of each of the batches of a step: his, the others', the others' of earlier requests.
        generator: source of his records and of all batches.
        autocast: context of the forward passes.

    Attributes:
        passes: record passes spent so far.

    Source: own in this form. Resistance learned against a relearning adversary: Henderson et al. 2023 (MLAC), Tamirisa
    et al. 2024 (TAR); the gradient at trained weights in place of a derivative through the training: Finn et al.
    2017 (MAML, section 5.2).
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Sequence[nn.Parameter],
        forget: Sequence[Example],
        resistance: Resistance,
        *,
        earlier: Sequence[Example] = (),
        batch_size: int,
        generator: Generator,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._trained, self._records = model, list(trained), [*forget, *earlier]
        self._requests = [range(len(forget)), range(len(forget), len(self._records))]
        self._weights_of = [resistance.weight, resistance.weight * resistance.earlier]
        self._resistance, self._batch_size = resistance, batch_size
        self._generator, self._autocast = generator, autocast
        self._weights = [nn.Parameter(local(p.detach()).clone()) for p in self._trained]
        self._his: list[int] = []
        self._others: list[list[int]] = []
        self.passes = 0

    def __call__(self, step: int) -> None:
        """One step of his, then the loss of the others at his weights; its gradient is added to the model's.

        The model's weights are afterwards what they were, to the bit.

        Args:
            step: of the loop, from 0; he starts anew at every multiple of his steps.

        Raises:
            TrainingDiverged: if one of the two losses is not finite.
        """
        if max(map(len, self._requests)) < 2:
            return  # he has nothing to train on
        if step % self._resistance.steps == 0:
            self._start_anew()
        own = [local(p.detach()).clone() for p in self._trained]
        gathered = [p.grad for p in self._trained]
        self._place(self._weights)
        self._clear()
        self._backward(answer_loss(), self._his, step, "adversary's")
        average_gradients_(self._trained)
        for his, p in zip(self._weights, self._trained, strict=True):
            his.grad = None if p.grad is None else local(p.grad)
        self._optimizer.step()
        self._place(self._weights)
        self._clear()
        for weight, others in zip(self._weights_of, self._others, strict=True):
            if weight and others:
                self._backward(self._resistance.loss, others, step, "resisting", weight)
        self._place(own)
        for p, before in zip(self._trained, gathered, strict=True):
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)

    def _start_anew(self) -> None:
        with torch.no_grad():
            for his, p in zip(self._weights, self._trained, strict=True):
                his.copy_(local(p.detach()))
        self._optimizer = adamw(self._weights, device=self._weights[0].device, lr=self._resistance.lr)
        self._his, self._others = [], []
        for request in self._requests:
            order = [request[int(i)] for i in torch.randperm(len(request), generator=self._generator)]
            has = min(max(1, round(self._resistance.share * len(order))), len(order) - 1) if order else 0
            self._his += order[:has]
            self._others.append(order[has:])

    def _clear(self) -> None:
        for p in self._trained:
            p.grad = None

    def _backward(self, loss: Loss, records: list[int], step: int, what: str, weight: float = 1.0) -> None:
        """Add the gradient of a loss on some of the records."""
        drawn = self._drawn(records)
        with self._autocast():
            value = weight * loss(self._model, collate(self._records, drawn, device=self._trained[0].device))
            backward(value, step, what)
        self.passes += len(drawn)

    def _drawn(self, records: list[int]) -> list[int]:
        """All of a few records, or a batch of many, drawn with replacement."""
        if len(records) <= self._batch_size:
            return records
        picks = torch.randint(len(records), (self._batch_size,), generator=self._generator)
        return [records[int(i)] for i in picks]

    def _place(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, w in zip(self._trained, weights, strict=True):
                local(p.detach()).copy_(w)
