"""A certificate's file: the document, the signatures, the public key; and how it is checked."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alkn.errors import AlknError
from alkn.files import digest_of, keyed_digest_of
from alkn.project import Project
from alkn.report.canonical import canonical, read_strictly
from alkn.report.certificate import FACTS, FORMAT, KIND, certificate_of
from alkn.report.facts import read_decided
from alkn.report.signing import fingerprint, holds, public_bytes, sign
from alkn.requests.ids import PATTERN

PDF_KIND = "alkn.certificate.pdf"
NOT_COMPARED = ("interval", "reference", "base")
"""Beside a number, and free to be there or not when a certificate is checked: its own digests cover what matters."""

Id = Annotated[str, Field(pattern=f"^{PATTERN.pattern}$")]
State = Literal["holds", "differs", "not checked"]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    what: str
    state: State
    detail: str = ""


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: Id


class _Chain(BaseModel):
    model_config = ConfigDict(extra="allow")
    previous: Id


class _Digests(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inputs: dict[str, str]
    outputs: dict[str, str]
    manifest: str


class _Issuer(BaseModel):
    model_config = ConfigDict(extra="allow")
    key: str


class _Certificate(BaseModel):
    """What a check needs of a document; the rest is free to grow."""

    model_config = ConfigDict(extra="allow")
    kind: Literal["alkn.certificate"]
    format: Literal[1]
    forgotten: bool
    request: _Request
    chain: _Chain
    digests: _Digests
    issuer: _Issuer


class _Pdf(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["alkn.certificate.pdf"]
    certificate: str
    digest: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    certificate: _Certificate
    signature: str
    pdf: _Pdf
    pdf_signature: str
    public_key: str


def digest_of_document(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document's canonical JSON; the PDF shows it."""
    return f"sha256:{hashlib.sha256(canonical(document)).hexdigest()}"


def seal(document: Mapping[str, Any], pdf: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The content of a certificate's JSON file: the document and its PDF, each signed."""
    paper = {
        "kind": PDF_KIND,
        "certificate": digest_of_document(document),
        "digest": f"sha256:{hashlib.sha256(pdf).hexdigest()}",
    }
    return {
        "certificate": dict(document),
        "signature": sign(key, document),
        "pdf": paper,
        "pdf_signature": sign(key, paper),
        "public_key": base64.b64encode(public_bytes(key)).decode(),
    }


def check(
    content: bytes, *, pdf: bytes | None = None, trusted: Mapping[str, bytes], project: Project | None = None
) -> list[Line]:
    """Look at everything that can be looked at; nothing is fetched.

    Args:
        content: of the JSON file.
        pdf: of the PDF that belongs to it, where there is one.
        trusted: where it comes from -> a public key (DER) that the certificate must be signed with.
        project: whose files are held against it.

    Returns:
        A line each; the certificate is good if none of them ``differs``.
    """
    try:
        file = read_strictly(content)
        _File.model_validate(file)
        document, paper = file["certificate"], file["pdf"]
        der = base64.b64decode(file["public_key"], validate=True)
        digest = digest_of_document(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return [Line("form", "differs", f"not a certificate of format {FORMAT}: {'.'.join(map(str, first['loc']))}")]
    except (ValueError, RecursionError):
        return [Line("form", "differs", f"not the JSON of a certificate ({KIND}, format {FORMAT})")]
    lines = [
        _line("signature", holds(der, file["signature"], document), digest, "the document was changed, or forged"),
        _line(
            "key in the document", document["issuer"]["key"] == fingerprint(der), fingerprint(der),
            f"it names {_shown(document['issuer']['key'])}, and is signed with {fingerprint(der)}",
        ),
        *_trust(der, trusted),
        *_paper(der, file, paper, digest, pdf),
    ]  # fmt: skip
    return lines + (list(_against(document, project)) if project is not None else [])


def _trust(der: bytes, trusted: Mapping[str, bytes]) -> Iterator[Line]:
    if not trusted:
        yield Line(
            "whose key", "differs",
            "anybody can sign with a key of their own: give the issuer's public key or the project",
        )  # fmt: skip
    for source, known in trusted.items():
        yield _line("whose key", known == der, f"that of {source}", f"not that of {source}, {fingerprint(known)}")


def _paper(
    der: bytes, file: Mapping[str, Any], paper: Mapping[str, Any], digest: str, pdf: bytes | None
) -> Iterator[Line]:
    signed = holds(der, file["pdf_signature"], paper) and paper["certificate"] == digest
    yield _line("signature of the PDF", signed, paper["digest"], "it belongs to another document, or was changed")
    if pdf is None:
        yield Line("PDF", "not checked", "there is none beside the file")
        return
    found = f"sha256:{hashlib.sha256(pdf).hexdigest()}"
    yield _line("PDF", signed and found == paper["digest"], "", "not the one that was issued with this certificate")


def _against(document: Mapping[str, Any], project: Project) -> Iterator[Line]:
    """The document against the project's files: digests first, then every number, check and date."""
    request, previous = document["request"]["id"], document["chain"]["previous"]
    step, digests = project.step(request), document["digests"]
    places: dict[str, tuple[Path, str]] = {
        "manifest.json": (step.manifest, digests["manifest"]),
        **{p.name: (p, digests["outputs"][p.name]) for p in step.outputs if p.name in digests["outputs"]},
    }
    parent = project.step(previous)
    inputs = {
        "settings": step.params, "parent": parent.model, "parent_evaluation": parent.evaluation, "state": parent.state,
        "base": project.base.model, "base_evaluation": project.base.evaluation, "splits": project.splits,
    }  # fmt: skip
    places |= {name: (path, digests["inputs"][name]) for name, path in inputs.items() if name in digests["inputs"]}
    for name, (path, wanted) in places.items():
        where = path.relative_to(project.root).as_posix()
        if wanted == "none":
            continue
        if not path.exists():
            yield Line(name, "not checked", f"{where} is not here")
        else:
            yield _compared(name, wanted, digest_of(path), where)
    yield _request(project, request, digests["inputs"].get("request", ""))
    yield from _numbers(document, project, request)


def _request(project: Project, request: str, wanted: str) -> Line:
    path = project.request(request)
    where = path.relative_to(project.root).as_posix()
    if not path.is_file():
        return Line("request", "not checked", f"{where} is not here")
    if not (project.private / "key").is_file():
        return Line("request", "not checked", "the key of the digests, .alkn/key, is not here")
    return _compared("request", wanted, keyed_digest_of(path, project.key()), where)


def _numbers(document: Mapping[str, Any], project: Project, request: str) -> Iterator[Line]:
    try:
        facts = read_decided(project, request, check=False)
    except AlknError as error:
        yield Line("numbers", "differs", str(error))
        return
    now = certificate_of(facts, project="", issued=date.min, key="", program="")
    now["digests"] = document["digests"]  # looked at above, file by file
    said, found = ({name: value for name, value in _leaves(one)} for one in (document, now))
    differing = [name for name in {**said, **found} if said.get(name, ...) != found.get(name, ...)]
    for name in differing:
        in_document = _shown(said[name]) if name in said else "nothing"
        in_project = _shown(found[name]) if name in found else "nothing"
        yield Line(_printable(name), "differs", f"the certificate says {in_document}, the project {in_project}")
    if not differing:
        yield Line("numbers", "holds", f"{len(said)} numbers, checks and dates are those of the project")


def _leaves(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted name -> value of every fact that stands in the project too."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                if not (name.startswith("metrics") and key in NOT_COMPARED):
                    yield from walk(f"{name}.{key}", inner)
        elif isinstance(value, list) and value:
            for number, inner in enumerate(value):
                yield from walk(f"{name}.{number}", inner)
        else:
            yield name, value

    for name in FACTS:
        if name in document:
            yield from walk(name, document[name])


def _compared(name: str, wanted: str, found: str, where: str) -> Line:
    return _line(name, wanted == found, where, f"{where} has {found}, the certificate says {_shown(wanted)}")


def _line(what: str, good: bool, detail: str, fault: str) -> Line:
    return Line(what, "holds", detail) if good else Line(what, "differs", fault)


def _shown(value: Any) -> str:
    return _printable(value if isinstance(value, str) else repr(value))


def _printable(text: str) -> str:
    """Text of a file that nobody vouches for: without what moves a cursor, and not endless."""
    return "".join(c if c.isprintable() else "?" for c in text[:160])
