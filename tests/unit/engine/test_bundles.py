"""Finding a model's bundle, saying why there is none, and the process that compiles one."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from pathlib import Path

import pytest

from piecework.bundle.facts import Fact, environment_facts
from piecework.bundle.record import Record
from piecework.bundle.store.interface import BundleContent, MemoryStore
from piecework.engine.bundles import WantedBundle, compile_process, compile_wanted, find, why_missing
from piecework.engine.compile_process import CompileProcess, CompileStep, parse_step
from piecework.errors import CompileError, UnsupportedModelError
from piecework.foundation.target import read_target
from piecework.models.bundle_key import bundle_key
from piecework.models.config import read_config
from piecework.ops.ir.selection import ProviderOrder
from tests.unit.models.tiny import write_config

PLAN = {"steps": []}


@pytest.fixture
def wanted(tmp_path: Path) -> WantedBundle:
    return WantedBundle(read_config(write_config(tmp_path / "model", "llama")), "float32", 64)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    root = tmp_path / "store"
    root.mkdir()
    return MemoryStore(root)


def _put(store: MemoryStore, wanted: WantedBundle, *changed: Fact, key: str | None = None) -> None:
    target = read_target()
    facts = {(fact.kind, fact.name): fact for fact in (*wanted.expected, *environment_facts(target=target))}
    facts.update({(fact.kind, fact.name): fact for fact in changed})
    content = BundleContent(plan=PLAN, artifacts={}, facts=tuple(facts.values()), record=Record())
    store.put_bundle(key or bundle_key(wanted.expected, target=target), content=content)


def test_a_bundle_with_the_facts_is_found(store, wanted):
    _put(store, wanted)
    found = find(wanted, store=store, on_note=pytest.fail)
    assert found is not None
    assert not found.compiled


def test_an_eager_bundle_is_another_one(store, wanted):
    _put(store, wanted)
    eager = WantedBundle(wanted.config, "float32", 64, backend="eager")
    assert find(eager, store=store, on_note=pytest.fail) is None
    assert "option backend: bundle aoti, here eager" in why_missing(eager, store=store)


def test_the_ways_of_latent_attention_are_bundles_of_their_own(store, wanted, tmp_path):
    config = read_config(write_config(tmp_path / "latent", "deepseek_v3"))
    exposed, opaque = (WantedBundle(config, "float32", 64, mla=mla) for mla in ("exposed", "opaque"))
    _put(store, exposed)
    assert find(exposed, store=store, on_note=pytest.fail) is not None
    assert find(opaque, store=store, on_note=pytest.fail) is None
    assert "option mla: bundle exposed, here opaque" in why_missing(opaque, store=store)
    assert WantedBundle(wanted.config, "float32", 64, mla="opaque").expected == wanted.expected


def test_the_kinds_of_latent_caches_are_bundles_of_their_own(store, wanted, tmp_path):
    config = read_config(write_config(tmp_path / "latent", "deepseek_v3"))
    auto, fp8 = (WantedBundle(config, "float32", 64, kv_cache_dtype=kind) for kind in ("auto", "fp8"))
    _put(store, auto)
    assert find(auto, store=store, on_note=pytest.fail) is not None
    assert find(fp8, store=store, on_note=pytest.fail) is None
    assert "option kv_cache_dtype: bundle auto, here fp8" in why_missing(fp8, store=store)
    with pytest.raises(UnsupportedModelError, match="a model without latent attention"):
        _ = WantedBundle(wanted.config, "float32", 64, kv_cache_dtype="fp8").expected


def test_another_order_of_providers_is_another_bundle(store, wanted):
    _put(store, wanted)
    other = dataclasses.replace(wanted, providers=ProviderOrder.parse(["rms_norm=aten,native"]))
    assert find(other, store=store, on_note=pytest.fail) is None
    assert "option providers: bundle native, here native;rms_norm=aten,native" in why_missing(other, store=store)
    command = compile_process(other)._command
    assert command[command.index("--provider") + 1] == "native;rms_norm=aten,native"
    assert "--provider" not in compile_process(wanted)._command


def test_an_empty_store_has_nothing_of_the_model(store, wanted):
    assert why_missing(wanted, store=store) == "no bundle of this model in the store"


def test_the_nearest_bundle_says_what_differs(store, wanted):
    old = Fact("torch", "version", "1.0")
    _put(store, wanted, old, key="near")
    _put(store, wanted, old, Fact("option", "dtype", "bfloat16"), key="far")
    _put(store, wanted, Fact("model", "config", "0" * 64), key="another-model")
    why = why_missing(wanted, store=store)
    assert "torch version: bundle 1.0, here " in why
    assert "dtype" not in why


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
    found = compile_wanted(compile_process(wanted), on_line=lines.append)
    assert (found.bundle.path, found.compiled) == (place, True)
    assert lines[0].startswith("-m piecework compile ")
    assert lines[0].endswith(
        "--dtype float32 --max-tokens 64 --device cpu --backend aoti --mla exposed --kv-cache-dtype auto"
    )
    assert lines[1:] == ["[1/2] now"]


def test_a_compile_that_fails_says_why(tmp_path, monkeypatch, wanted):
    _command(tmp_path, monkeypatch, 'echo \'{"asked": "a", "found": "f", "try": "t"}\'; exit 1')
    with pytest.raises(CompileError, match="found: f"):
        compile_wanted(compile_process(wanted), on_line=lambda _line: None)
    _command(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(CompileError, match="the compile's process failed"):
        compile_wanted(compile_process(wanted), on_line=None)


def test_a_compile_can_be_stopped(tmp_path, monkeypatch, wanted):
    _command(tmp_path, monkeypatch, "echo begun >&2; exec sleep 60")
    process = compile_process(wanted)
    begun = time.monotonic()
    with pytest.raises(CompileError, match="it was stopped"):
        compile_wanted(process, on_line=lambda _line: threading.Thread(target=process.stop).start())
    with pytest.raises(CompileError, match="it was stopped"):
        process.run(None)
    assert time.monotonic() - begun < 30


def test_an_error_of_the_one_who_listens_ends_the_process(tmp_path, monkeypatch):
    _command(tmp_path, monkeypatch, "echo begun >&2; exec sleep 60")
    process = CompileProcess(tmp_path, dtype="float32", max_tokens=1, device="cpu", backend="aoti")
    with pytest.raises(ZeroDivisionError):
        process.run(lambda _line: 1 / 0)
