"""The key that certificates are signed with: Ed25519, made in the project, its public half in git.

Source: RFC 8032 (Ed25519); the keys are stored as RFC 8410 says, so that ``openssl pkey`` reads them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from alkn.errors import InputError
from alkn.files import write_bytes
from alkn.project import Project
from alkn.report.canonical import canonical


def private_path(project: Project) -> Path:
    """Where the private key lies: never in git."""
    return project.private / "certificate.key"


def public_path(project: Project) -> Path:
    """Where the public key lies: in git, for everybody who checks a certificate."""
    return project.root / "data" / "certificate.pub"


def signing_key(project: Project) -> tuple[Ed25519PrivateKey, bool]:
    """The project's key, made if there is none yet.

    Returns:
        The key, and whether it was made now.

    Raises:
        InputError: if only the public half is here, or the two do not belong together.
    """
    private, public = private_path(project), public_path(project)
    made = not private.is_file()
    if made:
        if public.is_file():
            raise InputError(
                f"{private.relative_to(project.root)}: the private key of data/certificate.pub is missing; whoever"
                " signs for this chain has it. To sign with a new key from now on, remove data/certificate.pub"
            )
        key = Ed25519PrivateKey.generate()
        project.private.mkdir(mode=0o700, exist_ok=True)
        _write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    else:
        key = _read_private(private)
    der = public_bytes(key)
    if not public.is_file():
        write_bytes(public, _pem(der))
    elif read_public(public) != der:
        raise InputError(".alkn/certificate.key and data/certificate.pub are not halves of one key; restore the pair")
    return key, made


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The public half in DER, as ``openssl pkey -pubout -outform DER`` writes it."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(der: bytes) -> str:
    """SHA-256 of a public key in DER, as ``sha256:<hex>``."""
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def read_public(path: Path) -> bytes:
    """A public key's file (PEM) as DER.

    Raises:
        InputError: if it is none of Ed25519.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: expected a public Ed25519 key in PEM, as in data/certificate.pub")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def sign(key: Ed25519PrivateKey, value: Any) -> str:
    """The signature of a value's canonical JSON, in base64."""
    return base64.b64encode(key.sign(canonical(value))).decode()


def holds(der: bytes, signature: str, value: Any) -> bool:
    """Whether a signature was made over this value by the private half of this key."""
    try:
        key = load_der_public_key(der)
        if not isinstance(key, Ed25519PublicKey):
            return False
        key.verify(base64.b64decode(signature, validate=True), canonical(value))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, binascii.Error):
        return False
    return True


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path.parent.name}/{path.name}: not a private Ed25519 key; restore it from its backup")
    return key


def _write_secret(path: Path, data: bytes) -> None:
    """A file that its owner alone can read, from its first byte on."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _pem(der: bytes) -> bytes:
    return load_der_public_key(der).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
