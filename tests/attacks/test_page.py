"""docs/COMPARE.md lists every parameter of every attack with its default."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from alkn import registry

PAGE = Path(__file__).parent.parent.parent / "docs" / "COMPARE.md"


def test_every_parameter_of_every_attack_is_on_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([^`]+)` \| \S", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    found = {(attack, name): yaml.safe_load(default) for attack, name, default in rows}
    wanted = {
        (attack, name): value
        for attack, entry in registry.attacks.items()
        for name, value in entry.params().model_dump(mode="json").items()
    }
    assert found == wanted and len(rows) == len(wanted)
