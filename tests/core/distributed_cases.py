"""What two gloo processes run, and one alone: a step in parts, whole requests, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alkn import registry
from alkn.chain import begin_together
from alkn.core.adversary import Resistance
from alkn.core.descent import Pace, descend, divergence_term, retain_term
from alkn.core.distributed import (
    dealt,
    joined,
    joined_rows,
    part_of,
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
from alkn.project import Project
from alkn.runtime import Runtime
from alkn.settings import Run
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
