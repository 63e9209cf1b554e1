"""The driver is a library that is made here: what it says is what a bundle for a GPU depends on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from piecework.bundle.facts import Fact, check, environment_facts
from piecework.foundation.gpu import NO_GPU, gpu_architecture

DRIVER = """
int cuInit(unsigned flags) { return %(fails)d; }
int cuDeviceGet(int *device, int ordinal) { *device = 3; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (device != 3) return 1;
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
  return 0;
}
"""


def driver(directory: Path, *, fails: int = 0) -> str:
    source, library = directory / "cuda.c", directory / "libcuda.so.1"
    source.write_text(DRIVER % {"fails": fails})
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def test_no_driver_no_gpu(tmp_path: Path) -> None:
    assert gpu_architecture(driver=str(tmp_path / "libcuda.so.1")) == NO_GPU


def test_what_the_driver_says(tmp_path: Path) -> None:
    assert gpu_architecture(driver=driver(tmp_path)) == "sm_90"


def test_a_driver_without_devices(tmp_path: Path) -> None:
    assert gpu_architecture(driver=driver(tmp_path, fails=100)) == NO_GPU


def test_another_gpu_is_another_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piecework.bundle.facts.gpu_architecture", lambda: "sm_80")
    facts = environment_facts(device="cuda")
    assert Fact("target", "gpu", "sm_80") in facts
    assert not check(facts)
    monkeypatch.setattr("piecework.bundle.facts.gpu_architecture", lambda: "sm_90")
    (difference,) = check(facts)
    assert str(difference) == "target gpu: bundle sm_80, here sm_90"
    assert all(fact.name != "gpu" for fact in environment_facts())
