"""Bundles through a real S3 server (moto's) and a real registry (distribution's, Debian's package docker-registry)."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import servers
from piecework.bundle import Asked, BundleContent, DirectoryStore
from piecework.bundle.bundle import copy_bundle
from piecework.bundle.signatures import add_signature, make_key, read_key, read_trust
from piecework.bundle.store.interface import ASKED, bundle_key
from piecework.bundle.store.lookup import find_bundle
from piecework.bundle.store.travel import find_remote, import_bundle, open_remote, pull, push
from piecework.errors import StoreError, UntrustedBundle
from tests.unit.conftest import sample_content  # noqa: F401  a fixture

pytestmark = pytest.mark.slow
WANTED = "ab" * 32


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = servers.free_port(), tmp_path_factory.mktemp("s3") / "log"
    with servers.running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port=port, log=log):
        bucket = urllib.request.Request(f"http://127.0.0.1:{port}/bundles", method="PUT")
        bucket.add_header("Host", "s3.amazonaws.com")
        urllib.request.urlopen(bucket).close()
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = servers.registry_command()
    if command is None:
        pytest.skip("no docker-registry")
    with servers.registry(tmp_path_factory.mktemp("registry"), command=command) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture(params=["s3", "registry"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    place = request.getfixturevalue(request.param)
    if request.param == "registry":
        return f"oci://{place}/team/{tmp_path.name.replace('_', '').lower()}"
    variables = {"ENDPOINT_URL": place, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return f"s3://bundles/{tmp_path.name}"


@pytest.fixture
def content(sample_content: BundleContent) -> BundleContent:  # noqa: F811
    return replace(sample_content, identity={**sample_content.identity, ASKED: WANTED})


def test_there_and_back(url: str, content: BundleContent, tmp_path: Path) -> None:
    here, there, key = DirectoryStore(tmp_path / "a"), DirectoryStore(tmp_path / "b"), bundle_key(WANTED, content.facts)
    here.put_bundle(key, content=content)
    make_key(tmp_path / "key")
    trust = read_trust(tmp_path / "key.pub")
    with open_remote(url) as remote:
        assert remote.keys() == ()
        assert remote.head(key) is None
        with pytest.raises(StoreError, match="no such bundle"):
            pull(remote, key, store=there)
        push(remote, key, store=here)
        assert remote.keys(WANTED) == (key,)
        with pytest.raises(UntrustedBundle):
            pull(remote, key, store=there, trust=trust)
        bundle = here.get_bundle(key)
        assert bundle is not None
        here.put_signatures(key, content=add_signature(bundle.head(), read_key(tmp_path / "key"), bundle=key))
        push(remote, key, store=here)
        found = find_remote(remote, WANTED, store=there, asked=Asked(), report=pytest.fail, trust=trust)
    assert found is not None
    assert find_bundle(there, WANTED, report=pytest.fail, trust=trust) is not None
    copy_bundle(found, to=tmp_path / "out.pwb")
    third = DirectoryStore(tmp_path / "c")
    assert import_bundle(tmp_path / "out.pwb", store=third, trust=trust).key == key


def test_several_bundles_share_their_files(url: str, content: BundleContent, tmp_path: Path) -> None:
    here, there = DirectoryStore(tmp_path / "a"), DirectoryStore(tmp_path / "b")
    keys = []
    for number in range(3):
        facts = (*content.facts, replace(content.facts[0], kind="option", name="number", value=number))
        keys.append(bundle_key(WANTED, facts))
        here.put_bundle(keys[-1], content=replace(content, facts=facts))
    with open_remote(url) as remote:
        for key in keys:
            push(remote, key, store=here)
        assert set(remote.keys()) == set(keys)
        assert all(pull(remote, key, store=there).fresh for key in keys)
    assert {item.key for item in there.items()} == set(keys)
