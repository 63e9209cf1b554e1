"""`piecework store show | export | import | push | pull | keygen | sign`, as one types them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle import BundleContent, DirectoryStore
from piecework.bundle.store.interface import ASKED, bundle_key
from piecework.cli.main import main

WANTED = "ab" * 32


@pytest.fixture
def key(sample_content: BundleContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    content = replace(sample_content, identity={**sample_content.identity, ASKED: WANTED})
    made = bundle_key(WANTED, content.facts)
    DirectoryStore(tmp_path / "home").put_bundle(made, content=content)
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PIECEWORK_TRUST", raising=False)
    return made


@pytest.fixture
def other_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> pytest.MonkeyPatch:
    """Return what sets the environment's variables; `PIECEWORK_HOME` is changed by tests."""
    del key
    return monkeypatch


def call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    assert main(["store", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_show(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(capsys, "show", key[:6])
    assert (shown["key"], shown["made_here"], shown["signed_by"]) == (key, True, [])
    assert shown["identity"][ASKED] == WANTED
    assert shown["files"]["plan.json"]["bytes"] > 0
    assert ["option", "dtype", "float32"] in shown["facts"]
    assert main(["store", "show", key]) == 0
    text = capsys.readouterr().out
    assert "signed by" in text
    assert "plan.json" in text
    assert "no such bundle" in call(capsys, "show", "cd", code=1)["found"]


def test_a_beginning_that_several_have(key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, sample_content):
    store = DirectoryStore(tmp_path / "home")
    store.put_bundle(key + "0", content=sample_content)
    assert "2 bundles whose keys start so" in call(capsys, "show", key[:6], code=1)["found"]
    assert call(capsys, "show", key)["key"] == key


def test_out_signed_and_in(other_home, key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    archive, secret = tmp_path / "b.pwb", tmp_path / "secret"
    call(capsys, "export", key[:8], archive)
    public = call(capsys, "keygen", secret)["public_key"]
    other_home.setenv("PIECEWORK_HOME", str(tmp_path / "second"))
    refused = call(capsys, "import", archive, "--trust", f"{secret}.pub", code=1)
    assert (refused["error"], call(capsys, "ls")["items"]) == ("UntrustedBundle", [])
    assert call(capsys, "sign", archive, "--key", secret)["public_key"] == public
    other_home.setenv("PIECEWORK_TRUST", f"{secret}.pub")
    assert call(capsys, "import", archive) == {"key": key, "fresh": True}
    assert call(capsys, "show", key)["signed_by"] == [public]
    assert not call(capsys, "show", key)["made_here"]
    assert call(capsys, "verify")["items"] == []
    assert call(capsys, "import", archive) == {"key": key, "fresh": False}
    assert "File exists" in call(capsys, "keygen", secret, code=1)["found"]


def test_signing_in_the_store(key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    public = call(capsys, "keygen", tmp_path / "secret")["public_key"]
    for _ in range(2):
        call(capsys, "sign", key[:8], "--key", tmp_path / "secret")
    assert call(capsys, "show", key)["signed_by"] == [public]
    assert call(capsys, "verify")["items"] == []


def test_push_and_pull(other_home, key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    assert call(capsys, "pull", url, code=1)["found"] == "no bundle there"
    assert call(capsys, "push", url)["bundles"] == [{"key": key, "fresh": True}]
    other_home.setenv("PIECEWORK_HOME", str(tmp_path / "second"))
    assert call(capsys, "pull", url, key[:5])["bundles"] == [{"key": key, "fresh": True}]
    assert call(capsys, "pull", url)["bundles"] == [{"key": key, "fresh": False}]
    assert "no such bundle" in call(capsys, "pull", url, "zz", code=1)["found"]
    assert main(["store", "pull", url]) == 0
    assert capsys.readouterr().out == f"{key} was there already\n"


def test_one_address_is_not_for_two_bundles(key, capsys, tmp_path, sample_content) -> None:
    DirectoryStore(tmp_path / "home").put_bundle("second", content=sample_content)
    refused = call(capsys, "push", "oci://localhost:9/name:tag", code=1)
    assert "an address for one bundle" in refused["found"]


def test_a_removed_bundle_is_no_longer_known_as_made_here(key, capsys, tmp_path) -> None:
    marks = list((tmp_path / "home" / "made").iterdir())
    assert len(marks) == 1
    call(capsys, "rm", key)
    assert list((tmp_path / "home" / "made").iterdir()) == []
