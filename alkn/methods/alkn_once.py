"""ALKN by a single negation: gradients masked as the training goes (presets ``derived``, ``paper``, ``reference``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from alkn.core.calibration import calibrated_scale
from alkn.core.distributed import local
from alkn.core.gradient_mask import RetainGradient, threshold
from alkn.core.scoring import Batch, mean_gradient
from alkn.core.training import answer_loss, fine_tune, linear_warmup, steps_of
from alkn.core.unlearning import Outcome, Task
from alkn.methods.alkn_params import (
    AlknParams,
    empty_m,
    label_weights,
    mask_state,
    move_m,
    previous_mask,
    stored_gradient,
)


def at_once(task: Task, p: AlknParams) -> Outcome:
    """One fine-tuning whose gradients are masked as it goes, then one negation."""
    before, scores = task.measure()
    if task.stop.met(before):
        return Outcome(True, [before.row(0)], dict(task.state), 0)
    training = MaskedTraining(task, p)
    theta = task.copy_weights()
    hp = p.hyperparameters()
    total = steps_of(len(task.forget), hp)

    def schedule(optimizer: Optimizer) -> LambdaLR:
        return linear_warmup(optimizer, warmup=total * p.warmup_epochs // p.epochs, total=total)

    fine_tune(
        task.model,
        task.forget,
        hp,
        loss=answer_loss(label_weights(scores, p)),
        generator=task.generator("order"),
        scheduler=schedule if p.warmup_epochs else None,
        groups=training.groups(),
        before_step=training.before_step,
        after_step=training.after_step,
        autocast=task.autocast,
        progress=task.progress,
        label="task vector",
    )
    tau = {name: w - theta[name] for name, w in task.weights().items()}
    scale = p.scale if p.scale is not None else calibrated_scale(task, theta, tau)
    task.set_weights(theta, tau, scale)
    now, _ = task.measure()
    passes = p.epochs * len(task.forget) + training.passes
    return Outcome(task.stop.met(now), [before.row(0), now.row(1, scale=scale)], training.state(), passes)


class MaskedTraining:
    """The moving parts of a single negation: m, its thresholds, M and the protected rates."""

    def __init__(self, task: Task, p: AlknParams) -> None:
        self.task, self.p = task, p
        self.steps = steps_of(len(task.forget), p.hyperparameters())
        self.m = empty_m(task, p)
        self.previous = previous_mask(task, p)
        self.eta: dict[str, Tensor] = {
            name: task.state[f"eta.{name}"].to(w.device)
            for name, w in task.weights().items()
            if p.reuse_thresholds and f"eta.{name}" in task.state
        }
        self.reused = bool(self.eta)
        self.generator = task.generator("percentile")
        self.passes = 0
        self.g_r: dict[str, RetainGradient] = {}
        if p.criterion == "random":
            chance = task.generator("random mask")
            self.m = {n: task.random(n, chance).to(t.dtype) for n, t in self.m.items()}
        if p.criterion == "m":
            task.require_retain("method.criterion", "'random' and 'magnitude' need none")
            picks, count = list(range(len(task.retain))), p.sample_size(len(task.forget))
            if count is not None:
                picks = torch.randint(len(task.retain), (count,), generator=task.generator("retain")).tolist()
            gradient = mean_gradient(task.model, task.retain, picks, max_records=p.batch_size, autocast=task.autocast)
            sampling = task.generator("ternary")
            self.g_r, self.passes = stored_gradient(gradient, p, generator=sampling, group=task.shards), len(picks)
        self.old: dict[str, Tensor] = {}
        self.mask: dict[str, Tensor] = {}

    def groups(self) -> list[dict[str, object]] | None:
        """AdamW's groups: the half of the tensors in which M is densest gets the protected rate."""
        if self.p.protection != "tensor" or self.previous is None:
            return None
        density = {name: float(self.task.whole(t).float().mean()) for name, t in self.previous.items()}
        if not any(density.values()):
            return None
        dense = set(sorted(density, key=lambda n: (-density[n], n))[: len(density) // 2])
        named = [(n, q) for n, q in self.task.model.named_parameters() if q.requires_grad]
        return [
            {"params": [q for n, q in named if n in dense], "lr": self.p.lr * self.p.protection_rate},
            {"params": [q for n, q in named if n not in dense], "lr": self.p.lr},
        ]

    def before_step(self, step: int, _: Batch) -> None:
        """Move m and mask the gradient, or keep the mask for the update, in the order of the preset."""
        if self.p.mask_first:
            self._move()
            self._find_thresholds(step)
        raw = {} if self.p.mask_first else self._gradients()
        if self.p.masked == "gradient":
            self._mask_gradients()
        else:
            self.mask = {name: self.m[name] >= eta for name, eta in self.eta.items()}
        if self.mask or (self.p.protection == "coordinate" and self.previous is not None):
            self.old = self.task.copy_weights()
        if not self.p.mask_first:
            masked = self._swap_gradients(raw)
            self._move()
            self._swap_gradients(masked)
            self._find_thresholds(step)

    def after_step(self, _: int) -> None:
        """The mask, where it is the update's; APM a coordinate at a time: on M ``protection_rate`` of it stays."""
        for name, w in self.task.weights().items() if self.old else ():
            old = self.old.pop(name)
            if self.p.protection == "coordinate" and self.previous is not None:
                w.copy_(old + (w - old) * torch.where(self.previous[name], self.p.protection_rate, 1.0))
            if name in self.mask:
                w.copy_(torch.where(self.mask[name], w, old))

    def state(self) -> dict[str, Tensor]:
        """M ∪ 1[m ≥ η], and the thresholds where later requests reuse them."""
        out: dict[str, Tensor] = {}
        if self.previous is not None:
            mask = {n: t >= self.eta[n] for n, t in self.m.items()}
            out |= mask_state(self.task, {n: self.previous[n] | mask[n] for n in mask})
        if self.p.reuse_thresholds:
            out |= {f"eta.{name}": eta.cpu().clone() for name, eta in self.eta.items()}
        return out

    def _move(self) -> None:
        """Move m by the present gradients; for the ablations it is their accumulated size, or chance, which stays."""
        if self.p.criterion == "m":
            move_m(self.task, self.p, self.m, self.g_r, self.previous)
        elif self.p.criterion == "magnitude":
            for name, gradient in self._gradients().items():
                self.m[name] += local(gradient).abs()

    def _share(self, step: int) -> float:
        done = (step + 1) / self.steps
        if self.p.schedule == "linear":
            return self.p.share + (self.p.share_end - self.p.share) * done
        if self.p.schedule == "fifths":
            return self.p.share + (self.p.share_end - self.p.share) * (math.floor(step * 5 / self.steps) / 5)
        return self.p.share

    def _find_thresholds(self, step: int) -> None:
        if self.reused:
            return
        share, shards = self._share(step), self.task.shards
        if self.p.scope == "model":
            flat = torch.cat([t.reshape(-1) for t in self.m.values()])
            eta = threshold(flat, share, estimator=self.p.estimator, generator=self.generator, group=shards)
            self.eta = dict.fromkeys(self.m, eta)
        else:
            self.eta = {
                n: threshold(t, share, estimator=self.p.estimator, generator=self.generator, group=shards)
                for n, t in self.m.items()
            }

    def _mask_gradients(self) -> None:
        for name, parameter in self.task.model.named_parameters():
            if parameter.grad is not None and name in self.eta:
                # A new tensor: the gradient as it was is what moves m.
                parameter.grad = parameter.grad.clone()
                local(parameter.grad).mul_(self.m[name] >= self.eta[name])

    def _gradients(self) -> dict[str, Tensor]:
        return {n: q.grad for n, q in self.task.model.named_parameters() if q.grad is not None}

    def _swap_gradients(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        old = self._gradients()
        for name, parameter in self.task.model.named_parameters():
            parameter.grad = new.get(name)
        return old
