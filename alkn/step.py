"""One step of the chain, as :mod:`alkn.planning` planned it: unlearn, evaluate, gate. Each part is safe to enter again.

The manifest decides whether a step is done; ``unlearning.json`` decides, inside a step that was
cut off, whether the unlearning is done. Everything else is made again.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from alkn import registry
from alkn.against import ReferenceModels
from alkn.attacking import attack_step
from alkn.base import project_sets
from alkn.core.distributed import is_main, joined, local, refuse_split, wait
from alkn.core.scoring import Example, Progress, no_progress
from alkn.core.sharding import split_
from alkn.core.task_vector import TaskVector
from alkn.core.unlearning import Outcome, StopRule, Task, seed_of
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.evaluation import headline, measure_model
from alkn.evidence import Evidence
from alkn.files import digest_of, read_json, read_jsonl, remove, write_json, write_via
from alkn.lora import Adapters
from alkn.manifest import outputs_hold, read_manifest, write_manifest
from alkn.models import load_model, save_model
from alkn.planning import plan_step
from alkn.project import Project, Step
from alkn.record_sets import by_domain, earlier_records, known_records, load_split
from alkn.records import Plan, Sealed, Unlearned
from alkn.refusals import REFUSALS
from alkn.requests.ledger import ATTESTED
from alkn.runtime import Runtime
from alkn.settings import Settings, load_settings
from alkn.texts import text_sets


def unlearn_step(project: Project, plan: Plan, *, progress: Progress = no_progress) -> Unlearned:
    """Run the method on the parent's model and write model, task vector and state."""
    step = project.step(plan.request)
    done = _unlearned(step, plan)
    wait()  # until nobody looks any more at what is removed now
    if done is not None:
        return done
    started = time.monotonic()
    runtime = Runtime(plan.settings.run)
    if is_main():
        for path in step.outputs:
            remove(path)
    parent = project.step(plan.previous)
    remote = plan.settings.base.trust_remote_code
    encoder = Encoder.of(parent.model, plan.settings)
    model, stored = _trainable(parent, runtime, plan.settings)
    records = load_split(project, "retain")
    retain = encoder.record_set("retain", records)
    domains = {int(record["id"]): domain for domain, group in by_domain(records).items() for record in group}
    task = Task(
        model=model,
        forget=encoder.examples(plan.request, read_jsonl(project.request(plan.request))),
        retain=retain.examples,
        retain_domains=[domains[number] for number in retain.ids],
        stop=_scaled(plan.limits, plan.settings.targets.margin),
        seed=seed_of(plan.settings.seed, "step", plan.request),
        state=load_file(parent.state) if parent.state.is_file() else {},
        eos=encoder.tokenizer.eos_token_id,
        refusals=[encoder.answer(text) for text in REFUSALS],
        stored=stored,
        before=(lambda: _trainable(parent, runtime, plan.settings)[0]) if runtime.split else None,
        autocast=runtime.autocast,
        progress=progress,
    )
    params: Any = plan.settings.method.params
    retrains, replays = plan.settings.method.name == "retrain", getattr(params, "replays", False)
    if retrains:
        task.rest = _rest(project, plan, encoder)
    if replays:
        task.earlier = _replayed(project, plan, encoder)
    if retrains or replays:
        task.origin = lambda: _trainable(_origin(project, plan), runtime, plan.settings)[0]
    with _adapted(task, plan.settings):
        outcome = registry.methods[plan.settings.method.name].call(task, params)
    # Read again, not kept: a copy of the parent would add to the peak of the training.
    before = load_model(parent.model, trust_remote_code=remote).to(stored)
    model = _whole(model, before) if runtime.split else model.cpu().to(stored)
    if is_main():
        _write(step, plan, outcome, model, encoder.tokenizer, TaskVector.between(model, before))
    wait()
    return _report(read_json(step.unlearning), seconds=time.monotonic() - started)


def evaluate_step(project: Project, plan: Plan, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Read the candidate back from disk and measure it on every set.

    Writes evaluation.json, per_record.json and metrics.json.
    """
    step = project.step(plan.request)
    metrics, per_record = measure_step(project, plan, progress=progress)
    if is_main():
        write_json(step.evaluation, metrics)
        write_json(step.per_record, per_record)
        write_json(step.metrics, headline(metrics))
    wait()
    return metrics


def measure_step(
    project: Project, plan: Plan, *, progress: Progress = no_progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a step's evaluation.json and per_record.json, measured on its model as it is stored."""
    step = project.step(plan.request)
    runtime = Runtime(plan.settings.run)
    remote = plan.settings.base.trust_remote_code
    encoder = Encoder.of(step.model, plan.settings)
    model = load_model(step.model, device=runtime.device, trust_remote_code=remote)
    if runtime.split:
        split_(model, device=runtime.device)
    size, measurable = plan.settings.evaluation.earlier_records, set(plan.earlier) - set(plan.attested)
    chosen = {name: earlier_records(project, name, size) for name in plan.earlier if name in measurable}
    sets = []
    if plan.request not in plan.attested:
        sets.append(encoder.record_set("forget", read_jsonl(project.request(plan.request))))
    sets += [encoder.record_set(f"earlier/{name}", sample.records) for name, sample in chosen.items()]
    sets += [*project_sets(project, encoder), *text_sets(project, encoder, plan.settings.evaluation)]
    measured = measure_model(
        model,
        sets,
        encoder,
        plan.settings.evaluation,
        eos=encoder.tokenizer.eos_token_id,
        progress=progress,
        references=ReferenceModels(project, plan.settings, request=plan.request).of,
        base=lambda: load_model(project.base.model, device=runtime.device, trust_remote_code=remote),
    )
    metrics, per_record = measured.numbers(), measured.per_record()
    metrics["missing"] |= {plan.set_of(name): ATTESTED for name in plan.attested}
    against = {name.split("/")[1]: digest for name, digest in plan.inputs.items() if name.startswith("reference/")}
    if against:
        metrics["references"] = against
    sampled = {
        f"earlier/{name}": sample.bounds(per_record[f"earlier/{name}"], plan.settings.evaluation.confidence)
        for name, sample in chosen.items()
        if sample.is_part
    }
    return (metrics | {"sampled": sampled} if sampled else metrics), per_record


def gate_step(project: Project, plan: Plan, unlearned: Unlearned, *, seconds: Mapping[str, float]) -> Sealed:
    """Judge the candidate by every gate, write gate.json and, last of all, the manifest."""
    step = project.step(plan.request)
    verdicts, failed = judge(
        project, plan, evaluation=read_json(step.evaluation), attacks=read_json(step.attacks), reached=unlearned.reached
    )
    accepted = not failed
    facts = {
        "previous": plan.previous,
        "earlier": list(plan.earlier),
        "accepted": accepted,
        "failed": failed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    if is_main():
        write_json(step.gate, {"accepted": accepted, "failed": failed, "gates": verdicts})
        seed = seed_of(plan.settings.seed, "step", plan.request)
        write_manifest(step, inputs=plan.inputs, outputs=step.outputs, seed=seed, facts=facts)
    wait()
    return Sealed(plan.request, accepted, "; ".join(failed), read_manifest(step) or {})


def judge(
    project: Project, plan: Plan, *, evaluation: Mapping[str, Any], attacks: Mapping[str, Any], reached: bool
) -> tuple[dict[str, Any], list[str]]:
    """What every gate of the settings says of a step's numbers, as plain values.

    Returns:
        Gate -> ``passed``, ``reason``, ``checks``; and the gates that failed with their reasons.
    """
    evidence = Evidence(
        step=evaluation,
        parent=read_json(project.step(plan.previous).evaluation),
        base=read_json(project.base.evaluation),
        attacks=attacks,
        limits=plan.limits,
        reached=reached,
        finite_weights=_finite(project.step(plan.request)),
    )
    verdicts: dict[str, Any] = {}
    failed: list[str] = []
    for name, params in plan.settings.gates.items():
        if params.enabled is False:
            verdicts[name] = {"passed": None, "reason": "switched off in the settings", "checks": []}
            continue
        verdict = registry.gates[name].call(evidence, params)
        verdicts[name] = {
            "passed": verdict.passed,
            "reason": verdict.reason,
            "checks": [dataclasses.asdict(check) for check in verdict.checks],
        }
        if verdict.passed is False:
            failed.append(f"{name}: {verdict.reason}")
    return verdicts, failed


def make_step(
    project: Project, request_id: str, *, previous: str, earlier: tuple[str, ...], progress: Progress = no_progress
) -> Sealed:
    """Make a step from its frozen settings, from beginning to end: what ``dvc repro`` runs.

    Started in several processes, all of them make it together and the first one writes.
    """
    settings = load_settings(project.step(request_id).params)
    Runtime(settings.run)  # joins the other processes, where there are others
    plan = plan_step(project, request_id, previous=previous, earlier=earlier, settings=settings)
    started = time.monotonic()
    unlearned = unlearn_step(project, plan, progress=progress)
    evaluate_step(project, plan, progress=progress)
    attack_step(project, plan, progress=progress)
    return gate_step(project, plan, unlearned, seconds={"total": time.monotonic() - started})


def _scaled(limits: StopRule, margin: float) -> StopRule:
    return StopRule(limits.p * margin, limits.exact_memorization * margin)


def _trainable(parent: Step, runtime: Runtime, settings: Settings) -> tuple[nn.Module, torch.dtype]:
    """The parent's model in float32, split where the processes split it, and the precision it is stored in."""
    remote = settings.base.trust_remote_code
    model = load_model(parent.model, device="cpu" if runtime.split else runtime.device, trust_remote_code=remote)
    stored = next(model.parameters()).dtype
    model = model.float()
    return split_(model, device=runtime.device) if runtime.split else model, stored


@torch.no_grad()
def _whole(model: nn.Module, before: nn.Module) -> nn.Module:
    """A split model's weights in one piece, in a model like ``before`` and in its precision, on the CPU."""
    made = copy.deepcopy(before)
    for name, p in model.named_parameters():
        made.get_parameter(name).copy_(joined(local(p.detach())))
    return made


def _write(
    step: Step,
    plan: Plan,
    outcome: Outcome,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    taken: TaskVector,
) -> None:
    write_via(step.model, lambda path: save_model(model, tokenizer, path))
    write_via(step.task_vector, taken.save)
    write_via(step.state, lambda path: save_file(outcome.state, path))
    report = {
        "inputs": dict(plan.inputs),
        "outputs": {path.name: digest_of(path) for path in (step.model, step.task_vector, step.state)},
        "reached": outcome.reached,
        "passes": outcome.passes,
        "task_vector": {"nonzero": taken.nnz, "norm": taken.norm},
        "rounds": outcome.history,
    }
    write_json(step.unlearning, report)


@contextmanager
def _adapted(task: Task, settings: Settings) -> Iterator[None]:
    """Where the settings say so, what the task trains are adapters; they are merged at the end."""
    if settings.lora.rank is None:
        yield
        return
    refuse_split(task.model, "lora.rank: training adapters")
    adapters = Adapters(task.model, settings.lora, seed=seed_of(settings.seed, "lora"))
    task.linear = settings.lora.train == "b"
    if task.stored is not torch.float32:
        task.as_stored = lambda: adapters.as_stored(task.stored)
    yield
    adapters.merge()


def _unlearned(step: Step, plan: Plan) -> Unlearned | None:
    """The finished unlearning of a step that was cut off later, if its inputs and outputs still hold."""
    if not step.unlearning.is_file():
        return None
    report = read_json(step.unlearning)
    if report["inputs"] != dict(plan.inputs) or not outputs_hold(step, report):
        return None
    return _report(report, seconds=0.0)


def _report(report: Mapping[str, Any], *, seconds: float) -> Unlearned:
    rounds = report["rounds"]
    return Unlearned(report["reached"], rounds[0], rounds[-1], int(rounds[-1]["round"]), report["passes"], seconds)


def _rest(project: Project, plan: Plan, encoder: Encoder) -> list[Example]:
    """What the base model was trained on beside the retain records, less what the chain forgets up to here.

    A record is left out if it reads, token for token, like one of this or an earlier request: requests
    need not have the names, the order or the whole of the benchmark's files.

    Raises:
        InputError: if the base model was not trained here: then nobody knows its training data; or if an earlier
            request's records were erased.
    """
    if "parameters" not in (read_manifest(project.base) or {}):
        raise InputError("method: retrain needs a base model that was trained here, and this one comes from base.model")
    if plan.attested:
        raise InputError(f"method: retrain cannot leave out what it cannot read: {', '.join(plan.attested)} was erased")
    gone = {
        tuple(example.tokens.tolist())
        for name in (*plan.earlier, plan.request)
        for example in encoder.examples(name, read_jsonl(project.request(name)))
    }
    sets = {"utility": load_split(project, "utility"), **known_records(project)}
    examples = [example for name, records in sets.items() for example in encoder.examples(name, records)]
    return [example for example in examples if tuple(example.tokens.tolist()) not in gone]


def _replayed(project: Project, plan: Plan, encoder: Encoder) -> list[Example]:
    """The records of the earlier requests that can still be read, in the order of the chain."""
    names = [name for name in plan.earlier if name not in plan.attested]
    return [example for name in names for example in encoder.examples(name, read_jsonl(project.request(name)))]


def _origin(project: Project, plan: Plan) -> Step:
    """The base model, or the last step whose request was erased: it has forgotten all that cannot be replayed."""
    return next((project.step(name) for name in reversed(plan.earlier) if name in plan.attested), project.base)


def _finite(step: Step) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for file in sorted(step.model.glob("*.safetensors"))
        for tensor in load_file(file).values()
    )
