"""The certificate: what it says, and that a forged, changed, swapped or foreign one is told."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pypdf import PdfReader
from report_sample import RECORDS, SECRETS, make_sample

from alkn.errors import AlknError, ChainBroken, InputError
from alkn.files import read_json, write_bytes, write_json, write_jsonl
from alkn.project import Project
from alkn.report.canonical import canonical
from alkn.report.certificate import certificate_of
from alkn.report.facts import read_decided
from alkn.report.pdf import certificate_pdf
from alkn.report.sealing import Line, check, seal
from alkn.report.signing import fingerprint, private_path, public_bytes, public_path, read_public, signing_key
from flows.cli import cli


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_sample(tmp_path / "project")


def document_of(project: Project, request: str) -> dict[str, Any]:
    key, _ = signing_key(project)
    return certificate_of(
        read_decided(project, request),
        project="sample", issued=date(2026, 11, 21), key=fingerprint(public_bytes(key)), program="alkn 0",
    )  # fmt: skip


PAPER = b"stands in for a PDF where no test reads it"


def issued(project: Project, request: str = "r002") -> dict[str, Any]:
    """A certificate as its file holds it."""
    return json.loads(json.dumps(seal(document_of(project, request), PAPER, signing_key(project)[0])))


def looked_at(file: dict[str, Any], project: Project, **more: Any) -> dict[str, Line]:
    trusted = {"data/certificate.pub": read_public(public_path(project))}
    lines = check(json.dumps(file).encode(), trusted=trusted, project=project, **more)
    return {line.what: line for line in lines}


def differing(lines: dict[str, Line]) -> dict[str, str]:
    return {what: line.detail for what, line in lines.items() if line.state == "differs"}


def alkn(folder: Path, *arguments: str) -> Any:
    """The command line in a folder, and back."""
    here = os.getcwd()
    try:
        return CliRunner().invoke(cli, ["-C", str(folder), *arguments])
    finally:
        os.chdir(here)


def words_of(pdf: bytes) -> str:
    text = "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)
    return " ".join(text.split())


def test_it_says_what_was_asked_measured_and_judged(project: Project) -> None:
    document = document_of(project, "r002")
    assert document["forgotten"] is True
    assert document["request"] == {
        "id": "r002", "verdict": "accepted", "records": RECORDS, "received": "2026-10-02", "due": "2026-11-02",
        "decided": "2026-11-02", "late": False, "reason": None, "overlaps": {"retain": 2},
    }  # fmt: skip
    evaluation, manifest = read_json(project.step("r002").evaluation), read_json(project.step("r002").manifest)
    p = document["metrics"]["forget"]["probability"]
    assert p["value"] == evaluation["sets"]["forget"]["probability"]
    assert (p["before"], p["base"]) == (
        0.6,
        read_json(project.base.evaluation)["sets"]["known/r002"]["probability"],
    )
    low, high = p["interval"]
    assert low < p["value"] < high
    assert list(p["reference"].values()) == [0.012] and next(iter(p["reference"])).startswith("sha256:")
    assert document["metrics"]["retain/facts"]["probability"]["reference"] == {"sha256:ceiling": 0.655}
    assert "interval" not in document["metrics"]["forget"]["truth_ratio"]
    assert document["metrics"]["forget"]["loss_auc"] == {"value": 0.6, "interval": [0.5, 0.7], "base": 0.6}
    assert not [name for name in document["metrics"]["forget"] if name.startswith("loss_auc_")]
    assert document["attacks"]["relearning"]["points"][-1]["probability"] == 0.45
    assert document["attacks"]["relearning"]["budget"] == {"share": 0.1, "lr": 5e-4}
    assert document["gates"]["forgetting"]["checks"][0]["limit"] == 0.05
    assert document["digests"]["outputs"] == manifest["outputs"]
    assert document["digests"]["inputs"]["request"].startswith("hmac-sha256:")
    assert document["seed"] == str(2**60)
    assert {line["what"]: line["why"] for line in document["not_measured"]} == {
        "rouge_l on holdout": "evaluation.generate does not name this set",
        "model_utility": "no utility set",
        "attack paraphrase": "no record has a paraphrased question",
        "gate robustness": "there is no attack",
        "intervals of truth_ratio": "it has no values per record",
    }


def test_what_is_not_there_is_named(project: Project) -> None:
    told = {line["what"]: line["why"] for line in document_of(project, "r003")["not_measured"]}
    assert told["attacks"] == "the step has no attacks.json: it was made without attacks"
    assert "no reference model" in told["distance from a model that never saw the records"]


def test_a_rejected_request_is_told_as_not_forgotten(project: Project) -> None:
    document = document_of(project, "r003")
    assert document["forgotten"] is False
    assert "NOT carried out" in document["statement"] and "NOT forgotten" in document["statement"]
    assert "utility: facts kept of base 0.2, limit 0.9" in document["statement"]
    text = words_of(certificate_pdf(document))
    assert "NOT FORGOTTEN: the request was rejected" in text and "FORGOTTEN, as measured" not in text


def gone(project: Project) -> None:
    project.step("r002").attacks.unlink()


def failed(project: Project) -> None:
    manifest = read_json(project.step("r002").manifest)
    write_json(project.step("r002").manifest, manifest | {"accepted": False})


def other_settings(project: Project) -> None:
    path = project.step("r002").params
    path.write_text(path.read_text().replace("0.05", "0.5"))


def other_parent(project: Project) -> None:
    path = project.step("r001").evaluation
    write_bytes(path, path.read_bytes() + b" ")


def other_base(project: Project) -> None:
    path = project.base.evaluation
    write_bytes(path, path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (gone, "steps/r002/attacks.json is missing"),
        (failed, "the ledger says accepted, and the step's manifest the other verdict"),
        (other_settings, "steps/r002/params.yaml was changed after it was made"),
        (other_parent, "steps/r001/evaluation.json was changed after it was made"),
        (other_base, "steps/base/evaluation.json was changed after it was made"),
    ],
)
def test_nothing_is_signed_on_evidence_that_is_gone_or_is_another(
    change: Callable[[Project], None], said: str, project: Project
) -> None:
    """What a certificate says beside the step's own numbers is held against its digest as well."""
    change(project)
    done = alkn(project.root, "certificate", "r002")
    assert isinstance(done.exception, ChainBroken) and said in str(done.exception)
    assert not (project.root / "reports" / "certificates").exists()


def test_the_base_models_numbers_are_those_on_the_same_records(project: Project) -> None:
    """A request of somebody else's records under an id of the benchmark's has none."""
    for request in ("r001", "r002"):
        assert "base" in document_of(project, "r002")["metrics"][words_of_set(request)]["probability"]
    for request in ("r001", "r002"):
        write_jsonl(project.request(request), [{"id": 0, "question": "q", "answer": "a", "salt": "0"}])
        assert "base" not in document_of(project, "r002")["metrics"][words_of_set(request)]["probability"]
    assert "base" in document_of(project, "r002")["metrics"]["retain/facts"]["probability"]


def words_of_set(request: str) -> str:
    """The set of a request's records in the evaluation of r002."""
    return "forget" if request == "r002" else f"earlier/{request}"


def test_a_sample_is_called_a_sample(project: Project) -> None:
    """Six of forty records: said, with the interval for all forty that was worked out when they were drawn."""
    facts = read_decided(project, "r002")
    drawn = {"records": 6, "of": 40, "confidence": 0.95, "intervals": {"probability": [0.01, 0.25]}}
    facts = replace(facts, evaluation={**facts.evaluation, "sampled": {"earlier/r001": drawn}})
    document = certificate_of(facts, project="sample", issued=date(2026, 11, 21), key="k", program="alkn 0")
    told = {line["what"]: line["why"] for line in document["not_measured"]}
    assert told["34 of the 40 records of earlier/r001"] == "a sample was drawn of them"
    assert document["intervals"].endswith("by betting, 95%") and "bootstrap" in document["intervals"]
    rows = document["metrics"]["earlier/r001"]
    assert rows["probability"]["interval"] == [0.01, 0.25] and "interval" not in rows["exact_memorization"]
    assert "exact_memorization" in next(what for what, why in told.items() if why == "it was measured on a sample")


def test_no_text_of_a_record_is_in_it(project: Project) -> None:
    for request in ("r002", "r003"):
        file = issued(project, request)
        written = json.dumps(file, ensure_ascii=False) + words_of(certificate_pdf(file["certificate"]))
        assert "r00" in written
        assert not [secret for secret in (*SECRETS, *SECRETS[0].split()) if secret in written]


def test_the_paper_says_the_same_and_has_the_same_bytes_each_time(project: Project) -> None:
    document = document_of(project, "r002")
    pdf = certificate_pdf(document)
    assert pdf == certificate_pdf(json.loads(json.dumps(document)))
    text = words_of(pdf)
    for said in ("FORGOTTEN, as measured below", "in time, due 2026-11-02", "0.450", "What this does not prove"):
        assert said in text
    assert document["digests"]["outputs"]["model"] in text.replace(" ", "")
    assert not [page for page in PdfReader(io.BytesIO(pdf)).pages if "/Annots" in page], "it links to nothing"


def test_a_good_one_holds_line_by_line(project: Project) -> None:
    file = issued(project)
    lines = looked_at(file, project, pdf=PAPER)
    assert {line.state for line in lines.values()} == {"holds"}
    assert {"signature", "whose key", "PDF", "model", "evaluation.json", "gate.json", "settings", "request"} <= set(
        lines
    )
    assert {"attacks.json", "per_record.json", "parent", "splits", "numbers"} <= set(lines)


def test_a_changed_metric_in_the_certificate_is_told_with_both_values(project: Project) -> None:
    file = issued(project)
    file["certificate"]["metrics"]["forget"]["probability"]["value"] = 0.0001
    found = differing(looked_at(file, project))
    assert "the document was changed, or forged" in found["signature"]
    value = read_json(project.step("r002").evaluation)["sets"]["forget"]["probability"]
    assert found["metrics.forget.probability.value"] == f"the certificate says 0.0001, the project {value}"


@pytest.mark.parametrize("path", [("forgotten",), ("limits", 0), ("request", "decided"), ("issued",), ("made",)])
def test_no_word_of_it_can_be_changed(project: Project, path: tuple[Any, ...]) -> None:
    file = issued(project, "r003")
    place: Any = file["certificate"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = True if path == ("forgotten",) else "2020-01-01"
    assert "signature" in differing(looked_at(file, project))


def test_a_swapped_model_is_told(project: Project) -> None:
    file = issued(project)
    write_bytes(project.step("r002").model / "model.safetensors", b"another model")
    assert list(differing(looked_at(file, project))) == ["model"]
    with pytest.raises(ChainBroken, match="steps/r002/model was changed"):
        read_decided(project, "r002")


def test_changed_files_of_the_project_are_told_one_by_one(project: Project) -> None:
    file, step = issued(project), project.step("r002")
    evaluation = read_json(step.evaluation)
    evaluation["sets"]["forget"]["exact_memorization"] = 0.5
    write_json(step.evaluation, evaluation)
    gate = read_json(step.gate)
    gate["gates"]["forgetting"]["checks"][0]["limit"] = 0.9
    write_json(step.gate, gate)
    write_bytes(step.params, step.params.read_bytes() + b"seed: 1\n")
    write_bytes(project.request("r002"), b'{"id": 0}\n')
    write_bytes(step.manifest, step.manifest.read_bytes() + b"\n")
    found = differing(looked_at(file, project))
    assert set(found) == {
        "manifest.json", "evaluation.json", "gate.json", "settings", "request",
        "metrics.forget.exact_memorization.value", "gates.forgetting.checks.0.limit",
    }  # fmt: skip
    assert found["gates.forgetting.checks.0.limit"] == "the certificate says 0.05, the project 0.9"


def test_a_changed_verdict_in_the_ledger_is_told(project: Project) -> None:
    file = issued(project, "r003")
    text = project.ledger.read_text().replace("rejected:", "withdrawn_:").replace("withdrawn: {}\n", "")
    project.ledger.write_text(text.replace("withdrawn_:", "withdrawn:"))
    assert differing(looked_at(file, project)) == {
        "numbers": "request 'r003' is withdrawn: there is no verdict on it that could be certified"
    }


def test_a_certificate_signed_by_another_key_is_told(project: Project) -> None:
    """The forger signs the whole document anew, with the fingerprint of the forger's own key in it."""
    document = document_of(project, "r002")
    other = Ed25519PrivateKey.generate()
    document["issuer"]["key"] = fingerprint(public_bytes(other))
    document["metrics"]["forget"]["probability"]["value"] = 0.0001
    file = json.loads(json.dumps(seal(document, PAPER, other)))
    assert "not that of data/certificate.pub" in differing(looked_at(file, project))["whose key"]
    (untrusted,) = [line for line in check(json.dumps(file).encode(), trusted={}) if line.state == "differs"]
    assert untrusted.what == "whose key" and "anybody can sign" in untrusted.detail


def test_a_forged_certificate_is_told(project: Project) -> None:
    """Another request's signature, another's PDF, the right fingerprint over the wrong key."""
    good, other = issued(project, "r002"), issued(project, "r001")
    assert "signature" in differing(looked_at({**good, "signature": other["signature"]}, project))
    mixed = {**good, "pdf": other["pdf"], "pdf_signature": other["pdf_signature"]}
    assert list(differing(looked_at(mixed, project))) == ["signature of the PDF"]
    assert list(differing(looked_at(good, project, pdf=PAPER + b"."))) == ["PDF"]
    mine = Ed25519PrivateKey.generate()
    stolen = json.loads(json.dumps(seal(good["certificate"], b"", mine)))
    assert {"key in the document", "whose key"} <= set(differing(looked_at(stolen, project)))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"certificate": {}, "certificate": {}}', b"[" * 100_000, b'{"certificate": 1}'],
)
def test_what_is_no_certificate_is_one_line(content: bytes) -> None:
    (line,) = check(content, trusted={})
    assert (line.what, line.state) == ("form", "differs")


def test_a_certificate_cannot_lead_out_of_the_project(project: Project) -> None:
    file = issued(project)
    file["certificate"]["request"]["id"] = "../../etc"
    (line,) = looked_at(file, project).values()
    assert line.what == "form" and "certificate.request.id" in line.detail


def test_the_signature_is_that_of_the_canonical_form(project: Project, tmp_path: Path) -> None:
    """An independent reader: openssl, with the public key that is in git."""
    import base64

    file = issued(project)
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(canonical(file["certificate"]))
    signature.write_bytes(base64.b64decode(file["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public_path(project)), "-rawin"]
    try:
        done = subprocess.run([*command, "-in", message, "-sigfile", signature], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl")
    if "-rawin" in done.stderr or "unknown option" in done.stderr.lower():
        pytest.skip("this openssl cannot check Ed25519")
    assert done.returncode == 0, done.stderr


def test_the_key_is_the_owners_alone_and_made_once(project: Project) -> None:
    first, made = signing_key(project)
    assert made and stat.S_IMODE(private_path(project).stat().st_mode) == 0o600
    again, made = signing_key(project)
    assert not made and public_bytes(first) == public_bytes(again)
    public_path(project).unlink()
    signing_key(project)
    assert read_public(public_path(project)) == public_bytes(first)


def test_a_key_that_is_elsewhere_is_not_replaced(project: Project) -> None:
    signing_key(project)
    private_path(project).rename(project.root / "elsewhere")
    with pytest.raises(InputError, match="the private key of data/certificate.pub is missing"):
        signing_key(project)
    write_bytes(private_path(project), b"no key")
    with pytest.raises(InputError, match="not a private Ed25519 key"):
        signing_key(project)
    private_path(project).unlink()
    public_path(project).rename(project.root / "old.pub")
    signing_key(project)
    (project.root / "old.pub").rename(public_path(project))
    with pytest.raises(InputError, match="not halves of one key"):
        signing_key(project)


def test_the_command_writes_and_checks_in_an_empty_folder(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: no socket is opened."""
    done = alkn(project.root, "certificate", "r002", "--out", "out", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["forgotten"] is True
    assert "a key to sign with was made: .alkn/certificate.key" in done.stderr
    assert alkn(project.root, "certificate", "verify", "out/r002.json").exit_code == 0

    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("out/r002.json", "out/r002.pdf", "data/certificate.pub"):
        (empty / Path(name).name).write_bytes((project.root / name).read_bytes())

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", refuse)
    checked = alkn(empty, "certificate", "verify", "r002.json", "--public-key", "certificate.pub", "--json")
    assert checked.exit_code == 0, checked.output
    told = json.loads(checked.stdout)
    assert told["good"] and {line["state"] for line in told["lines"]} == {"holds"}
    alone = alkn(empty, "certificate", "verify", "r002.json")
    assert alone.exit_code == 1 and "DIFFERS      whose key" in alone.output and "NOT verified" in alone.output
    against = alkn(empty, "certificate", "verify", "r002.json", "--project", str(project.root))
    assert against.exit_code == 0 and "ok           model: steps/r002/model" in against.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("r004",), "request 'r004' is pending: there is no verdict"),
        (("r009",), "no request 'r009' in the ledger"),
        (("verify", "nothing.json"), "nothing.json: no such file"),
        (("verify", "data/ledger.yaml", "--public-key", "params.yaml"), "expected a public Ed25519 key in PEM"),
    ],
)
def test_wrong_input_changes_nothing(project: Project, arguments: tuple[str, ...], said: str) -> None:
    before = sorted(project.root.rglob("*"))
    done = alkn(project.root, "certificate", *arguments)
    assert isinstance(done.exception, AlknError) and done.exception.exit_code == 2
    assert said in str(done.exception)
    assert sorted(project.root.rglob("*")) == before
