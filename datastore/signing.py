"""Receipts that their operator signs, with Ed25519 (RFC 8032): whoever has the public key can check them anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from silo.errors import IntegrityError, UsageError
from silo.files import canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MAKE = "make one with `openssl genpkey -algorithm ed25519 -out FILE`"


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key from a PEM file. Raises :class:`UsageError` if there is none, or it is of another kind."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; expected an Ed25519 private key in PEM; {_MAKE}") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is no unencrypted private key in PEM ({error}); {_MAKE}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is a key of another kind; expected Ed25519; {_MAKE}")
    return key


def sign(content: dict[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """A receipt with its signature in it. The same receipt and key give the same bytes."""
    public = key.public_key().public_bytes_raw().hex()
    return {**content, "signature": {"ed25519": key.sign(canonical_json(content)).hex(), "public_key": public}}


def signer(content: dict[str, Any], path: Path) -> str | None:
    """The public key that a receipt is signed with, in hexadecimal; None if it is not signed.

    Raises:
        IntegrityError: the signature is not that of this content by this key.
    """
    if "signature" not in content:
        return None
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signed = {name: value for name, value in content.items() if name != "signature"}
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["signature"]["public_key"]))
        public.verify(bytes.fromhex(content["signature"]["ed25519"]), canonical_json(signed))
    except (InvalidSignature, ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path} is not what its signature says; restore it from a backup") from None
    return str(content["signature"]["public_key"])
