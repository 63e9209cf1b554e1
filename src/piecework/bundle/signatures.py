"""Signatures: who vouches for a bundle. Ed25519 over the manifest's digest, and through it over every file.

`signatures.json` lies beside the manifest and is not in it, so that a bundle can be signed after it was made, and by
several. A key that is trusted is one line of a file: 64 hex digits, the raw public key; what follows on the line, and
lines that start with "#", are for people. A key to sign with is a file as OpenSSL writes it (PKCS #8, PEM).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from piecework.bundle.format import MANIFEST, SIGNATURES
from piecework.bundle.manifest import corrupt
from piecework.errors import StoreError, UntrustedBundle
from piecework.foundation import files
from piecework.foundation.digests import canonical_json, digest_bytes, is_digest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_SIGNATURES_BYTES: Final = 64 << 10
_DOMAIN: Final = b"piecework bundle manifest, version 1\n"
_SIGNATURE_DIGITS: Final = 128
_MAX_KEYS_BYTES: Final = 1 << 20


@contextlib.contextmanager
def needs_cryptography() -> Iterator[None]:
    """Turn the error of a missing `cryptography` into StoreError with what to install."""
    try:
        yield
    except ImportError as error:
        raise StoreError(
            asked="sign a bundle, or check a signature",
            found=f"the package cryptography can't be imported: {error}",
            try_="pip install 'piecework[sign]'",
        ) from error


@dataclass(frozen=True)
class Signature:
    """A signature and whose it is: the raw public key and the raw signature, in hex."""

    key: str
    signature: str


@dataclass(frozen=True)
class Head:
    """What is read of a bundle before anything else: its manifest and its signatures, as they lie in files."""

    manifest: bytes = field(repr=False)
    signatures: bytes | None = field(default=None, repr=False)

    @property
    def digest(self) -> str:
        """The bundle's digest, which is signed."""
        return digest_bytes(self.manifest)

    def write(self, directory: Path) -> None:
        """Write the two into a bundle's unfinished directory. Raises OSError."""
        (directory / MANIFEST).write_bytes(self.manifest)
        if self.signatures is not None:
            (directory / SIGNATURES).write_bytes(self.signatures)


def _nobodys(_digest: str) -> bool:
    return False


@dataclass(frozen=True)
class Trust:
    """Whose bundles may be run.

    Args:
        keys: raw public keys, in hex; a bundle needs a good signature of one of them.
        source: where they were read.
        is_own: whether the bundle with a digest was compiled into the user's own store, and so needs no signature.
    """

    keys: frozenset[str]
    source: str
    is_own: Callable[[str], bool] = field(default=_nobodys, repr=False)

    def require(self, head: Head, *, bundle: str) -> None:
        """Raise UntrustedBundle where a bundle has no good signature of a trusted key, CorruptBundle, StoreError."""
        if self.is_own(head.digest):
            return
        signed = parse_signatures(head.signatures, bundle=bundle)
        candidates = [one for one in signed if one.key in self.keys]
        if any(_is_good(one, digest=head.digest) for one in candidates):
            return
        if candidates:
            found = f"its signature by {candidates[0].key[:16]}… is not one of this content"
        elif signed:
            found = "it is signed by " + ", ".join(f"{one.key[:16]}…" for one in signed[:3]) + ", and none is trusted"
        else:
            found = "it is not signed"
        raise UntrustedBundle(
            asked=f"a bundle that is signed by a key of {self.source}: {bundle}",
            found=found,
            try_="have it signed (`piecework store sign`), or add the key of its maker to that file if you trust them",
        )


def read_trust(path: Path | None, *, is_own: Callable[[str], bool] = _nobodys) -> Trust | None:
    """Read a file of public keys, one per line; None gives None: bundles are then taken as they are.

    Args:
        path: the file.
        is_own: see `Trust`; that of a store is `Store.made_here`.

    Raises StoreError where it can't be read, has a line that is no key, or has no key at all.
    """
    if path is None:
        return None
    asked = f"the keys to trust in {path}"
    if not path.exists():
        raise StoreError(
            asked=asked, found="no such file", try_=f"put in it whose bundles may run: cat MAKER.pub >> {path}"
        )
    with files.store_errors(asked), path.open("rb") as file:
        data = file.read(_MAX_KEYS_BYTES)
    keys = set()
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
        word = line.split("#", 1)[0].split(maxsplit=1)[:1]
        if word and not is_digest(word[0]):
            raise StoreError(
                asked=asked,
                found=f"line {number} doesn't start with a key",
                try_="64 hex digits per line, as `piecework store keygen` writes them",
            )
        keys.update(word)
    if not keys:
        raise StoreError(asked=asked, found="no key", try_="add one, as `piecework store keygen` writes it")
    return Trust(frozenset(keys), source=str(path), is_own=is_own)


@needs_cryptography()
def make_key(path: Path) -> str:
    """Make a key to sign with, which only this user may read, and beside it "<name>.pub" with the key to trust.

    Returns the public key. Raises StoreError where a file is there already or can't be written.
    """
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415  only who signs needs it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = key.public_key().public_bytes_raw().hex()
    with files.store_errors(f"make a key at {path}"):
        for place, data, mode in (
            (path, secret, 0o600),
            (path.with_name(path.name + ".pub"), f"{public} {path.name}\n".encode(), 0o644),
        ):
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
    return public


@needs_cryptography()
def read_key(path: Path) -> Ed25519PrivateKey:
    """Read a key to sign with. Raises StoreError where it is none, or others than this user may read it."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  only who signs needs it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    asked = f"sign with the key {path}"
    with files.store_errors(asked), path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise StoreError(asked=asked, found="others than you may read or write it", try_=f"chmod 600 {path}")
        data = file.read(_MAX_KEYS_BYTES)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StoreError(asked=asked, found=f"no key: {error}", try_="`piecework store keygen FILE`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreError(asked=asked, found="a key of another kind", try_="an Ed25519 key: `piecework store keygen`")
    return key


def add_signature(head: Head, key: Ed25519PrivateKey, *, bundle: str) -> bytes:
    """Return the content of signatures.json with one more signature, in place of an older one of the same key."""
    made = Signature(key.public_key().public_bytes_raw().hex(), key.sign(_message(head.digest)).hex())
    kept = [one for one in parse_signatures(head.signatures, bundle=bundle) if one.key != made.key]
    return _serialise([*kept, made])


def merged(first: bytes | None, second: bytes | None, *, bundle: str) -> bytes | None:
    """Return the signatures of two copies of one bundle; where both have one of a key, that of the second."""
    if first == second or second is None:
        return first
    both = [*parse_signatures(first, bundle=bundle), *parse_signatures(second, bundle=bundle)]
    return _serialise(list({one.key: one for one in both}.values()))


def parse_signatures(data: bytes | None, *, bundle: str) -> tuple[Signature, ...]:
    """Read the content of signatures.json; None is no signatures. Raises CorruptBundle."""
    if data is None:
        return ()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    entries = value.get("signatures") if isinstance(value, dict) and set(value) == {"signatures"} else None
    found = []
    for entry in cast("list[object]", entries) if isinstance(entries, list) else [None]:
        match entry:
            case {"key": str(key), "signature": str(signature), **rest} if not rest and is_digest(key):
                if len(signature) == _SIGNATURE_DIGITS and not set(signature) - set("0123456789abcdef"):
                    found.append(Signature(key, signature))
                    continue
        raise corrupt(SIGNATURES, bundle=bundle, found="is not as signing writes it")
    return tuple(found)


def _is_good(one: Signature, *, digest: str) -> bool:
    with needs_cryptography():
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  only where a policy is set
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(one.key))
        key.verify(bytes.fromhex(one.signature), _message(digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(digest: str) -> bytes:
    return _DOMAIN + digest.encode("ascii")


def _serialise(signatures: list[Signature]) -> bytes:
    ordered = sorted(signatures, key=lambda one: one.key)
    return canonical_json({"signatures": [{"key": one.key, "signature": one.signature} for one in ordered]})
