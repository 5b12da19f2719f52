"""The bench of the evaluation runs on any benchmark's splits and compares ways that do the same work."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from alkn.project import Project
from alkn.settings import Settings
from flows.bench_evaluation import Bench, bench_rate, bench_whole


def test_both_ways_give_the_same_answers(
    tiny_project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    project = tiny_project()
    bench = Bench(project, project.base.model, forget=2, settings=Settings(evaluation={"max_new_tokens": 8}))
    assert [one.name for one in bench.sets()][:2] == ["forget", "earlier/r001"]
    bench_rate(bench, 6)
    bench_whole(bench)
    told = capsys.readouterr().out
    assert "The same answer, token for token, to 6 of 6 records." in told
    shares = {name: float(share) for name, share in re.findall(r"^\| ([^|]+) \| ([\d.]+)% \|$", told, re.MULTILINE)}
    assert len(shares) == 4 and all(0 <= share <= 100 for share in shares.values())
    assert "4 forget, 4 earlier" in told
