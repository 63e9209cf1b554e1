"""Bundles in an OCI registry; what it says is believed of nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.bundle.registry import Registry, running

from piecework.bundle import Asked, BundleContent, DirectoryStore
from piecework.bundle.signatures import add_signature, make_key, read_key, read_trust
from piecework.bundle.store.interface import ASKED, bundle_key
from piecework.bundle.store.remote import Remote
from piecework.bundle.store.remote_oci import ARTIFACT_TYPE, CONFIG_TYPE
from piecework.bundle.store.travel import find_remote, open_remote, pull, push
from piecework.errors import BundleError, CorruptBundle, StoreError

WANTED = "ab" * 32


@pytest.fixture(scope="module")
def server() -> Iterator[Registry]:
    with running() as registry:
        yield registry


@pytest.fixture
def registry(server: Registry) -> Iterator[Registry]:
    yield server
    server.blobs.clear()
    server.manifests.clear()
    server.requests.clear()
    server.lie = lambda _path, data: data
    server.password = ""


@pytest.fixture
def here(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "there")


@pytest.fixture
def key(here: DirectoryStore, sample_content: BundleContent) -> str:
    content = replace(sample_content, identity={**sample_content.identity, ASKED: WANTED})
    made = bundle_key(WANTED, content.facts)
    here.put_bundle(made, content=content)
    return made


@pytest.fixture
def remote(registry: Registry, here: DirectoryStore, key: str) -> Iterator[Remote]:
    with open_remote(f"oci://{registry.host}/team/bundles") as made:
        push(made, key, store=here)
        yield made


def test_push_and_pull(registry: Registry, remote: Remote, there: DirectoryStore, key: str) -> None:
    assert remote.keys() == remote.keys(WANTED) == (key,)
    assert remote.keys("cd" * 32) == ()
    assert pull(remote, key, store=there).fresh
    assert there.get_bundle(key) is not None
    uploads = [request for request in registry.requests if request.startswith("POST")]
    push(remote, key, store=there)
    assert [request for request in registry.requests if request.startswith("POST")] == uploads


def test_files_are_layers_under_their_own_digests(registry: Registry, remote: Remote, here, key: str) -> None:
    bundle = here.get_bundle(key)
    artifact = json.loads(registry.manifests[f"team/bundles:{key}"])
    assert (artifact["artifactType"], artifact["config"]["mediaType"]) == (ARTIFACT_TYPE, CONFIG_TYPE)
    assert artifact["config"]["digest"] == f"sha256:{bundle.digest}"
    layers = {layer["annotations"]["org.opencontainers.image.title"]: layer for layer in artifact["layers"]}
    assert {name: (layer["digest"], layer["size"]) for name, layer in layers.items()} == {
        name: (f"sha256:{entry.sha256}", entry.size) for name, entry in bundle.manifest.files.items()
    }
    said = artifact["annotations"]
    assert (said["io.kserve.km/framework"], said["io.kserve.km/cache-hash"]) == ("piecework", key)
    assert said["dev.piecework.dtype"] == "float32"
    assert all(isinstance(value, str) for value in said.values())


def test_a_tag_is_one_bundle(registry: Registry, here, there, key: str) -> None:
    with open_remote(f"oci://{registry.host}/team/one:v1") as remote:
        assert remote.holds_one
        assert remote.keys() == ()
        push(remote, key, store=here)
        assert remote.keys() == remote.keys(WANTED) == (key,)
        assert list(registry.manifests) == ["team/one:v1"]
        assert pull(remote, key, store=there).fresh


def test_signatures_travel(remote: Remote, here, there, key: str, tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    trust = read_trust(tmp_path / "key.pub")
    here.put_signatures(key, content=add_signature(here.get_bundle(key).head(), read_key(tmp_path / "key"), bundle="b"))
    push(remote, key, store=here)
    assert pull(remote, key, store=there, trust=trust).bundle.head().signatures is not None


def test_a_pull_takes_few_round_trips(registry: Registry, remote: Remote, there, key: str) -> None:
    registry.requests.clear()
    assert find_remote(remote, WANTED, store=there, asked=Asked(), report=pytest.fail) is not None
    one_by_one = [request for request in registry.requests if "/blobs/" not in request]
    assert len(one_by_one) == 2  # tags, manifest; then its config, and all files at a time
    assert len(registry.requests) == 2 + 1 + len(there.get_bundle(key).manifest.files)


@pytest.mark.parametrize(
    "lie",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data + b"x" * (3 << 20),
        lambda data: None,
    ],
)
def test_a_registry_that_lies(registry: Registry, remote: Remote, there, key: str, lie) -> None:
    blobs = [f"/v2/team/bundles/blobs/{digest}" for digest in registry.blobs]
    for path in (*blobs, f"/v2/team/bundles/manifests/{key}"):
        registry.lie = lambda asked, data, path=path: lie(data) if asked == path else data
        notes: list[str] = []
        assert find_remote(remote, WANTED, store=there, asked=Asked(), report=notes.append) is None, path
        assert len(notes) == 1
        with pytest.raises((StoreError, BundleError)):
            pull(remote, key, store=there)
    assert len(blobs) == 6
    assert there.items() == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'{"config": {"mediaType": "text"}, "layers": []}',
        b'{"config": {"mediaType": "%s", "digest": "sha256:../../x", "size": 1}, "layers": []}' % CONFIG_TYPE.encode(),
        b'{"config": {"mediaType": "%s"}, "layers": [{"annotations": 1}]}' % CONFIG_TYPE.encode(),
        b"[" * 100_000,
    ],
)
def test_what_is_no_bundle(registry: Registry, remote: Remote, there, key: str, content: bytes) -> None:
    registry.manifests[f"team/bundles:{key}"] = content
    with pytest.raises(CorruptBundle, match="something else under this tag"):
        pull(remote, key, store=there)
    assert there.items() == ()


def test_an_answer_without_end(registry: Registry, remote: Remote, there, key: str) -> None:
    registry.manifests[f"team/bundles:{key}"] = b" " * (5 << 20)
    with pytest.raises(StoreError, match="more than"):
        pull(remote, key, store=there)


def test_nobody_is_there(there: DirectoryStore) -> None:
    remote = open_remote("oci://127.0.0.1:9/team/bundles")
    notes: list[str] = []
    assert find_remote(remote, WANTED, store=there, asked=Asked(), report=notes.append) is None
    assert "is not used: ConnectionError" in notes[0]


@pytest.mark.parametrize(
    ("url", "start"),
    [
        ("oci://ghcr.io/my.org/name", "https://ghcr.io/v2/my.org/name"),
        ("oci+http://registry:5000/a/b:tag", "http://registry:5000/v2/a/b"),
        ("oci://localhost:5000/a", "http://localhost:5000/v2/a"),
        ("oci://localhost.evil.example/a", "https://localhost.evil.example/v2/a"),
    ],
)
def test_plain_http_is_for_this_machine(url: str, start: str) -> None:
    assert open_remote(url)._api == start


def test_name_and_password_of_docker_login(registry, here, there, key, tmp_path, monkeypatch) -> None:
    registry.password = base64.b64encode(b"anna:secret").decode()
    url = f"oci://{registry.host}/team/bundles"
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_remote(url) as remote, pytest.raises(StoreError, match="authentication"):
        push(remote, key, store=here)
    assert registry.manifests == {}
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text(
        json.dumps({"auths": {registry.host: {"auth": registry.password}}})
    )
    with open_remote(url) as remote:
        push(remote, key, store=here)
        assert find_remote(remote, WANTED, store=there, asked=Asked(), report=pytest.fail) is not None
