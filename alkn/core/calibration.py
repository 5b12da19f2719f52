"""How far a task vector is subtracted: the smallest scale that meets the stop rule, by evaluations only."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alkn.core.unlearning import Task


def smallest_scale(meets: Callable[[float], bool], *, high: float, bisections: int, low: float = 0.0) -> float | None:
    """The smallest scale in (low, high] that meets a target, to within (high − low) / 2^bisections.

    ``None`` if ``high`` itself does not. The upper end of the last interval is returned, so the
    scale always meets the target.
    """
    if not meets(high):
        return None
    for _ in range(bisections):
        middle = 0.5 * (low + high)
        if meets(middle):
            high = middle
        else:
            low = middle
    return high


def calibrated_scale(
    task: Task, theta: dict[str, Tensor], tau: dict[str, Tensor], *, largest: float = 64.0, bisections: int = 7
) -> float:
    """The smallest λ that meets the stop rule, by doubling and then bisection; ``largest`` if none does."""

    def meets(scale: float) -> bool:
        task.set_weights(theta, tau, scale)
        return task.stop.met(task.measure()[0])

    low, high = 0.0, 1.0
    while high < largest and not meets(high):
        low, high = high, 2 * high
    return smallest_scale(meets, high=high, low=low, bisections=bisections) or largest
