"""Files that matter: written beside, fsynced and renamed; digests of files and folders."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, two-space indented, keys as given; NaN is refused."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_yaml(path: Path, value: Any) -> None:
    """Write YAML in block style, keys as given."""
    write_bytes(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON Lines."""
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_bytes())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file that this program wrote."""
    # Not str.splitlines: it would also cut at separators that JSON allows inside a string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_via(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file or folder under a temporary name, sync it, and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        write(temporary)
        files = [p for p in temporary.rglob("*") if p.is_file()] if temporary.is_dir() else [temporary]
        for file in files:
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        remove(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's sorted relative names and file digests, as ``sha256:<hex>``.

    Links are followed, so a linked model folder has the digest of what it points at.
    """
    if path.is_dir():
        total = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            total.update(f"{file.relative_to(path).as_posix()}\0{digest_of(file)}\n".encode())
        return f"sha256:{total.hexdigest()}"
    with open(path, "rb") as f:
        return f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}"


def keyed_digest_of(path: Path, key: bytes) -> str:
    """HMAC-SHA-256 of a file, as ``hmac-sha256:<hex>``: short personal text cannot be guessed from it."""
    with open(path, "rb") as f:
        return f"hmac-sha256:{hmac.digest(key, f.read(), 'sha256').hex()}"


def digest_of_value(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as ``sha256:<hex>``."""
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"


def size_of(path: Path) -> int:
    """Bytes of a file or of all files of a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size
