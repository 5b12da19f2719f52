"""docs/ATTACKS.md names every attack with its unit; its parameters are checked by tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

from alkn import registry

PAGE = Path(__file__).parent.parent.parent / "docs" / "ATTACKS.md"
ROW = re.compile(r"^\| `(\w+)` \| [^|]+ \| `\w+`[^|]* \| [^|]+ \| [^|]+ \|$", re.MULTILINE)


def test_every_attack_is_on_the_page() -> None:
    assert sorted(ROW.findall(PAGE.read_text(encoding="utf-8"))) == list(registry.attacks)
