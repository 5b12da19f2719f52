"""Where the arithmetic of a process runs, and in which precision: one process makes steps of any."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from alkn.errors import InputError
from alkn.files import read_json
from alkn.project import Project
from alkn.runtime import Runtime
from alkn.settings import Run
from alkn.step import make_step


def test_each_precision_in_one_process() -> None:
    """Whatever came before it."""
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)):
        runtime = Runtime(Run(device="cpu", precision=precision))
        with runtime.autocast():
            assert (a @ b).dtype is expected, precision
        assert runtime.device == torch.device("cpu") and not runtime.split


def test_it_takes_as_many_threads_as_it_is_given() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (3, 2):
            Runtime(Run(device="cpu", threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one taken that ``accelerate launch --cpu`` leaves alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"params.yaml: run.device: 'cuda' is asked for, and torch finds no CUDA"):
        Runtime(Run(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match="or was launched without"):
        Runtime(Run(device="cuda"))
    assert Runtime(Run()).device == torch.device("cpu")


def test_a_gpu_is_bf16_unless_it_is_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    Runtime(Run(device="cpu"))  # what accelerate keeps for the process is made without the pretended one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for precision, expected in (("auto", True), ("bf16", True), ("fp32", False)):
        runtime = Runtime(Run(device="cuda", precision=precision))
        assert runtime.device == torch.device("cuda")
        assert (runtime.autocast is not nullcontext) is expected, precision


def test_a_chain_whose_precision_changes(tiny_project: Callable[..., Project]) -> None:
    """The second step trains in bf16 and stores float32; both are made, and made again, by one process."""
    method = {"name": "gradient_difference", "steps": 4, "check_every": 2, "lr": 3e-3}
    single = tiny_project("r001", "r002", method=method)
    mixed = tiny_project("r001", method=method)
    bf16 = tiny_project("r002", method=method, run={"threads": 1, "device": "cpu", "precision": "bf16"})
    mixed.step("r002").folder.mkdir(parents=True)
    mixed.step("r002").params.write_bytes(bf16.step("r002").params.read_bytes())
    models = {}
    for project in (single, mixed, mixed):
        make_step(project, "r001", previous="base", earlier=())
        make_step(project, "r002", previous="r001", earlier=("r001",))
        first, second = (read_json(project.step(name).unlearning)["outputs"]["model"] for name in ("r001", "r002"))
        assert models.setdefault((project.root, 1), first) == first
        assert models.setdefault((project.root, 2), second) == second
    assert models[single.root, 1] == models[mixed.root, 1] and models[single.root, 2] != models[mixed.root, 2]
    before, full, half = (
        load_file(project.step(name).model / "model.safetensors")
        for project, name in ((single, "r001"), (single, "r002"), (mixed, "r002"))
    )
    assert {t.dtype for t in half.values()} == {torch.float32}
    away = torch.cat([(half[name] - w).flatten() for name, w in full.items()])
    moved = torch.cat([(w - before[name]).flatten() for name, w in full.items()])
    assert float(away.norm()) < 0.3 * float(moved.norm()), "the same step but for rounding"
