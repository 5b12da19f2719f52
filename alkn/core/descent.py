"""The loop that gradient-based methods share: descend a forget and a keeping loss until the request is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from alkn.core.adversary import Adversary, Resistance
from alkn.core.distributed import average_gradients_
from alkn.core.scoring import collate, endless_batches
from alkn.core.training import Loss, adamw, backward, distillation_loss, refuse_broken
from alkn.core.unlearning import Forgetting, Outcome, Task
from alkn.errors import InputError

EARLIER_EVERY = 4
"""Measurements of the forget set for each one of the earlier requests."""


@dataclass(frozen=True)
class Pace:
    """How fast, how long and in what portions a method descends.

    Attributes:
        lr: AdamW's learning rate at the first step.
        steps: most optimizer steps.
        decay_steps: the rate falls linearly to ``lr_floor`` of it over so many steps, and so many steps are
            always taken; 0: constant rate, and the first measurement that meets the target ends it.
        lr_floor: see ``decay_steps``; 1: constant rate, with a least length.
        check_every: steps between two measurements of the forget set; the steps that may be the last are measured, too.
        batch_size: forget records a step.
        retain_batch: retain records a step, drawn with replacement; 0: no retain term.
        weight_decay: AdamW's decoupled decay.
        clip: largest norm of the whole gradient; ``None``: not clipped.
        overtime: factor on the rate at each measurement when the schedule is over, until it is ``lr`` again (a floor of
            0 stays 0); 1: it stays at the floor.
    """

    lr: float
    steps: int
    decay_steps: int
    lr_floor: float
    check_every: int
    batch_size: int
    retain_batch: int
    weight_decay: float
    clip: float | None
    overtime: float = 1.0

    def growth(self, step: int) -> float:
        """``overtime`` to the power of the measurements that missed the target when the schedule was over.

        All of them did that came before step ``step``, counted from 0: one that meets it is the last.
        """
        if step < self.decay_steps or self.decay_steps == 0:
            return 1.0
        # The first one right at its end, then at each multiple of ``check_every``.
        return float(self.overtime ** (1 + step // self.check_every - self.decay_steps // self.check_every))

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if self.decay_steps == 0:
            return self.lr
        if step < self.decay_steps:
            return self.lr * max(self.lr_floor, 1 - step / self.decay_steps)
        return self.lr * min(1.0, self.lr_floor * self.growth(step))

    def portion(self, records: int) -> int:
        """Forget records a step if an epoch of so many is to take at least as long as a measurement."""
        return min(self.batch_size, -(-records // self.check_every))


class Keep(Protocol):
    """The part of a loss that holds on to what must stay; counts the record passes it spends."""

    @property
    def passes(self) -> int:
        """Record passes spent so far."""
        ...

    def __call__(self, step: int) -> Tensor:
        """The keeping loss of one step, 0-d."""
        ...


class Together:
    """Keeping losses as one: their sum."""

    def __init__(self, *parts: Keep) -> None:
        self._parts = parts

    @property
    def passes(self) -> int:
        """Record passes that all of them spent."""
        return sum(part.passes for part in self._parts)

    def __call__(self, step: int) -> Tensor:
        """The sum of the losses of ``step``, 0-d."""
        return torch.stack([part(step) for part in self._parts]).sum()


class RetainTerm:
    """A loss on retain records, drawn anew with replacement in every step.

    Args:
        task: whose retain records.
        loss: maps the model and a batch to a 0-d loss.
        batch_size: records a step.
        weight: factor on the loss.

    Raises:
        InputError: if there is no retain record to draw.
    """

    def __init__(self, task: Task, loss: Loss, *, batch_size: int, weight: float = 1.0) -> None:
        task.require_retain("method.retain_batch", "0 switches the retain term off")
        self._task, self._loss, self._batch_size, self._weight = task, loss, batch_size, weight
        self.passes = 0

    def __call__(self, step: int) -> Tensor:
        """The weighted loss on the records of ``step``."""
        task = self._task
        picks = torch.randint(len(task.retain), (self._batch_size,), generator=task.generator("keep", step))
        batch = collate(task.retain, [int(i) for i in picks], device=next(task.model.parameters()).device)
        self.passes += self._batch_size
        return self._weight * self._loss(task.model, batch)


def retain_term(task: Task, loss: Loss, pace: Pace, *, weight: float = 1.0) -> RetainTerm | None:
    """The retain term of ``pace``, or ``None`` in no-retain mode (``retain_batch`` 0 or ``weight`` 0)."""
    if pace.retain_batch == 0 or weight == 0:
        return None
    return RetainTerm(task, loss, batch_size=pace.retain_batch, weight=weight)


def divergence_term(task: Task, pace: Pace, *, weight: float = 1.0) -> RetainTerm | None:
    """KL(θ_{t-1} ‖ θ) on retain records, or ``None`` as in :func:`retain_term`; θ_{t-1} is the model as it is now."""
    if pace.retain_batch == 0 or weight == 0:
        return None
    return retain_term(task, distillation_loss(task.teacher()), pace, weight=weight)


class Replay:
    """Earlier requests in the loop that forgets a new one: what rose above the target is drawn again.

    Args:
        task: whose earlier requests; the stop rule is asked of all their records together.
        batch_size: records a step, at most.

    Attributes:
        now: what was measured last.
    """

    def __init__(self, task: Task, batch_size: int) -> None:
        self._task, self._batch_size = task, batch_size
        self.measure()

    def measure(self) -> None:
        """Look again which records are above the target by themselves."""
        self.now, scores = self._task.measure_stored(self._task.earlier)
        self._above = torch.nonzero(~self._task.stop.met_by(scores)).flatten()

    def __call__(self, step: int) -> list[int]:
        """The records of a step, each at most once; their positions follow those of the forget set."""
        order = torch.randperm(len(self._above), generator=self._task.generator("replay", step))
        return [len(self._task.forget) + int(i) for i in self._above[order[: self._batch_size]]]


class Push:
    """The forget part of a step.

    Args:
        task: whose records are forgotten.
        loss: on a batch of them; ``batch.records`` are indices into ``task.forget`` and on through ``task.earlier``.

    Attributes:
        passes: record passes spent so far.
    """

    def __init__(self, task: Task, loss: Loss) -> None:
        self._task, self._loss, self._records = task, loss, [*task.forget, *task.earlier]
        self.passes = 0

    def __call__(self, pushed: list[int], size: int, step: int) -> None:
        """Add the gradient of the loss on some records, each with the weight of one of ``size``."""
        if not pushed:
            return
        device = next(self._task.model.parameters()).device
        with self._task.autocast():
            loss = self._loss(self._task.model, collate(self._records, pushed, device=device))
            backward(loss * (len(pushed) / size), step, "forget")
        self.passes += len(pushed)


class Watch:
    """Measures the request, and more rarely the earlier ones, while it is forgotten.

    Args:
        task: the request; it is measured at once.
        pace: when.

    Attributes:
        again: the earlier requests, where they are replayed.
        history: one row a measurement of the request.
        now: what was measured last of the request.
        met: whether the stop rule is met, by the earlier requests as well.
        at_target: which records meet it by themselves, ``[records]``, boolean.
    """

    def __init__(self, task: Task, pace: Pace) -> None:
        self._task, self._pace = task, pace
        self.again: Replay | None = None
        self.now, scores = task.measure_stored()
        self.history = [self.now.row(0)]
        self.met, self.at_target = task.stop.met(self.now), task.stop.met_by(scores)

    def __call__(self, step: int) -> Forgetting | None:
        """Measure after step ``step``, if it is time to; of each number the larger one of all requests."""
        pace, stop = self._pace, self._task.stop
        if step % pace.check_every and step not in (pace.decay_steps, pace.steps):
            return None
        self.now, scores = self._task.measure_stored()
        self.history.append(self.now.row(step))
        worst = self.now
        if self.again is not None:
            if step % (EARLIER_EVERY * pace.check_every) == 0 or step >= min(pace.decay_steps, pace.steps):
                self.again.measure()
            worst = self.now.worst(self.again.now)
        self.met, self.at_target = stop.met(worst), stop.met_by(scores)
        return worst


def descend(
    task: Task,
    pace: Pace,
    *,
    forget: Loss,
    keep: Keep | None,
    parameters: Iterable[nn.Parameter] | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    before_step: Callable[[int], None] | None = None,
    on_measure: Callable[[int, Forgetting], None] | None = None,
    rest: bool = False,
    resist: Resistance | None = None,
    replay: int = 0,
    portion: int | None = None,
) -> Outcome:
    """Descend ``forget`` + ``keep`` until the stop rule is met or the steps are used up.

    Args:
        task: the request; its model is changed in place.
        pace: rate, length, batches.
        forget: loss on a batch of forget records; descending it forgets. ``batch.records`` are indices
            into ``task.forget``, which go on through ``task.earlier``.
        keep: the keeping loss of a step, or ``None``.
        parameters: what is trained, of those that require a gradient; ``None``: all of them.
        optimizer: makes the optimizer from the parameters; ``None``: AdamW. Its rate is set by ``pace``.
        before_step: called as (step) with every gradient ready and clipped; may change them in place.
        on_measure: called as (step, what was measured) after each measurement of the forget set; of each number the
            larger one, where earlier requests are measured too.
        rest: push no further than asked for: while the last measurement met the target, the forget loss is left
            out of the steps, and before that each record is left out that met it by itself. The others weigh as
            much as they would beside it.
        resist: an adversary who relearns, and the loss that is descended at his weights in every step;
            ``None``: nobody. He is there to the last step, whatever rests.
        replay: records of ``task.earlier`` in a step, of those that are above the target by themselves. They are
            measured at every :data:`EARLIER_EVERY`-th measurement, and at each one that could be the last; the stop
            rule asks it of them as well.
        portion: forget records a step, where they are fewer than the pace's batch; each weighs as much as in one.

    Returns:
        One row of history a measurement; ``reached`` is judged at the stored precision, of the request alone.

    Raises:
        InputError: if nothing of ``parameters`` requires a gradient.
        TrainingDiverged: when a loss or, after the last step, a weight is not finite; with the step, never with data.
    """
    watch = Watch(task, pace)
    if watch.met:
        return Outcome(True, watch.history, {}, keep.passes if keep else 0)
    offered = parameters if parameters is not None else task.model.parameters()
    trained = [q for q in offered if q.requires_grad]
    if not trained:
        raise InputError("lora.targets: none of the layers that this method trains is among them")
    if optimizer is None:
        device = trained[0].device
        stepper: Optimizer = adamw(trained, device=device, lr=pace.lr, weight_decay=pace.weight_decay)
    else:
        stepper = optimizer(trained)
    adversary = None
    if resist is not None:
        adversary = Adversary(
            task.model, trained, task.forget, resist, earlier=task.earlier, batch_size=pace.batch_size,
            generator=task.generator("adversary"), autocast=task.autocast,
        )  # fmt: skip
    batches = endless_batches(len(task.forget), portion or pace.batch_size, task.generator("order"))
    push = Push(task, forget)
    again = watch.again = Replay(task, replay) if replay and task.earlier else None
    step = 0
    task.model.eval()
    while step < pace.steps and not (watch.met and step >= pace.decay_steps):
        task.progress("steps", step, max(pace.decay_steps or pace.steps, step))
        if keep is not None:
            with task.autocast():
                backward(keep(step), step, "keeping")
        if not (watch.met and rest):
            push([i for i in next(batches) if not (rest and watch.at_target[i])], pace.batch_size, step)
        if again is not None:
            push(again(step), replay, step)
        if adversary is not None:
            adversary(step)
        _update(stepper, trained, pace, step, before_step)
        task.model.zero_grad(set_to_none=True)
        step += 1
        worst = watch(step)
        if worst is not None and on_measure is not None:
            on_measure(step, worst)
    refuse_broken(trained, "unlearning", f"step {step}")
    task.round_weights()
    task.progress("steps", step, step)
    passes = sum(part.passes for part in (keep, push, adversary) if part is not None)
    return Outcome(task.stop.met(watch.now), watch.history, {}, passes)


def _update(
    stepper: Optimizer,
    trained: list[nn.Parameter],
    pace: Pace,
    step: int,
    before_step: Callable[[int], None] | None,
) -> None:
    """Average the gradients over processes, clip them, show them, and take the optimizer's step."""
    average_gradients_(trained)
    if pace.clip is not None:
        clip_grad_norm_(trained, pace.clip)
    if before_step is not None:
        before_step(step)
    for group in stepper.param_groups:
        group["lr"] = pace.rate(step)
    stepper.step()
