"""What the tests of the baselines make once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from baseline_cases import Finished, call
from method_cases import task_of

from alkn.core.unlearning import Outcome, Task


@pytest.fixture(scope="session")
def finished(memorised: Any) -> Finished:
    """A method's whole run with its settings of ``SMALL``, made once."""

    @functools.cache
    def run(name: str) -> tuple[Task, Outcome]:
        task = task_of(memorised, rest=memorised.second)
        return task, call(name, task)

    return run
