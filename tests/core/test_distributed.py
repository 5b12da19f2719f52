"""Two gloo processes against one: gradients, m, masks, norms and a step in float64, and whole requests.

Both forms are run: whole copies of the model in both processes (DDP), and weights split over them (FSDP2).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from distributed_cases import (
    CHAINS,
    FORMS,
    NEAR,
    PENDING,
    RUNS,
    TOGETHER,
    curvature,
    everything,
    make_chain,
    model_of,
    run_of,
    work,
)
from safetensors.torch import load_file
from torch import Tensor

from alkn.chain import begin_together
from alkn.core.distributed import (
    _buckets,
    dealt,
    is_split,
    joined,
    part_of,
    processes,
    shares,
    whole_batches,
)
from alkn.errors import InputError
from alkn.files import keyed_digest_of, read_json, write_yaml
from alkn.project import Project
from alkn.requests.ledger import Entry, Ledger, save_ledger
from alkn.settings import validate_settings


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return everything("one")


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_ground: Project, tiny_values: dict[str, Any]
) -> Iterator[Path]:
    """Both processes have done their work; their results are in files."""
    folder = tmp_path_factory.mktemp("processes")
    for name in (*(f"{run}.one" for run in RUNS), *TOGETHER):
        shutil.copytree(tiny_ground.root, folder / name)
        project, values = Project(folder / name), {**tiny_values, "method": RUNS[run_of(name)]}
        requests = CHAINS[run_of(name)]
        if name == PENDING:
            write_yaml(project.params, values)
            save_ledger(project, Ledger(pending=pending(project, *requests)))
        for request in requests[1:] if name == PENDING else requests:
            write_yaml(project.step(request).params, validate_settings(values, project.params).of_step())
    projects = {name: str(folder / name) for name in TOGETHER}
    mp.spawn(work, args=(free_port(), str(folder), projects), nprocs=2)
    yield folder


def pending(project: Project, *requests: str) -> dict[str, Entry]:
    key = project.key()
    digests = {name: keyed_digest_of(project.request(name), key) for name in requests}
    return {name: Entry(received="2026-01-01", records=4, digest=digest) for name, digest in digests.items()}


def results(place: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (load_file(place / f"{form}{rank}.safetensors") for rank in (0, 1))
    return first, second


GROUPS = (
    "g_r.", "gradient.", "penalty.", "m.", "weight.", "eta.", "mask.", "model_mask.", "descended.", "history", "nll",
    "probs", "hits", "answers", "logits", "ascent", "stored", "set.", "after", "rounds.", "tensor.", "paper.",
    "random.",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", GROUPS)
def test_two_processes_give_what_one_gives(form: str, group: str, alone: dict[str, Tensor], place: Path) -> None:
    """Within 1e-9 of the largest entry, at most 1e-9; masks and answers exactly; both processes hold the same bits."""
    first, second = results(place, form)
    names = [name for name in alone if name.startswith(group)]
    assert names and set(first) == set(alone)
    for name in names:
        assert torch.equal(first[name], second[name]), name
        if alone[name].is_floating_point():
            near = 1e-9 * min(1.0, float(alone[name].abs().max()))
            torch.testing.assert_close(first[name], alone[name], rtol=0, atol=near, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(first[name], alone[name]), name


def test_the_comparison_means_something(alone: dict[str, Tensor]) -> None:
    """The clip was at work, masks cut within tensors, weights moved."""
    squares = sum(float(t.square().sum()) for name, t in alone.items() if name.startswith("gradient."))
    assert squares**0.5 == pytest.approx(0.5, rel=1e-3)
    masks = {name: float(t.double().mean()) for name, t in alone.items() if name.startswith("mask.")}
    assert all(0 < share < 0.2 for share in masks.values())
    start_ = dict(model_of().named_parameters())
    for group in ("weight", "descended", "rounds", "tensor", "paper", "random"):
        assert any(not torch.equal(alone[f"{group}.{name}"], p.detach()) for name, p in start_.items())
    assert any(name.startswith("rounds.mask.") for name in alone) and any("tensor.eta" in name for name in alone)


def test_work_is_dealt_and_joined_again(place: Path) -> None:
    ranks = [load_file(place / f"facts{rank}.safetensors") for rank in (0, 1)]
    assert ranks[0]["dealt"].tolist() == [[0, 1], [2, 1], [4, 1]]
    assert ranks[1]["dealt"].tolist() == [[1, 1], [3, 1], [4, 0]]
    for facts in ranks:
        assert facts["joined"].tolist() == list(range(7))
        assert facts["empty"].shape == (1, 3) and facts["empty"].all()
        # Each gets its own rows' gradient, 2 · i · x_i, times two processes: the mean over processes is right.
        assert facts["rows"].tolist() == [2 * 2 * i * x for i, x in zip(range(1, 5), (1, 2, 3, 4), strict=True)]
        assert facts["refused"].all()


def test_curvature_is_of_the_whole_batch(place: Path) -> None:
    """It is squared, so a share's gradient would not do."""
    wanted = torch.cat([t.flatten() for t in curvature()])
    for rank in (0, 1):
        found = load_file(place / f"facts{rank}.safetensors")["curvature"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert wanted.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "request_id"), [(name, request) for name in TOGETHER for request in CHAINS[run_of(name)]]
)
def test_a_whole_chain_has_the_same_metrics(name: str, request_id: str, place: Path) -> None:
    """The verdict, the steps and the measured values; rank 0 left the same files as one process does."""
    run = run_of(name)
    one = Project(place / f"{run}.one")
    if not one.step("r001").manifest.is_file():
        make_chain(one, CHAINS[run])
    two = Project(place / name)
    reports = [read_json(project.step(request_id).unlearning) for project in (one, two)]
    assert reports[0]["reached"] and reports[1]["reached"]
    assert len(reports[0]["rounds"]) == len(reports[1]["rounds"])
    assert reports[0]["passes"] == reports[1]["passes"]
    sets = [read_json(project.step(request_id).evaluation)["sets"] for project in (one, two)]
    assert set(sets[0]) == set(sets[1])
    near = NEAR[run]
    for part in sets[0]:
        for metric in ("probability", "exact_memorization"):
            assert sets[1][part][metric] == pytest.approx(sets[0][part][metric], abs=near), (part, metric)
    manifests = [read_json(project.step(request_id).manifest) for project in (one, two)]
    assert manifests[0]["accepted"] == manifests[1]["accepted"]
    folders = [sorted(p.name for p in project.step(request_id).folder.iterdir()) for project in (one, two)]
    assert folders[0] == folders[1]


def test_a_step_starts_from_the_one_before(tiny_project: Callable[..., Project], tiny_values: dict[str, Any]) -> None:
    project, settings = tiny_project(), validate_settings(tiny_values, Path("params.yaml"))
    entries = pending(project, "r001", "r002")
    save_ledger(project, Ledger(pending=entries))
    with pytest.raises(InputError, match="'r002': 'r001' comes before it"):
        begin_together(project, "r002", settings)
    save_ledger(project, Ledger(pending={"r001": entries["r001"].model_copy(update={"digest": None})}))
    with pytest.raises(InputError, match="'r001': its records are not in place"):
        begin_together(project, "r001", settings)


def test_several_processes_make_steps_and_nothing_else() -> None:
    command = [sys.executable, "-m", "flows.cli", "report"]
    done = subprocess.run(command, env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "only 'stage step'" in done.stderr


def test_alone_nothing_is_shared() -> None:
    assert processes() == 1 and shares(4) == [range(4)]
    assert list(dealt("ab")) == [("a", True), ("b", True)]
    part = torch.arange(3)
    assert joined(part) is part and torch.equal(part_of(part), part)
    with whole_batches():
        assert not is_split(model_of())


def test_buckets_hold_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, none fuller than it may be unless by one tensor."""
    monkeypatch.setattr("alkn.core.distributed.BUCKET", 100)
    tensors = [torch.zeros(n) for n in (60, 60, 20, 20, 1, 300, 5, 95, 1)]
    buckets = list(_buckets(tensors))
    assert [[t.numel() for t in bucket] for bucket in buckets] == [[60], [60, 20, 20], [1], [300], [5, 95], [1]]
    assert all(a is b for a, b in zip([t for bucket in buckets for t in bucket], tensors, strict=True))
