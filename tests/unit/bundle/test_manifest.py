import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piecework.bundle import Fact, FileEntry, Manifest
from piecework.bundle.format import FORMAT
from piecework.bundle.manifest import parse_manifest
from piecework.errors import BundleError, CorruptBundle
from piecework.foundation.digests import digest_json

ARTIFACT = "artifacts/" + "ab" * 32 + ".so"
MANIFEST = Manifest(
    facts=(Fact("model", "config", "12"), Fact("option", "n", None), Fact("option", "x", 1.5)),
    files={
        "plan.json": FileEntry("cd" * 32, 10),
        "record.json": FileEntry("ef" * 32, 0),
        ARTIFACT: FileEntry("ab" * 32, 7),
    },
    identity={"model": "é", "layers": [1, 2]},
)


def altered(change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a manifest whose digest is right and whose content was changed."""
    value = json.loads(MANIFEST.to_bytes())
    del value["digest"]
    change(value)
    value["digest"] = digest_json(value)
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def test_reads_back() -> None:
    assert parse_manifest(MANIFEST.to_bytes(), bundle="b") == MANIFEST
    assert parse_manifest(altered(lambda value: None), bundle="b") == MANIFEST


def test_every_changed_byte_is_seen() -> None:
    data = MANIFEST.to_bytes()
    for index in range(len(data)):
        for mask in (0x01, 0x80):
            changed = data[:index] + bytes([data[index] ^ mask]) + data[index + 1 :]
            with pytest.raises(BundleError):
                parse_manifest(changed, bundle="b")


def test_every_truncation_is_seen() -> None:
    data = MANIFEST.to_bytes()
    for length in range(len(data)):
        with pytest.raises(CorruptBundle):
            parse_manifest(data[:length], bundle="b")


@given(st.binary(max_size=100) | st.text().map(str.encode))
def test_anything_else_is_corrupt(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(data, bundle="b")


@pytest.mark.parametrize("version", [0, FORMAT + 1, str(FORMAT), float(FORMAT), True, None])
def test_another_format_version_says_so(version: object) -> None:
    with pytest.raises(BundleError, match="format version") as caught:
        parse_manifest(altered(lambda value: value.update(format=version)), bundle="b")
    assert not isinstance(caught.value, CorruptBundle)
    assert f"reads version {FORMAT}" in caught.value.found


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["files"].update({new: value["files"].pop(old)})


@pytest.mark.parametrize(
    "change",
    [
        rename(ARTIFACT, "artifacts/../" + "ab" * 32 + ".so"),
        rename(ARTIFACT, "/etc/passwd"),
        rename(ARTIFACT, "../x.so"),
        rename(ARTIFACT, "artifacts/" + "ab" * 32 + ".exe"),
        rename(ARTIFACT, "artifacts/" + "cd" * 32 + ".so"),
        rename(ARTIFACT, "artifacts/deep/" + "ab" * 32 + ".so"),
        rename(ARTIFACT, "other.json"),
        rename(ARTIFACT, "manifest.json"),
        rename("plan.json", "constants.safetensors"),
        lambda value: value["files"].update({"plan.json": {"sha256": "x", "size": 1}}),
        lambda value: value["files"].update({"plan.json": {"sha256": "ab" * 32, "size": -1}}),
        lambda value: value["files"].update({"plan.json": {"sha256": "ab" * 32}}),
        lambda value: value["files"].update({"plan.json": {"sha256": "ab" * 32, "size": 1, "more": 1}}),
        lambda value: value.update(files=[]),
        lambda value: value.update(facts={}),
        lambda value: value.update(facts=[["a", "b"]]),
        lambda value: value.update(facts=[["a", "b", []]]),
        lambda value: value.update(facts=[[1, "b", "c"]]),
        lambda value: value.update(identity=1),
        lambda value: value.update(piecework=1),
        lambda value: value.update(more=1),
        lambda value: value.pop("identity"),
    ],
)
def test_strict(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(CorruptBundle) as caught:
        parse_manifest(altered(change), bundle="b")
    assert caught.value.file == "manifest.json"
    assert caught.value.try_
