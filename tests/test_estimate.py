"""What a run is judged to cost: the memory of methods that hold more copies of the weights."""

from __future__ import annotations

from typing import Any

from alkn.estimate import estimate
from alkn.project import Project
from alkn.requests.ledger import Ledger
from alkn.settings import validate_settings


def test_an_adversary_and_adapters_change_the_memory(tiny_ground: Project, tiny_values: dict[str, Any]) -> None:
    """In float32 copies of the stored model: 8, 6 more for the adversary's weights, 3 where adapters are trained."""
    size = sum(path.stat().st_size for path in tiny_ground.base.model.iterdir())

    def copies(**changes: Any) -> float:
        settings = validate_settings({**tiny_values, **changes}, tiny_ground.params)
        return estimate(tiny_ground, settings, Ledger()).memory / size

    assert copies() == 8
    assert copies(method={"name": "alkn", "preset": "resistant"}) == 14
    assert copies(method={"name": "alkn", "preset": "resistant"}, lora={"rank": 2}) == 3
    assert copies(method="npo") == 8
