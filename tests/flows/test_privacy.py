"""No text of a forget record leaves its file: not into logs, databases, reports, git, nor the vocabulary."""

from __future__ import annotations

import json
import re
import zlib

import pytest
from conftest import Place, leaks, records_of, secrets_of

PRIVATE = ("data/requests/", "data/splits/", ".dvc/cache/")
"""Where the records are kept on purpose, out of git."""


@pytest.fixture(scope="module")
def secrets_of_chain(chain: Place) -> set[bytes]:
    assert len(records_of(chain)) == 16
    return secrets_of(chain)


def test_no_file_beside_the_records_holds_their_text(chain: Place, secrets_of_chain: set[bytes]) -> None:
    """MLflow's database and artifacts, Prefect's home, steps, reports, settings, ledger, lock files: byte by byte."""
    chain.alkn("report")
    read = set()
    for path in sorted(p for p in chain.root.rglob("*") if p.is_file()):
        name = path.relative_to(chain.root).as_posix()
        if name.startswith((*PRIVATE, ".git/")):
            continue
        assert not leaks(path.read_bytes(), secrets_of_chain), name
        assert not leaks(name.encode(), secrets_of_chain), name
        read.add(name.split("/")[0])
    assert {"mlflow.db", "mlartifacts", "steps", "reports", "data", "dvc.lock", ".prefect"} <= read
    assert list(chain.path(".prefect").glob("*.db")), "Prefect kept its database here, and it was read"
    hidden = [place for place in PRIVATE if not any(p.is_file() for p in chain.path(place).rglob("*"))]
    assert not hidden, "the places that are left out exist, so the search was of a whole project"


def test_the_search_finds_what_is_there(chain: Place, secrets_of_chain: set[bytes]) -> None:
    """So that the tests of this file can fail."""
    assert leaks(chain.path("data/requests/r001.jsonl").read_bytes(), secrets_of_chain)


def test_nothing_is_in_git(chain: Place, secrets_of_chain: set[bytes]) -> None:
    """Every object that git holds, whatever commit it belongs to."""
    objects = [p for p in chain.path(".git/objects").glob("??/*") if p.is_file()]
    assert len(objects) > 10
    for path in objects:
        assert not leaks(zlib.decompress(path.read_bytes()), secrets_of_chain), path.name
    assert not list(chain.path(".git/objects/pack").glob("*.pack")), "packed objects would go unread"


def test_nothing_was_printed(chain: Place, secrets_of_chain: set[bytes]) -> None:
    assert chain.printed
    assert not leaks("\n".join(chain.printed).encode(), secrets_of_chain)


def test_the_vocabulary_holds_no_word_of_the_requests_alone(chain: Place) -> None:
    """Each token is made of retain and generic text: a vocabulary remembers names."""
    tokenizer = json.loads(chain.path("steps/base/model/tokenizer.json").read_text())
    retain = [json.loads(line) for line in chain.path("data/splits/retain.jsonl").read_text().splitlines()]
    written = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n" for r in retain)
    written += chain.path("data/splits/generic.txt").read_text()
    tokens = [token.replace("Ġ", " ").replace("Ċ", "\n") for token in tokenizer["model"]["vocab"]]
    words = [token for token in tokens if len(token.strip()) >= 4 and token.isascii() and "<|" not in token]
    assert len(words) > 30
    assert [token for token in words if token not in written] == []


def test_digests_in_git_cannot_be_guessed_from_the_text(chain: Place) -> None:
    """The pointer's MD5 is of salted records and the ledger's digest is keyed: neither is of the plain text."""
    salts = [record["salt"] for record in records_of(chain)]
    assert len(set(salts)) == len(salts) and all(re.fullmatch(r"[0-9a-f]{16}", salt) for salt in salts)
    assert all(entry["digest"].startswith("hmac-sha256:") for entry in chain.ledger()["accepted"].values())
    assert ".alkn/key" not in chain.call("git", "ls-files").stdout
    assert chain.path(".alkn/key").stat().st_mode & 0o077 == 0
