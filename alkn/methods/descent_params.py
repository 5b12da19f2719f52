"""Settings that every method of :func:`alkn.core.descent.descend` has."""

from __future__ import annotations

import dataclasses

from pydantic import Field

from alkn.core.descent import Pace
from alkn.registry import Params


class PaceParams(Params):
    """Rate, length and batches without a retain term; :class:`alkn.core.descent.Pace` says what each means."""

    lr: float = Field(1e-4, gt=0)
    steps: int = Field(400, ge=1)
    decay_steps: int = Field(0, ge=0)
    lr_floor: float = Field(0.1, ge=0, le=1)
    check_every: int = Field(5, ge=1)
    batch_size: int = Field(16, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)

    def pace(self) -> Pace:
        """The part that the loop reads."""
        read = {field.name for field in dataclasses.fields(Pace)}
        return Pace(**{"retain_batch": 0, **self.model_dump(include=read)})


class DescentParams(PaceParams):
    """The same with a retain term."""

    retain_batch: int = Field(16, ge=0)
