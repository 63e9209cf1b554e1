"""Which kernels are built, that each is built once, and that a bundle does without where that fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from piecework.bundle.record import Recorder
from piecework.bundle.store.interface import MemoryStore
from piecework.compiler.backends.backend import Backend
from piecework.compiler.job import Job
from piecework.compiler.kernel_builds import KernelBuilds, KernelJob, kernel_jobs
from piecework.compiler.setup import CompileSetup
from piecework.compiler.split import OpaqueCall
from piecework.errors import CompileError, ShapeContractError, StoreError
from piecework.foundation.notes import INTERFACE, read_note
from piecework.foundation.target import make_target
from piecework.providers.libraries import CPU_ATTENTION
from piecework.spec.compile_options import BackendName, CompileOptions

TARGET = make_target("x86_64", system="linux", flags=frozenset({"avx2", "fma"}))
AOTI = CompileOptions()


class FakeBackend(Backend):
    """Makes files instead of libraries."""

    def __init__(self, scratch: Path, *, error: Exception | None = None) -> None:
        self.scratch = scratch
        self.error = error
        self.built: list[tuple[str, ...]] = []

    def compile(self, jobs: Mapping[str, Job], *, on_event: Any, on_made: Any) -> Mapping[str, ShapeContractError]:
        return {}

    def build_kernel(self, source: Path, *, macros: tuple[str, ...]) -> Path | None:
        self.built.append(macros)
        if self.error is not None:
            raise self.error
        made = self.scratch / "kernel.so"
        made.write_text(f"{source.name} {macros}")
        return made

    def close(self) -> None:
        pass


def call(operator: object, dtype: torch.dtype) -> OpaqueCall:
    query = SimpleNamespace(meta={"val": torch.empty(1, dtype=dtype, device="meta")})
    return OpaqueCall(SimpleNamespace(target=operator, args=(query,)), ())


ATTENTION = torch.ops.piecework.attention.default


def jobs(*calls: OpaqueCall, options: CompileOptions = AOTI, **where: Any) -> tuple[KernelJob, ...]:
    return kernel_jobs(calls, options=options, **{"target": TARGET, "device": "cpu", **where})


def test_each_kernel_once_for_all_types_that_its_operators_have() -> None:
    layered = torch.ops.piecework.layer_attention.default
    wanted = jobs(call(ATTENTION, torch.bfloat16), call(layered, torch.float32), call(ATTENTION, torch.bfloat16))
    assert wanted == (KernelJob(CPU_ATTENTION, ("float32", "bfloat16")),)


def test_none_where_none_can_be_used() -> None:
    one = call(ATTENTION, torch.float32)
    assert jobs() == ()
    assert jobs(call(torch.ops.aten.relu.default, torch.float32)) == ()
    assert jobs(call(ATTENTION, torch.float64)) == ()
    assert jobs(one, device="cuda") == ()
    assert jobs(one, options=CompileOptions(backend=BackendName.EAGER)) == ()
    assert jobs(one, target=make_target("aarch64", system="darwin", flags=frozenset())) == ()


def builds(store: MemoryStore, backend: Backend, recorder: Recorder) -> KernelBuilds:
    made = KernelBuilds(jobs(call(ATTENTION, torch.float32)), CompileSetup(AOTI, backend, store, TARGET, recorder))
    made.start()
    return made


def test_a_kernel_is_built_once_per_store(tmp_path: Path) -> None:
    store, backend, recorder = MemoryStore(tmp_path), FakeBackend(tmp_path), Recorder()
    first = builds(store, backend, recorder)
    artifact = first.finish()["cpu_attention"]
    assert artifact.path.read_bytes().startswith(b"attention.cpp ('PIECEWORK_FLOAT32',)")
    assert read_note(artifact.path, mark=INTERFACE) == '{"kernel":"cpu_attention"}'
    assert {fact.name.rpartition("/")[2] for fact in first.facts()} == {s.name for s in CPU_ATTENTION.sources}
    assert builds(store, backend, recorder).finish() == {"cpu_attention": artifact}
    assert len(backend.built) == 1


def test_keys_tell_apart_what_libraries_depend_on() -> None:
    other = make_target("x86_64", system="linux", flags=frozenset({"avx2", "fma", "avx512f"}))
    one = KernelJob(CPU_ATTENTION, ("float32",))
    keys = {one.key(TARGET), one.key(other), KernelJob(CPU_ATTENTION, ("bfloat16",)).key(TARGET)}
    assert len(keys) == 3
    assert KernelJob(CPU_ATTENTION, ("float32",)).key(TARGET) == one.key(TARGET)


def test_where_building_fails_the_bundle_does_without_and_says_so(tmp_path: Path) -> None:
    error = CompileError(asked="compile", found="no such header", try_="install it")
    recorder = Recorder()
    made = builds(MemoryStore(tmp_path), FakeBackend(tmp_path, error=error), recorder)
    assert made.finish() == {}
    assert made.facts() == ()
    record = recorder.finish()
    assert record.counts["kernels"] == 0
    assert record.notes == ("no native kernel, plain torch instead: no such header",)


def test_other_errors_are_not_kept_quiet(tmp_path: Path) -> None:
    error = StoreError(asked="compile", found="no space left on the disk", try_="free some space")
    made = builds(MemoryStore(tmp_path), FakeBackend(tmp_path, error=error), Recorder())
    with pytest.raises(StoreError, match="no space"):
        made.finish()
