"""The manifest: the bundle's table of contents, with the digest of every file, the facts, and who it is.

It is written in one way only (sorted keys, one-space indent) and contains its own digest. Reading demands exactly
the bytes that writing would have made, so that a change of any byte is seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast

from piecework.bundle.facts import Fact, is_source_name
from piecework.bundle.format import FORMAT, MANIFEST, PLAN, RECORD, artifact_digest, is_member
from piecework.errors import BundleError, CorruptBundle
from piecework.foundation.digests import digest_bytes, digest_json, is_digest
from piecework.foundation.version import VERSION

MAX_MANIFEST_BYTES: Final = 64 << 20
_KEYS: Final = {"digest", "facts", "files", "format", "identity", "piecework"}


@dataclass(frozen=True)
class FileEntry:
    """What a file of the bundle must be: its SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """A bundle's table of contents.

    Args:
        facts: what the compile read, sorted.
        files: every file but the manifest, by its relative path.
        identity: what the bundle is of (model, dtype, backend, provider choices …), for people and for keys.
        piecework: the version that wrote it.
    """

    facts: tuple[Fact, ...]
    files: Mapping[str, FileEntry]
    identity: Mapping[str, object]
    piecework: str = VERSION

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        body: dict[str, object] = {
            "format": FORMAT,
            "piecework": self.piecework,
            "facts": [fact.to_json() for fact in self.facts],
            "files": {name: {"sha256": entry.sha256, "size": entry.size} for name, entry in self.files.items()},
            "identity": dict(self.identity),
        }
        return _serialise({**body, "digest": digest_json(body)})

    @property
    def digest(self) -> str:
        """The bundle's digest: it covers the digests of all files."""
        return digest_bytes(self.to_bytes())


def parse_manifest(data: bytes, *, bundle: str) -> Manifest:
    """Read manifest.json.

    Args:
        data: the file's content.
        bundle: how to name the bundle in errors.

    Raises BundleError for another format version, CorruptBundle for anything that isn't as `to_bytes` writes it.
    """
    value = _parse_object(data, bundle=bundle)
    version = value.get("format")
    if version != FORMAT or type(version) is not int:
        raise BundleError(
            asked=f"open the bundle {bundle}",
            found=f"it has format version {_show(version)}, and this piecework reads version {FORMAT}",
            try_="compile the model again, or use the piecework version that made the bundle",
        )
    body = {key: item for key, item in value.items() if key != "digest"}
    if set(value) != _KEYS or value["digest"] != digest_json(body) or data != _serialise(value):
        raise corrupt(MANIFEST, bundle=bundle, found="doesn't match its own digest")
    return Manifest(
        facts=_parse_facts(value["facts"], bundle=bundle),
        files=_parse_files(value["files"], bundle=bundle),
        identity=_mapping(value["identity"], what="identity", bundle=bundle),
        piecework=_text(value["piecework"], what="piecework", bundle=bundle),
    )


def corrupt(file: str, *, bundle: str, found: str) -> CorruptBundle:
    """Return the error for a damaged file of a bundle; `found` continues a sentence that starts with the file."""
    return CorruptBundle(
        asked=f"open the bundle {bundle}",
        found=f"{file} {found}",
        try_="copy the bundle again from where it came from, or compile the model again",
        file=file,
    )


def _serialise(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode("ascii") + b"\n"


def _parse_object(data: bytes, *, bundle: str) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise corrupt(MANIFEST, bundle=bundle, found="is not JSON") from error
    return _mapping(value, what="the whole", bundle=bundle)


def _parse_facts(value: object, *, bundle: str) -> tuple[Fact, ...]:
    facts = []
    for item in value if isinstance(value, list) else [None]:
        match item:
            case ["source", str(name), _] if not is_source_name(name):
                raise corrupt(MANIFEST, bundle=bundle, found=f"has a fact about {name!r}, which is no source file")
            case [str(kind), str(name), None | bool() | int() | float() | str() as content]:
                facts.append(Fact(kind, name, content))
            case _:
                raise corrupt(MANIFEST, bundle=bundle, found="has facts that aren't [kind, name, value]")
    return tuple(facts)


def _parse_files(value: object, *, bundle: str) -> dict[str, FileEntry]:
    files = {}
    for name, item in _mapping(value, what="files", bundle=bundle).items():
        match item:
            case {"sha256": str(sha256), "size": int(size), **rest} if not rest and is_digest(sha256) and size >= 0:
                files[name] = FileEntry(sha256=sha256, size=size)
            case _:
                raise corrupt(MANIFEST, bundle=bundle, found=f"has no digest and size for {name!r}")
        if not is_member(name):
            raise corrupt(MANIFEST, bundle=bundle, found=f"lists {name!r}, which no bundle contains")
        named = artifact_digest(name.rpartition("/")[2])
        if named is not None and named != sha256:
            raise corrupt(MANIFEST, bundle=bundle, found=f"lists {name} with the digest {sha256}")
    for name in (PLAN, RECORD):
        if name not in files:
            raise corrupt(MANIFEST, bundle=bundle, found=f"doesn't list {name}")
    return files


def _mapping(value: object, *, what: str, bundle: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise corrupt(MANIFEST, bundle=bundle, found=f"is not as it should be: {what} is no object")
    return cast("dict[str, object]", value)


def _text(value: object, *, what: str, bundle: str) -> str:
    if not isinstance(value, str):
        raise corrupt(MANIFEST, bundle=bundle, found=f"is not as it should be: {what} is no text")
    return value


def _show(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float) else "none"
