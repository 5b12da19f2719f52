"""``alkn certificate``: write the certificate of one request, and check one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.console import JSON, here, say

if TYPE_CHECKING:
    from alkn.project import Project
    from alkn.report.sealing import Line

OUT = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default="reports/certificates",
    help="Folder that ID.json and ID.pdf go to [default: reports/certificates].",
)  # fmt: skip
SIGN = {"holds": "ok", "differs": "DIFFERS", "not checked": "not checked"}


class _RequestOrCommand(click.Group):
    """A group whose first word is a request, unless it is one of its commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Call ``issue`` for what names no command."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["issue", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RequestOrCommand, options_metavar="", subcommand_metavar="REQUEST [OPTIONS] | verify FILE")
@OUT
@JSON
def certificate(out: Path, as_json: bool) -> None:
    """The signed certificate of one decided request: REQUEST writes it, 'verify FILE' checks it.

    It goes to ID.json (signed) and ID.pdf (to read); see docs/REPORT.md.
    """


@certificate.command("issue", hidden=True)
@click.argument("request_id", metavar="REQUEST")
@OUT
@JSON
def issue(request_id: str, out: Path, as_json: bool) -> None:
    """Write the certificate of a decided request."""
    import importlib.metadata
    from datetime import UTC, datetime

    from alkn.files import write_bytes, write_json
    from alkn.report.certificate import certificate_of
    from alkn.report.facts import check_beside, read_decided
    from alkn.report.pdf import certificate_pdf
    from alkn.report.sealing import digest_of_document, seal
    from alkn.report.signing import fingerprint, private_path, public_bytes, public_path, signing_key

    project = here()
    facts = read_decided(project, request_id)
    check_beside(project, facts)
    key, made = signing_key(project)
    document = certificate_of(
        facts,
        project=project.settings().project.name,
        issued=datetime.now(UTC).date(),
        key=fingerprint(public_bytes(key)),
        program=f"alkn {importlib.metadata.version('alkn')}",
    )
    pdf = certificate_pdf(document)
    paper, file = out / f"{request_id}.pdf", out / f"{request_id}.json"
    write_bytes(paper, pdf)
    write_json(file, seal(document, pdf, key))
    if made:
        say(
            f"a key to sign with was made: {private_path(project).relative_to(project.root)} (back it up, show it to"
            f" nobody) and {public_path(project).relative_to(project.root)} (put it into git)",
            err=True,
        )
    answer = {
        "request": request_id, "forgotten": facts.accepted, "json": str(file), "pdf": str(paper),
        "document": digest_of_document(document), "key": document["issuer"]["key"],
    }  # fmt: skip
    if as_json:
        say(json.dumps(answer))
        return
    say(document["statement"])
    for name in ("json", "pdf", "document", "key"):
        say(f"{name:<9} {answer[name]}")


@certificate.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--project", "folder", type=click.Path(path_type=Path), help="Hold it against this project's files too.")
@click.option("--public-key", "public_key", type=click.Path(path_type=Path), help="The issuer's data/certificate.pub.")
@JSON
def verify(file: Path, folder: Path | None, public_key: Path | None, as_json: bool) -> None:
    """Check a certificate offline: signatures, key, the PDF beside it, and a project's files where one is at hand.

    Without --project, the folder that this is called in is taken if it is a project and no key is given.
    """
    from alkn.errors import InputError
    from alkn.report.sealing import check
    from alkn.report.signing import public_path, read_public

    if not file.is_file():
        raise InputError(f"{file}: no such file")
    if file.suffix.lower() == ".pdf":
        raise InputError(f"{file}: the signatures stand in the JSON beside the PDF; give that file")
    project = _project(folder, public_key)
    trusted = {} if public_key is None else {str(public_key): read_public(public_key)}
    if project is not None:
        trusted["data/certificate.pub"] = read_public(public_path(project))
    paper = file.with_suffix(".pdf")
    lines = check(
        file.read_bytes(), pdf=paper.read_bytes() if paper.is_file() else None, trusted=trusted, project=project
    )
    good = not any(line.state == "differs" for line in lines)
    if as_json:
        found = [{"what": line.what, "state": line.state, "detail": line.detail} for line in lines]
        say(json.dumps({"good": good, "lines": found}))
    else:
        _show(lines, good)
    if not good:
        sys.exit(1)


def _project(folder: Path | None, public_key: Path | None) -> Project | None:
    from alkn.project import Project

    if folder is not None:
        return Project.at(folder)
    project = Project(Path(".").resolve())
    return project if public_key is None and project.params.is_file() and project.ledger.is_file() else None


def _show(lines: list[Line], good: bool) -> None:
    for line in lines:
        say(f"{SIGN[line.state]:<11}  {line.what}{': ' if line.detail else ''}{line.detail}")
    say("verified" if good else "NOT verified")
