"""The chain as the report tells it: all decided requests with their files, and what was found over the chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alkn.errors import AlknError
from alkn.manifest import read_manifest
from alkn.project import Project
from alkn.report.facts import Decided, Numbers, optional, read_decided
from alkn.requests.ledger import BASE, Ledger, load_ledger

Row = dict[str, Any]
"""A line of a table: column -> value."""
HEADLINE = ("probability", "exact_memorization")


@dataclass(frozen=True)
class Story:
    """A project's chain.

    Attributes:
        name: of the project.
        ledger: all requests.
        accepted, rejected: those with a verdict whose files could be read, in the ledger's order.
        unread: request -> why its files could not be read.
        base: evaluation of the base model.
        digests: model -> digest of its folder, as its manifest says.
        matrix: of reports/matrix.json, if it is of these models; ``None`` if not there.
        verified: of reports/verify.json; ``None`` if not there.
    """

    name: str
    ledger: Ledger
    accepted: tuple[Decided, ...]
    rejected: tuple[Decided, ...]
    unread: Mapping[str, str]
    base: Numbers
    digests: Mapping[str, str]
    matrix: Numbers | None
    verified: Numbers | None

    @property
    def decided(self) -> tuple[Decided, ...]:
        """Accepted ones first."""
        return self.accepted + self.rejected

    @property
    def domains(self) -> list[str]:
        """The utility sets, as the base model's evaluation names them."""
        return [name.partition("/")[2] for name in self.base.get("sets", {}) if name.startswith("utility/")]


def read_story(project: Project, name: str, *, check: bool = True) -> Story:
    """Read everything that the report tells; a step that cannot be read is named with the reason.

    Args:
        project: whose chain.
        name: of the project.
        check: hold every output of every step against its digest first.
    """
    ledger = load_ledger(project)
    read: dict[str, list[Decided]] = {"accepted": [], "rejected": []}
    unread: dict[str, str] = {}
    for verdict, found in read.items():
        for request in getattr(ledger, verdict):
            try:
                found.append(read_decided(project, request, check=check))
            except AlknError as error:
                unread[request] = str(error)
    digests = {}
    for model in (BASE, *ledger.accepted, *ledger.rejected):
        manifest = read_manifest(project.step(model))
        if manifest is not None:
            digests[model] = str(manifest["outputs"]["model"])
    matrix = optional(project.root / "reports" / "matrix.json")
    current = {model: digest for model, digest in digests.items() if model not in ledger.rejected}
    if matrix is not None and matrix.get("digests", {}).get("models") != current:
        matrix = None
    return Story(
        name=name, ledger=ledger, accepted=tuple(read["accepted"]), rejected=tuple(read["rejected"]), unread=unread,
        base=optional(project.base.evaluation) or {}, digests=digests, matrix=matrix,
        verified=optional(project.root / "reports" / "verify.json"),
    )  # fmt: skip


def forgetting_rows(story: Story) -> Iterator[Row]:
    """P and exact memorization of each request's records after each step of its unlearning."""
    for facts in story.decided:
        for row in facts.unlearning["rounds"]:
            yield {
                "request": facts.id, "step": int(row["round"]), "probability": row["p"],
                "exact_memorization": row["exact_memorization"],
            }  # fmt: skip


def utility_rows(story: Story) -> Iterator[Row]:
    """P of each utility domain under the base model and after each accepted request."""
    models = {BASE: story.base, **{facts.id: facts.evaluation for facts in story.accepted}}
    for domain in story.domains:
        for number, (model, evaluation) in enumerate(models.items()):
            p = evaluation.get("sets", {}).get(f"utility/{domain}", {}).get("probability")
            if p is not None:
                yield {"domain": domain, "requests": number, "model": model, "probability": p}


def matrix_rows(story: Story) -> Iterator[Row]:
    """Every accepted model on every accepted request: from the matrix, else what the steps' own evaluations hold."""
    requests = [facts.id for facts in story.accepted]
    models = [BASE, *requests]
    cells = matrix_cells(story)
    for request in requests:
        for model in models:
            cell = cells.get(model, {}).get(request)
            if cell is not None:
                yield {"model": model, "request": request} | {name: cell.get(name) for name in (*HEADLINE, "error")}


def matrix_cells(story: Story) -> Mapping[str, Mapping[str, Numbers]]:
    """Model -> request -> P, exact memorization and, where it was sampled, how far they may be off."""
    if story.matrix is not None:
        return dict(story.matrix["cells"])
    cells: dict[str, dict[str, Numbers]] = {}
    for facts in story.accepted:
        if facts.base_row("forget"):
            cells.setdefault(BASE, {})[facts.id] = facts.base_row("forget")
        cells.setdefault(str(facts.manifest["previous"]), {}).setdefault(facts.id, facts.before)
        for name, row in facts.evaluation["sets"].items():
            request = facts.id if name == "forget" else name.partition("/")[2] if name.startswith("earlier/") else None
            if request is not None:
                cells.setdefault(facts.id, {})[request] = row
    return cells


def attack_rows(story: Story) -> Iterator[Row]:
    """What each attack on each step's model brought back for what it spent."""
    for facts in story.decided:
        for attack, curve in (facts.attacks or {}).items():
            if attack == "missing":
                continue
            for point in curve["points"]:
                yield {
                    "request": facts.id, "attack": attack, "variant": point.get("name", ""), "unit": curve["unit"],
                    "spent": point["at"], "probability": point["probability"],
                    "exact_memorization": point["exact_memorization"], "rouge_l": point.get("rouge_l"),
                    "contained": point.get("contained"),
                }  # fmt: skip


TABLES = {
    "forgetting": forgetting_rows,
    "utility": utility_rows,
    "matrix": matrix_rows,
    "attacks": attack_rows,
}
"""The tables behind the pictures, each a CSV that ``dvc plots`` reads too."""
