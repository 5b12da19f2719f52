"""Two gloo processes against one: gradients, m, masks, norms and a step in float64, and whole requests.

Both forms are run: whole copies of the model in both processes (DDP), and weights split over them (FSDP2).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alkn import registry
from alkn.chain import begin_together
from alkn.core.adversary import Resistance
from alkn.core.descent import Pace, descend, divergence_term, retain_term
from alkn.core.distributed import (
    _buckets,
    dealt,
    is_split,
    joined,
    joined_rows,
    part_of,
    processes,
    shares,
    whole_batches,
)
from alkn.core.generation import greedy
from alkn.core.gradient_mask import accumulate_, overlap_penalty, threshold, top_share_mask, top_share_masks
from alkn.core.scoring import Example, answer_logits, collate, mean_gradient, score
from alkn.core.sequence_losses import ascent_loss
from alkn.core.sharding import split_
from alkn.core.sophia import gauss_newton_bartlett
from alkn.core.training import Hyperparameters, anchored_loss, answer_loss, fine_tune, level_loss
from alkn.core.unlearning import StopRule, Task
from alkn.errors import InputError
from alkn.files import keyed_digest_of, read_json, write_yaml
from alkn.project import Project
from alkn.requests.ledger import Entry, Ledger, save_ledger
from alkn.runtime import Runtime
from alkn.settings import Run, validate_settings
from alkn.step import make_step

CPU = torch.device("cpu")
NEVER = StopRule(0.0, 0.0)
FORMS = ("copies", "split")
RUNS = {
    "interleaved": {"name": "alkn", "rehearsal": 16, "decay_steps": 20, "steps": 100, "lr": 1e-3, "forget_weight": 4.0},
    "rounds": {"name": "alkn", "preset": "rounds", "batch_size": 4, "estimator": "exact"},
}
TOGETHER = ("interleaved.copies", "interleaved.split", "rounds.copies")
NEAR = {"interleaved": 1e-4, "rounds": 5e-3}
"""In float32 a sum in another order is another number; in rounds it moves a coordinate into a mask or out of it."""
CHAINS = {"interleaved": ("r001", "r002"), "rounds": ("r001",)}
"""What one coordinate changes, a second request of ``rounds`` makes larger: their P was .011 apart."""
PENDING = "interleaved.copies"
"""Its first request is begun as a pending one; the others are made again, like accepted ones."""


def model_of(seed: int = 0) -> nn.Module:
    """Odd sizes, so that the parts of the two processes differ; float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=301, hidden_size=36, intermediate_size=63, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).double().eval()


def examples_of(count: int, seed: int) -> list[Example]:
    """Random records; made here, because a spawned process does not know the fixtures."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 16, (count,), generator=generator).tolist()
    starts = [int(torch.randint(3, n - 1, (), generator=generator)) for n in lengths]
    tokens = [torch.randint(1, 300, (n,), generator=generator) for n in lengths]
    return [Example(torch.cat([t, torch.tensor([0])]), start) for t, start in zip(tokens, starts, strict=True)]


def task_of(form: str, **more: Any) -> Task:
    """The same request in each form; ``one`` is a single process."""

    def fresh() -> nn.Module:
        model = model_of()
        return split_(model, device=CPU) if form == "split" else model

    before = fresh if form == "split" else None
    given = {"forget": examples_of(5, 1), "retain": examples_of(7, 2), "stop": NEVER, "seed": 3, "before": before}
    return Task(fresh(), **{"stored": torch.float64, **given, **more})


def full(task: Task, parts: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": task.whole(part).clone() for name, part in parts.items()}


def one_step(form: str) -> dict[str, Tensor]:
    """G_r, clipped gradients, m, masks and weights of one optimizer step of a fine-tuning."""
    task = task_of(form)
    weights = [torch.linspace(0.1, 1, e.answer_length, dtype=torch.float64) for e in task.forget]
    g_r = mean_gradient(task.model, task.retain, [0, 1, 1, 4, 6])
    out = full(task, g_r, "g_r")
    m = {name: torch.zeros_like(w) for name, w in task.weights().items()}
    group, random = task.shards, torch.Generator().manual_seed(0)

    def on_gradient(_: int, __: Any) -> None:
        gradients = task.gradients()
        out.update(full(task, gradients, "gradient"))
        for name, gradient in gradients.items():
            penalty = overlap_penalty(gradient, g_r[name], form="product_std", factor=2.0, group=group)
            out[f"penalty.{name}"] = penalty.clone()
            accumulate_(m[name], gradient, g_r[name], previous=task.random(name, random) < 0.5, penalty=penalty)

    hp = Hyperparameters(lr=1e-2, epochs=1, batch_size=5, clip=0.5, weight_decay=0.1)
    order = torch.Generator().manual_seed(0)
    fine_tune(
        task.model, task.forget, hp, loss=answer_loss(weights), generator=order, before_step=on_gradient,
    )  # fmt: skip
    out |= full(task, m, "m") | full(task, task.weights(), "weight")
    for name, ranking in m.items():
        for estimator in ("exact", "trimmed_linear", "sampled"):
            generator = torch.Generator().manual_seed(1)
            eta = threshold(ranking, 0.3, estimator=estimator, generator=generator, group=group)  # type: ignore[arg-type]
            out[f"eta.{estimator}.{name}"] = eta.clone()
        out[f"mask.{name}"] = task.whole(top_share_mask(ranking, 0.1, group=group))
    out |= full(task, top_share_masks(m, 0.1, group=group), "model_mask")
    return out


def descended(form: str) -> dict[str, Tensor]:
    """Three steps each: weighted ascent with a divergence term and with one that holds hidden states, a loss towards a
    level on batches of one record, and that loss with an adversary and an earlier request."""
    task = task_of(form)
    pace = Pace(
        lr=1e-3, steps=3, decay_steps=3, lr_floor=0.1, check_every=1, batch_size=4, retain_batch=3, weight_decay=0.0,
        clip=1.0,
    )  # fmt: skip
    anchored = retain_term(task, anchored_loss(task.teacher(), hidden=0.3), pace)
    outcome = descend(task, pace, forget=ascent_loss(torch.sqrt), keep=divergence_term(task, pace))
    descend(task, pace, forget=ascent_loss(torch.sqrt), keep=anchored)
    odds = level_loss([torch.zeros(e.answer_length) for e in task.forget], scale=2.0, reach=1.0)
    more = descend(task, replace(pace, batch_size=1, retain_batch=1), forget=odds, keep=None)
    task.earlier = task.retain
    resist = Resistance(
        level_loss([torch.zeros(e.answer_length) for e in (*task.forget, *task.earlier)], scale=2.0, reach=1.0),
        weight=0.7, lr=1e-3, steps=2, share=0.4, earlier=0.5,
    )  # fmt: skip
    last = descend(task, replace(pace, batch_size=2), forget=resist.loss, keep=None, resist=resist, replay=2)
    rows = [row[key] for row in (*outcome.history, *more.history, *last.history) for key in ("p", "exact_memorization")]
    return full(task, task.weights(), "descended") | {"history": torch.tensor(rows, dtype=torch.float64)}


def read(form: str) -> dict[str, Tensor]:
    """What is only read: scores, answers, the loss of a batch, weights that are set and rounded."""
    task = task_of(form, stored=torch.bfloat16)
    scores = score(task.model, task.retain, max_tokens=30)
    # One process would run the first of these two batches in parts, and the second, all short, at once.
    long = [Example(torch.arange(1, 51), 45), Example(torch.arange(51, 101), 40)]
    uneven = score(task.model, [*long, *examples_of(22, 4)], max_tokens=600)
    answers = greedy(task.model, [e.tokens[:3] for e in task.retain], eos=0, max_new_tokens=5, max_tokens=20)
    batch = collate(task.forget, [3, 0, 2], device=CPU)
    out = {
        "nll": scores.nll, "probs": torch.cat(scores.token_probs), "hits": torch.cat(scores.token_hits),
        "answers": torch.tensor([answer + [-1] * (5 - len(answer)) for answer in answers]),
        "logits": answer_logits(task.model, batch).detach(), "ascent": ascent_loss()(task.model, batch).detach(),
        "uneven": uneven.nll, "stored": torch.tensor(task.measure_stored()[0].p, dtype=torch.float64),
    }  # fmt: skip
    theta = task.copy_weights()
    task.set_weights(theta, {name: 0.1 * t for name, t in theta.items()}, 2.0)
    return out | full(task, task.weights(), "set") | {"after": score(task.model, task.forget).nll}


def methods(form: str) -> dict[str, Tensor]:
    """Masks that go from one call to the next: rounds and the printed form, with M and a rate that depends on it."""
    out: dict[str, Tensor] = {}
    shared = {"retain_sample": 4, "batch_size": 3}
    for name, params in {
        "rounds": {"preset": "rounds", "steps": 2, "overlap": "gradient_std", "criterion": "m", "estimator": "exact"},
        "tensor": {"preset": "derived", "epochs": 2, "warmup_epochs": 0, "estimator": "exact", "scale": 1.0},
        "paper": {"preset": "paper", "epochs": 1},
        "random": {"preset": "rounds", "steps": 1, "criterion": "random", "scope": "model", "estimator": "exact"},
    }.items():
        entry = registry.methods["alkn"]
        state: dict[str, Tensor] = {}
        for call in (0, 1):
            task = task_of(form, state=state, seed=call)
            read_by = {k: v for k, v in shared.items() if name in ("rounds", "random") or k == "batch_size"}
            state = entry.call(task, entry.params(**{**read_by, **params})).state
        out |= full(task, task.weights(), name) | {f"{name}.{key}": t.clone() for key, t in state.items()}
    return out


def everything(form: str) -> dict[str, Tensor]:
    return {**one_step(form), **descended(form), **read(form), **methods(form)}


def start(rank: int, port: int) -> None:
    """What ``torchrun`` tells a process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def work(rank: int, port: int, folder: str, projects: Mapping[str, str]) -> None:
    start(rank, port)
    Runtime(Run(device="cpu", threads=1))
    for form in FORMS:
        save_file(everything(form), f"{folder}/{form}{rank}.safetensors")
    facts = {
        "dealt": torch.tensor([[item, counts] for item, counts in dealt(range(5))]),
        "joined": joined(part_of(torch.arange(7))),
        "empty": joined(part_of(torch.ones(1, 3, dtype=torch.bool))),
        "rows": rows_gradient(rank),
        "curvature": torch.cat([t.flatten() for t in curvature()]),
        "refused": torch.tensor(refused()),
    }
    save_file(facts, f"{folder}/facts{rank}.safetensors")
    for name, root in projects.items():
        os.environ["ACCELERATE_USE_FSDP"] = "true" if name.endswith("split") else "false"
        project = Project(Path(root))
        if name == PENDING:
            assert begin_together(project, "r001", project.settings()) == ("base", ())
        make_chain(project, CHAINS[run_of(name)])
    torch.distributed.destroy_process_group()


def run_of(name: str) -> str:
    """Which of :data:`RUNS` a project's name begins with."""
    return name.split(".")[0]


def make_chain(project: Project, requests: Sequence[str]) -> None:
    """Each on the model of the one before, given the records of all before."""
    for number, request in enumerate(requests):
        make_step(project, request, previous=("base", *requests)[number], earlier=tuple(requests[:number]))


def rows_gradient(rank: int) -> Tensor:
    """d/dx of Σ i · y_i² over the gathered rows y, in this process's x; 3 rows here, 1 there."""
    x = torch.arange(1.0, 5.0).split([3, 1])[rank].clone().requires_grad_()
    (joined_rows(x, [3, 1]).square() * torch.arange(1.0, 5.0)).sum().backward()
    assert x.grad is not None
    return joined(x.grad)


def curvature() -> list[Tensor]:
    task = task_of("copies")
    batch = collate(task.forget, [0, 1, 2], device=CPU)
    parameters = list(task.model.parameters())
    return gauss_newton_bartlett(task.model, batch, parameters, generator=torch.Generator().manual_seed(0))


def refused() -> list[bool]:
    """Whether methods that need whole weights say so."""
    out = []
    for name in ("rmu", "wagle", "second_order", "retrain"):
        entry = registry.methods[name]
        try:
            entry.call(task_of("split"), entry.params())
            out.append(False)
        except InputError as error:
            out.append(name in str(error) and "FSDP" in str(error))
    return out


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
