"""The manifest of a step: all digests in and out. It is written last and decides whether a step is done."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alkn.errors import ChainBroken
from alkn.files import digest_of, read_json, write_json
from alkn.project import Step

FORMAT = 1
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy")


def read_manifest(step: Step) -> dict[str, Any] | None:
    """The manifest's content, or ``None`` if the step is not done."""
    return dict(read_json(step.manifest)) if step.manifest.is_file() else None


def outputs_hold(step: Step, manifest: Mapping[str, Any]) -> bool:
    """Whether every output is there with the digest that the manifest holds."""
    return all(
        (step.folder / name).exists() and digest_of(step.folder / name) == digest
        for name, digest in manifest["outputs"].items()
    )


def check_step(step: Step) -> dict[str, Any]:
    """The manifest of a step that others build on.

    Raises:
        ChainBroken: if there is none or an output differs from it.
    """
    manifest = read_manifest(step)
    if manifest is None:
        raise ChainBroken(f"steps/{step.id}: the step is in the chain, but its manifest is missing")
    for name, digest in manifest["outputs"].items():
        path = step.folder / name
        if not path.exists():
            raise ChainBroken(f"steps/{step.id}/{name} is missing; 'dvc checkout' or 'dvc repro' brings it back")
        if digest_of(path) != digest:
            raise ChainBroken(f"steps/{step.id}/{name} was changed after it was made; its manifest has another digest")
    return manifest


def write_manifest(
    step: Step, *, inputs: Mapping[str, str], outputs: tuple[Path, ...], seed: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Seal a step. Made again with the same digests, it keeps the manifest that it has.

    Args:
        step: where.
        inputs: name -> digest.
        outputs: files and folders of the step.
        seed: the step's seed.
        facts: the verdict, times and the like.
    """
    out = {path.name: digest_of(path) for path in outputs}
    known = read_manifest(step)
    if known is not None and known["outputs"] == out and known["inputs"] == dict(inputs):
        return known
    manifest = {
        "format": FORMAT,
        "id": step.id,
        "inputs": dict(inputs),
        "outputs": out,
        "seed": seed,
        **facts,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "environment": environment(),
    }
    write_json(step.manifest, manifest)
    return manifest


@functools.cache
def code_version() -> dict[str, str]:
    """The installed version, the digest of the code that ran, and its git commit where there is one."""
    root = Path(__file__).parent
    version = {"version": importlib.metadata.version("alkn"), "digest": _code_digest(root)}
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607 - git is found on PATH
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return version
    return {**version, "commit": commit}


def _code_digest(root: Path) -> str:
    from alkn.files import digest_of_value

    return digest_of_value({p.relative_to(root).as_posix(): digest_of(p) for p in sorted(root.rglob("*.py"))})


def environment() -> dict[str, str]:
    """Versions that the last bit of a result may depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], "machine": platform.machine(), "system": platform.system(), **versions}
