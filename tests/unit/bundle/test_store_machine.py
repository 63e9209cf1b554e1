"""Both stores against a model: whatever is done, in whatever order, and whenever a process dies."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from piecework.bundle import BundleContent, DirectoryStore, Fact, Kind, MemoryStore, Store, find_artifact, find_bundle
from piecework.bundle.bundle import build_directory
from piecework.bundle.record import Record
from piecework.errors import CorruptBundle

# torch's threads may be running in this process; what the children do doesn't touch them
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

KEYS = st.sampled_from(["k", "l"])
CONTENTS = st.sampled_from([b"one", b"two"])


class Stores(RuleBasedStateMachine):
    @initialize(in_memory=st.booleans())
    def open(self, in_memory: bool) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="piecework-test-"))
        (self.home / "memory").mkdir()
        self.store: Store = MemoryStore(self.home / "memory") if in_memory else DirectoryStore(self.home / "store")
        self.is_directory = not in_memory
        self.artifacts: dict[str, bytes] = {}
        self.bundles: dict[str, bytes] = {}
        self.foreign: set[str] = set()
        self.damaged: set[tuple[Kind, str]] = set()
        self.num_aside = 0

    def teardown(self) -> None:
        if hasattr(self, "home"):
            shutil.rmtree(self.home)

    def library(self, data: bytes) -> Path:
        path = self.home / f"{hashlib.sha256(data).hexdigest()}.so"
        path.write_bytes(data)
        return path

    def content(self, data: bytes) -> BundleContent:
        path = self.library(data)
        facts = (Fact("option", "content", data.decode()),)
        return BundleContent(plan={"content": data.decode()}, artifacts={path.name: path}, facts=facts, record=Record())

    def put(self, kind: Kind, key: str, data: bytes) -> None:
        if kind is Kind.ARTIFACT:
            self.store.put_artifact(key, content=self.library(data))
        else:
            self.store.put_bundle(key, content=self.content(data))

    @rule(key=KEYS, data=CONTENTS)
    def put_artifact(self, key: str, data: bytes) -> None:
        self.put(Kind.ARTIFACT, key, data)
        self.artifacts[key] = data
        # content is shared between keys, so storing it again heals it for all of them
        self.damaged -= {(Kind.ARTIFACT, k) for k, there in self.artifacts.items() if there == data}

    @rule(key=KEYS, data=CONTENTS)
    def put_bundle(self, key: str, data: bytes) -> None:
        if (Kind.BUNDLE, key) in self.damaged:
            return
        self.num_aside += key in self.bundles and (self.bundles[key] != data or key in self.foreign)
        self.put(Kind.BUNDLE, key, data)
        self.bundles[key] = data
        self.foreign.discard(key)

    @rule(key=KEYS, data=CONTENTS)
    def adopt(self, key: str, data: bytes) -> None:
        if (Kind.BUNDLE, key) in self.damaged:
            return
        with self.store.scratch() as scratch:
            build_directory(scratch / "bundle", replace(self.content(data), record=Record(notes=("elsewhere",))))
            self.store.adopt(key, unfinished=scratch / "bundle")
        if self.bundles.get(key) != data:
            self.num_aside += key in self.bundles
            self.bundles[key] = data
            self.foreign.add(key)

    @rule(key=KEYS, kind=st.sampled_from(Kind))
    def set_aside(self, key: str, kind: Kind) -> None:
        there = self.artifacts if kind is Kind.ARTIFACT else self.bundles
        if (kind, key) in self.damaged:
            return
        assert self.store.set_aside(kind, key, reason="a rule") == (key in there)
        self.num_aside += key in there
        there.pop(key, None)
        if kind is Kind.BUNDLE:
            self.foreign.discard(key)

    @rule(key=KEYS)
    def damage_bundle(self, key: str) -> None:
        if key in self.bundles and (Kind.BUNDLE, key) not in self.damaged:
            bundle = self.store.get_bundle(key)
            assert bundle is not None
            (bundle.root / "plan.json").write_bytes(b"{}")
            self.damaged.add((Kind.BUNDLE, key))

    @rule(key=KEYS)
    def damage_artifact(self, key: str) -> None:
        if key in self.artifacts and not self.damaged and len(set(self.artifacts.values())) == len(self.artifacts):
            artifact = self.store.get_artifact(key)
            assert artifact is not None
            artifact.path.write_bytes(b"damaged")
            self.damaged.add((Kind.ARTIFACT, key))

    @rule(key=KEYS, kind=st.sampled_from(Kind))
    def find(self, key: str, kind: Kind) -> None:
        reports: list[str] = []
        there = self.artifacts if kind is Kind.ARTIFACT else self.bundles
        found: Any
        if kind is Kind.ARTIFACT:
            found = find_artifact(self.store, key, report=reports.append)
        else:
            found = find_bundle(self.store, key, report=reports.append)
        if (kind, key) in self.damaged:
            assert (found, len(reports)) == (None, 1)
            self.num_aside += 1
            self.damaged.remove((kind, key))
            del there[key]
            if kind is Kind.BUNDLE:
                self.foreign.discard(key)
        assert (found is not None) == (key in there)

    @rule(key=KEYS, kind=st.sampled_from(Kind), data=CONTENTS, nth=st.integers(1, 8))
    def crash_while_storing(self, key: str, kind: Kind, data: bytes, nth: int) -> None:
        there = self.artifacts if kind is Kind.ARTIFACT else self.bundles
        if not self.is_directory or key in there or self.damaged:
            return
        pid = os.fork()
        if pid == 0:
            left = nth
            real = {name: getattr(os, name) for name in ("rename", "replace", "fsync", "mkdir")}

            def dying(name: str, *arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    os._exit(0)
                return real[name](*arguments, **keywords)

            try:
                for name in real:
                    setattr(os, name, lambda *a, name=name, **k: dying(name, *a, **k))
                self.put(kind, key, data)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        self.store = DirectoryStore(self.home / "store")
        found = self.store.get_artifact(key) if kind is Kind.ARTIFACT else self.store.get_bundle(key)
        if found is not None:
            there[key] = data

    @rule(key=KEYS)
    def only_what_was_put_was_made_here(self, key: str) -> None:
        bundle = self.store.get_bundle(key, verify=False)
        if bundle is not None:
            assert self.store.made_here(bundle.digest) == (key not in self.foreign)

    @rule()
    def open_again(self) -> None:
        if self.is_directory:
            self.store = DirectoryStore(self.home / "store")

    @invariant()
    def holds_what_was_put(self) -> None:
        for kind, there in ((Kind.ARTIFACT, self.artifacts), (Kind.BUNDLE, self.bundles)):
            for key in ("k", "l"):
                try:
                    found = self.store.get_artifact(key) if kind is Kind.ARTIFACT else self.store.get_bundle(key)
                except CorruptBundle:
                    assert (kind, key) in self.damaged
                    continue
                assert (kind, key) not in self.damaged
                assert (found is not None) == (key in there)
                if found is not None:
                    digest = hashlib.sha256(there[key]).hexdigest()
                    names = [found.name] if kind is Kind.ARTIFACT else list(found.artifacts)  # type: ignore[union-attr]
                    assert names == [f"{digest}.so"]

    @invariant()
    def lists_what_was_put(self) -> None:
        items = self.store.items()
        present = {(item.kind, item.key) for item in items if not item.aside}
        wanted = {(Kind.ARTIFACT, key) for key in self.artifacts} | {(Kind.BUNDLE, key) for key in self.bundles}
        assert present == wanted
        assert len([item for item in items if item.aside]) == self.num_aside

    @invariant()
    def leaves_nothing_unfinished(self) -> None:
        for name in ("scratch", "locks"):
            place = self.home / "store" / name
            assert not place.exists() or os.listdir(place) == []


Stores.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStores = Stores.TestCase
