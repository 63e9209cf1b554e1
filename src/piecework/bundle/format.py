"""The bundle's format: its version, and which files may be in it."""

from __future__ import annotations

import re
from typing import Final

FORMAT: Final = 2

MANIFEST: Final = "manifest.json"
PLAN: Final = "plan.json"
RECORD: Final = "record.json"
CONSTANTS: Final = "constants.safetensors"
EXPLANATION: Final = "explain.json"
SIGNATURES: Final = "signatures.json"
ARTIFACTS: Final = "artifacts"
ARCHIVE_SUFFIX: Final = ".pwb"

_ARTIFACT = re.compile(r"(?P<digest>[0-9a-f]{64})\.(so|dylib|json|cubin|ptx|hsaco)")


def artifact_digest(name: str) -> str | None:
    """Return the digest in an artifact's file name such as "<sha256>.so", or None if it isn't one."""
    match = _ARTIFACT.fullmatch(name)
    return match["digest"] if match else None


def is_member(name: str) -> bool:
    """Whether a manifest may list a file of this name, which is relative and has forward slashes."""
    if name in (PLAN, RECORD, CONSTANTS, EXPLANATION):
        return True
    directory, _, file = name.partition("/")
    return directory == ARTIFACTS and artifact_digest(file) is not None
