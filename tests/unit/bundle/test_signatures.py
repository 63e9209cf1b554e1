"""Who signed a bundle, checked before anything else of it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from piecework.bundle import Bundle, open_bundle
from piecework.bundle.bundle import copy_bundle
from piecework.bundle.format import MANIFEST, SIGNATURES
from piecework.bundle.signatures import (
    Head,
    Trust,
    add_signature,
    make_key,
    merged,
    parse_signatures,
    read_key,
    read_trust,
)
from piecework.errors import CorruptBundle, StoreError, UntrustedBundle

Write = Callable[..., Bundle]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def trust(key: Path) -> Trust:
    found = read_trust(key.with_name("key.pub"))
    assert found is not None
    return found


@pytest.fixture(params=["bundle", "bundle.pwb"])
def signed(request: pytest.FixtureRequest, tmp_path: Path, write_sample: Write, key: Path) -> Path:
    path = tmp_path / "signed" / request.param
    sign(write_sample(path), key)
    return path


def sign(bundle: Bundle, key: Path) -> None:
    head = bundle.head()
    signatures = add_signature(head, read_key(key), bundle="b")
    copy_bundle(bundle, to=bundle.path, head=Head(head.manifest, signatures))


def test_a_signed_bundle_is_trusted(signed: Path, trust: Trust, tmp_path: Path) -> None:
    assert open_bundle(signed, trust=trust, extract_root=tmp_path / "x").head().signatures is not None
    open_bundle(signed, extract_root=tmp_path / "x")


@pytest.mark.parametrize("name", ["bundle", "bundle.pwb"])
def test_one_that_nobody_signed_is_not_read(name: str, write_sample: Write, trust: Trust, tmp_path: Path) -> None:
    bundle = write_sample(tmp_path / name)
    if name == "bundle":
        (bundle.root / "plan.json").unlink()  # would be CorruptBundle
    with pytest.raises(UntrustedBundle, match="it is not signed"):
        open_bundle(tmp_path / name, trust=trust, extract_root=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_key_is_not_enough(signed: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    with pytest.raises(UntrustedBundle, match="none is trusted"):
        open_bundle(signed, trust=read_trust(tmp_path / "other.pub"), extract_root=tmp_path / "x")


def test_a_signature_of_another_bundle_is_not_one(tmp_path: Path, write_sample: Write, key: Path, trust: Trust) -> None:
    sign(write_sample(tmp_path / "a"), key)
    other = write_sample(tmp_path / "b", identity={"model": "another"})
    (other.root / SIGNATURES).write_bytes((tmp_path / "a" / SIGNATURES).read_bytes())
    with pytest.raises(UntrustedBundle, match="is not one of this content"):
        open_bundle(other.path, trust=trust)


def test_every_changed_byte_of_manifest_or_signature_is_refused(
    tmp_path: Path, write_sample: Write, key: Path, trust: Trust
) -> None:
    sign(write_sample(tmp_path / "a"), key)
    for name in (MANIFEST, SIGNATURES):
        path = tmp_path / "a" / name
        content = path.read_bytes()
        for position in range(0, len(content), 37):
            changed = bytearray(content)
            changed[position] ^= 1
            path.write_bytes(changed)
            with pytest.raises((UntrustedBundle, CorruptBundle)):
                open_bundle(tmp_path / "a", trust=trust)
        path.write_bytes(content)
    open_bundle(tmp_path / "a", trust=trust)


def test_several_may_sign_and_one_is_enough(tmp_path: Path, write_sample: Write, key: Path, trust: Trust) -> None:
    make_key(tmp_path / "other")
    path = tmp_path / "bundle"
    for signer in (key, tmp_path / "other", key):
        sign(open_bundle(path) if path.exists() else write_sample(path), signer)
    signatures = parse_signatures(open_bundle(path).head().signatures, bundle="b")
    assert len(signatures) == 2
    open_bundle(path, trust=trust)
    open_bundle(path, trust=read_trust(tmp_path / "other.pub"))


def test_signatures_of_two_copies_are_joined(tmp_path: Path, write_sample: Write, key: Path) -> None:
    head = write_sample(tmp_path / "a").head()
    make_key(tmp_path / "other")
    one = add_signature(head, read_key(key), bundle="b")
    two = add_signature(head, read_key(tmp_path / "other"), bundle="b")
    assert merged(one, None, bundle="b") == one
    assert merged(None, two, bundle="b") == two
    assert len(parse_signatures(merged(one, two, bundle="b"), bundle="b")) == 2


def test_what_was_made_here_needs_no_signature(tmp_path: Path, write_sample: Write, key: Path) -> None:
    bundle = write_sample(tmp_path / "a")
    trust = read_trust(key.with_name("key.pub"), is_own=lambda digest: digest == bundle.digest)
    open_bundle(bundle.path, trust=trust)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"signatures": {}}',
        b'{"signatures": [1]}',
        b'{"signatures": [{"key": "12", "signature": "34"}]}',
        b'{"signatures": [], "more": 1}',
        b"[" * 10000,
        b'{"signatures": [{"key": "' + b"a" * 64 + b'", "signature": "' + b"Z" * 128 + b'"}]}',
    ],
)
def test_broken_signatures(content: bytes, tmp_path: Path, write_sample: Write, trust: Trust) -> None:
    bundle = write_sample(tmp_path / "a")
    (bundle.root / SIGNATURES).write_bytes(content)
    with pytest.raises(CorruptBundle, match=SIGNATURES):
        open_bundle(bundle.path, trust=trust)


def test_no_more_than_a_few_signatures_are_read(tmp_path: Path, write_sample: Write, trust: Trust) -> None:
    bundle = write_sample(tmp_path / "a")
    (bundle.root / SIGNATURES).write_bytes(b" " * (1 << 20))
    with pytest.raises(CorruptBundle, match="too large"):
        open_bundle(bundle.path, trust=trust)


def test_a_key_is_for_its_owner(tmp_path: Path, key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StoreError, match="File exists"):
        make_key(key)
    key.chmod(0o644)
    with pytest.raises(StoreError, match=f"chmod 600 {key}"):
        read_key(key)


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_to_sign_with(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="no key"):
        read_key(path)


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n\n{'a' * 64} anna\n{'b' * 64}  # ben\n")
    found = read_trust(path)
    assert found is not None
    assert found.keys == {"a" * 64, "b" * 64}
    assert read_trust(None) is None


@pytest.mark.parametrize(("content", "match"), [("# none\n", "no key"), ("a\n", "line 1"), ("A" * 64, "line 1")])
def test_a_broken_file_of_keys_trusts_nobody(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(StoreError, match=match):
        read_trust(path)
    with pytest.raises(StoreError):
        read_trust(tmp_path / "missing")
