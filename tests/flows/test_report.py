"""Report and certificate of a real chain: what a run leaves, what the commands write, that no text is in any of it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Place, mlflow_client
from pypdf import PdfReader

PLOTS = {"forgetting.csv", "utility.csv", "matrix.csv", "attacks.csv", "forgetting.png", "matrix.png", "utility.png"}


@pytest.fixture(scope="module")
def reported(chain: Place, fresh: Callable[..., Place], warm_alkn: Callable[..., Any]) -> Place:
    """A copy of the chain with a page and two certificates; what was printed is kept."""
    place = fresh(chain)
    shutil.copytree(chain.path("reports"), place.path("reports"))
    for arguments in (("report", "--html"), ("certificate", "r001"), ("certificate", "r002")):
        done = warm_alkn(place, *arguments)
        assert done.returncode == 0, done.stderr
        place.printed += [done.stdout, done.stderr]
    return place


def test_a_run_leaves_tables_and_pictures_on_disk_in_mlflow_and_prefect(chain: Place) -> None:
    assert PLOTS <= {path.name for path in chain.path("reports/plots").iterdir()}
    client = mlflow_client(chain)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (run,) = [
        run
        for run in client.search_runs([experiment], "tags.`alkn.kind` = 'chain'")
        if client.list_artifacts(run.info.run_id)
    ]
    assert {f"report/{name}" for name in PLOTS} <= {a.path for a in client.list_artifacts(run.info.run_id, "report")}
    (database,) = chain.path(".prefect").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as prefect:
        artifacts = dict(prefect.execute("select key, data from artifact where key is not null").fetchall())
    assert {"chain-tiny", "matrix-tiny", "utility-tiny"} <= set(artifacts)
    assert "| r002 | accepted | 8 | 2099-12-31 |" in artifacts["chain-tiny"]
    assert "data:image/png;base64," in artifacts["matrix-tiny"]


def test_dvc_draws_the_tables(reported: Place) -> None:
    done = reported.call("dvc", "plots", "show", "--json", "--out", "reports/dvc")
    assert set(json.loads(done.stdout)["data"]) == {"forgetting", "utility", "attacks"}
    assert "failed to load" not in done.stderr
    assert reported.dvc_is_clean()
    assert reported.call("git", "status", "--short").stdout == ""


def test_the_key_to_sign_with_came_with_the_project(reported: Place) -> None:
    tracked = reported.call("git", "ls-files").stdout.split()
    assert "data/certificate.pub" in tracked
    assert reported.path(".alkn/certificate.key").stat().st_mode & 0o077 == 0
    assert "a key to sign with was made" not in "".join(reported.printed)


def test_the_certificate_holds_against_its_project(reported: Place, warm_alkn: Callable[..., Any]) -> None:
    done = warm_alkn(reported, "certificate", "verify", "reports/certificates/r002.json", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["good"], told
    assert {line["state"] for line in told["lines"]} == {"holds"}
    document = json.loads(reported.path("reports/certificates/r002.json").read_text())["certificate"]
    assert document["digests"]["outputs"] == reported.manifest("r002")["outputs"]
    assert document["metrics"]["forget"]["probability"]["interval"], "a real step has its values per record"


def test_no_text_of_a_record_is_in_any_of_them(reported: Place) -> None:
    files = sorted(reported.path("data/requests").glob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    texts = {record[field] for record in records for field in ("question", "answer")}
    texts |= {word for text in texts for word in text.split() if word[:1].isupper() and len(word) > 5}
    neutral = reported.path("data/splits/retain.jsonl").read_text()
    secrets = {text for text in texts if text not in neutral and len(text) > 5}
    assert len(secrets) > 20
    read = {
        "page": reported.path("reports/report.html").read_text(),
        "json": reported.path("reports/certificates/r001.json").read_text(),
        "printed": "".join(reported.printed),
    }
    for request in ("r001", "r002"):
        pages = PdfReader(io.BytesIO(reported.path(f"reports/certificates/{request}.pdf").read_bytes())).pages
        read[request] = " ".join(" ".join(page.extract_text() for page in pages).split())
        assert "FORGOTTEN, as measured below" in read[request]
    for name, text in read.items():
        assert not [secret[:3] for secret in secrets if secret in text], name
