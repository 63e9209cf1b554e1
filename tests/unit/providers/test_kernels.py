"""Kernels and their files; what happens where a built one can't be used. Nothing is compiled here."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import piecework
from piecework.errors import BundleError
from piecework.ops.attention import attention_native
from piecework.ops.layer_attention import layer_attention
from piecework.providers.cpu_attention.kernel import CpuAttention
from piecework.providers.libraries import CPU_ATTENTION, KERNELS, open_kernel
from tests.unit.ops.attention_cases import BATCHES, make_case

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_sources_are_there_and_ship(kernel) -> None:
    package = Path(piecework.__file__).parent
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["piecework"]
    assert kernel.main in kernel.sources
    for source in kernel.sources:
        assert any(fnmatch(str(source.relative_to(package)), pattern) for pattern in patterns), source


def test_a_kernel_of_a_later_version() -> None:
    with pytest.raises(BundleError, match="knows no kernel"):
        open_kernel("cpu_attention_with_more", Path("kernel.so"))


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "kernel.so").write_bytes(b"no library")
    with pytest.raises(BundleError, match="cpu_attention"):
        open_kernel(CPU_ATTENTION.name, tmp_path / "kernel.so")


def test_a_library_of_another_version() -> None:
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    with pytest.raises(BundleError, match="piecework_attention"):
        open_kernel(CPU_ATTENTION.name, library)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> CpuAttention:
    """A kernel whose library answers that it doesn't support the call."""
    attention = CpuAttention.__new__(CpuAttention)
    attention._run = lambda call: 1
    return attention


@pytest.mark.parametrize("batch", BATCHES)
def test_what_a_library_does_not_support_plain_torch_does(idle: CpuAttention, batch: str) -> None:
    case, twin = (make_case(BATCHES[batch], heads=4, kv_heads=2) for _ in range(2))
    options = {"sliding_window": 5, "softcap": 2.0, "sinks": torch.ones(4)}
    expected = attention_native(*twin.args, 0.3, **options)
    assert torch.equal(idle(*case.args, 0.3, **options), expected)
    assert torch.equal(case.args[3], twin.args[3])
    query, _, _, cache, _, *rows = case.args
    assert torch.equal(idle.attend(query, cache, *rows, 0.3, **options), expected)


def test_the_layers_op_has_an_implementation_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(CpuAttention, "__init__", lambda self, library: opened.append(library))
    made = open_kernel(CPU_ATTENTION.name, Path("kernel.so"))
    assert opened == [Path("kernel.so")]
    assert set(made) == CPU_ATTENTION.operators
    assert layer_attention.name in made
