"""SHA-256 digests of bytes, files and JSON values."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TypeAlias

JsonScalar: TypeAlias = str | int | float | bool | None

_HEX = re.compile(r"[0-9a-f]{64}")


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's content; raises OSError where it can't be read."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> bytes:
    """Return the one byte string that stands for a JSON value: sorted keys, no spaces, ASCII.

    Infinity and NaN are written as Python writes them, because checkpoints' config files contain them.
    Raises TypeError for what isn't JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def digest_json(value: object) -> str:
    """Return the SHA-256 of a JSON value's canonical form."""
    return digest_bytes(canonical_json(value))


def is_digest(text: str) -> bool:
    """Whether `text` is written like a SHA-256 digest."""
    return _HEX.fullmatch(text) is not None
