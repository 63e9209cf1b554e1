"""Finding a model's bundle, saying why there is none, and the process that compiles one."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from piecework.bundle.facts import Fact, config_facts, environment_facts, making_facts
from piecework.bundle.record import Record
from piecework.bundle.signatures import make_key, read_trust
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import ASKED, BundleContent, MemoryStore, Store, bundle_key
from piecework.bundle.store.travel import open_remote, push
from piecework.engine.bundles import find, run_compile, why_missing
from piecework.engine.compile_process import CompileProcess, CompileStep, parse_step
from piecework.errors import CompileError, WeightsError
from piecework.foundation.target import read_target
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import write_config

PLAN = {"steps": []}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_config(tmp_path / "model", "llama")


@pytest.fixture
def wanted(model_dir: Path) -> ModelSpec:
    return ModelSpec.of(model_dir, max_tokens=64)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    root = tmp_path / "store"
    root.mkdir()
    return MemoryStore(root)


def _put(store: Store, wanted: ModelSpec, *changed: Fact, key: str | None = None) -> None:
    target = read_target()
    config = config_facts(wanted.config.raw, wanted.config.raw)
    made = (*wanted.facts, *config, *making_facts(), *environment_facts(target=target))
    facts = {(fact.kind, fact.name): fact for fact in made}
    facts.update({(fact.kind, fact.name): fact for fact in changed})
    content = BundleContent(plan=PLAN, artifacts={}, facts=tuple(facts.values()), record=Record())
    content = replace(content, identity={**wanted.identity, ASKED: wanted.key})
    store.put_bundle(key or bundle_key(wanted.key, content.facts), content=content)


def test_a_bundle_with_the_facts_is_found(store, wanted):
    _put(store, wanted)
    found = find(wanted, store=store, on_note=pytest.fail)
    assert found is not None
    assert not found.compiled


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("dtype", "bfloat16", "dtype: bundle float32, here bfloat16"),
        ("max_tokens", 32, "max_tokens: bundle 64, here 32"),
        ("backend", "eager", "backend: bundle aoti, here eager"),
        ("device", "cuda", "device: bundle cpu, here cuda"),
        ("providers", ["rms_norm=aten,native"], "providers: bundle native, here native;rms_norm=aten,native"),
        ("ranges", "1,2:64", "ranges: bundle nothing, here 1:1,2:64"),
        ("passes_off", ["merge_linear"], "passes_off: bundle nothing, here merge_linear"),
        ("pack_linear", "off", "pack_linear: bundle nothing, here off"),
    ],
)
def test_another_option_is_another_bundle_and_the_miss_names_it(store, wanted, model_dir, option, value, difference):
    _put(store, wanted)
    other = ModelSpec.of(model_dir, **{"max_tokens": 64, option: value})
    assert find(other, store=store, on_note=pytest.fail) is None
    assert f"the nearest differs: option {difference}" in why_missing(other, store=store)
    _put(store, other)
    assert find(other, store=store, on_note=pytest.fail) is not None


@pytest.mark.parametrize(("option", "value"), [("mla", "opaque"), ("kv_cache_dtype", "fp8")])
def test_options_of_latent_attention_count_where_there_is_some(store, tmp_path, option, value):
    latent = write_config(tmp_path / "latent", "deepseek_v3")
    default, other = ModelSpec.of(latent), ModelSpec.of(latent, **{option: value})
    _put(store, default)
    assert find(default, store=store, on_note=pytest.fail) is not None
    assert find(other, store=store, on_note=pytest.fail) is None
    assert f"option {option}: bundle {getattr(default, option)}, here {value}" in why_missing(other, store=store)


def test_an_empty_store_has_nothing_of_the_model(store, wanted):
    assert why_missing(wanted, store=store) == "no bundle of this model in the store"


def test_the_nearest_bundle_says_what_differs(store, wanted):
    old = Fact("torch", "version", "1.0")
    _put(store, wanted, old, key="near")
    _put(store, wanted, old, Fact("option", "dtype", "bfloat16"), key="far")
    _put(store, wanted, old, Fact("config", "hidden_size", 1), Fact("config", "vocab_size", 1), key="farther")
    why = why_missing(wanted, store=store)
    assert "torch version: bundle 1.0, here " in why
    assert "dtype" not in why


@pytest.fixture
def remote(tmp_path: Path, wanted: ModelSpec) -> str:
    """Return the URL of a remote with the bundle, and with one for another torch."""
    there, url = DirectoryStore(tmp_path / "there"), f"file://{tmp_path}/remote"
    _put(there, wanted, Fact("torch", "version", "1.0"))
    _put(there, wanted)
    with open_remote(url) as made:
        for key in there.bundles(wanted.key):
            push(made, key, store=there)
        assert len(made.keys()) == 2
    return url


def test_a_remote_fills_the_store_with_what_fits(store, wanted, remote):
    notes: list[str] = []
    found = find(wanted, store=store, on_note=notes.append, remote=remote)
    assert found is not None
    assert notes == [f"took the bundle from {remote}"]
    assert len(store.bundles(wanted.key)) == 1
    shutil.rmtree(remote.removeprefix("file://"))
    assert find(wanted, store=store, on_note=pytest.fail, remote=remote) is not None


def test_a_remote_is_not_asked_for_what_is_here(store, wanted):
    _put(store, wanted)
    assert find(wanted, store=store, on_note=pytest.fail, remote="nothing://there") is not None


@pytest.mark.parametrize("url", ["nothing://there", "nowhere", "oci://127.0.0.1:9/x"])
def test_a_remote_that_fails_is_a_note(store, wanted, url):
    notes: list[str] = []
    assert find(wanted, store=store, on_note=notes.append, remote=url) is None
    assert [note.startswith(f"the remote {url} is not used: ") for note in notes] == [True]


def test_what_a_remote_has_must_be_signed(store, wanted, remote, tmp_path):
    make_key(tmp_path / "key")
    trust = read_trust(tmp_path / "key.pub")
    notes: list[str] = []
    assert find(wanted, store=store, on_note=notes.append, remote=remote, trust=trust) is None
    assert ["it is not signed" in note for note in notes] == [True]
    assert store.items() == ()


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("capturing", CompileStep("capturing")),
        ("[2/3] compiling a piece", CompileStep("compiling a piece", 2, 3)),
        ("[x/3] what", CompileStep("[x/3] what")),
    ],
)
def test_progress_lines(line, step):
    assert parse_step(line) == step


def _command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script in the place of Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_compile_says_what_it_does_and_where_the_bundle_is(tmp_path, monkeypatch, store, wanted):
    _put(store, wanted)
    place = find(wanted, store=store, on_note=pytest.fail).bundle.path
    _command(tmp_path, monkeypatch, f'echo "$*" >&2; echo "[1/2] now" >&2; echo \'{{"bundle": "{place}"}}\'')
    lines: list[str] = []
    found = run_compile(CompileProcess(wanted, weights=True), on_line=lines.append)
    assert (found.bundle.path, found.compiled) == (place, True)
    options = f"--spec {wanted.to_json()} --weights real --json --parent {os.getpid()}"
    assert lines[0] == f"-P -m piecework compile {options}"
    assert lines[1:] == ["[1/2] now"]


def test_a_compile_that_fails_says_why(tmp_path, monkeypatch, wanted):
    _command(tmp_path, monkeypatch, 'echo \'{"asked": "a", "found": "f", "try": "t"}\'; exit 1')
    with pytest.raises(CompileError, match="found: f"):
        run_compile(CompileProcess(wanted), on_line=lambda _line: None)
    _command(
        tmp_path, monkeypatch, 'echo \'{"error": "WeightsError", "asked": "a", "found": "f", "try": "t"}\'; exit 1'
    )
    with pytest.raises(WeightsError, match="found: f"):
        run_compile(CompileProcess(wanted), on_line=lambda _line: None)
    _command(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(CompileError, match="the compile's process failed"):
        run_compile(CompileProcess(wanted), on_line=None)


def test_a_compile_can_be_stopped(tmp_path, monkeypatch, wanted):
    _command(tmp_path, monkeypatch, "echo begun >&2; exec sleep 60")
    process = CompileProcess(wanted)
    begun = time.monotonic()
    with pytest.raises(CompileError, match="it was stopped"):
        run_compile(process, on_line=lambda _line: threading.Thread(target=process.stop).start())
    with pytest.raises(CompileError, match="it was stopped"):
        process.run(None)
    assert time.monotonic() - begun < 30


def test_an_error_of_the_one_who_listens_ends_the_process(tmp_path, monkeypatch, wanted):
    _command(tmp_path, monkeypatch, "echo begun >&2; exec sleep 60")
    process = CompileProcess(wanted)
    with pytest.raises(ZeroDivisionError):
        process.run(lambda _line: 1 / 0)
