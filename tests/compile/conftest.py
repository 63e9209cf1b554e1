"""One home, and one compiled bundle per dtype, for all tests of this folder: the C++ compiler is slow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.model import CompiledModel, compile_model
from piecework.foundation.environment import Environment
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import reference_model, write_config

MAX_TOKENS = 256


@pytest.fixture(scope="session")
def home(common_dir: Path, new_home: Callable[[Path], Path]) -> Path:
    """A store that all tests of this folder share, in all of pytest-xdist's workers."""
    return new_home(common_dir / "home")


@pytest.fixture(autouse=True)
def use_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(home))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> nn.Module:
    """transformers' own model in float32."""
    return reference_model(model_dir)


@pytest.fixture(scope="session")
def compiled(home: Path, model_dir: Path) -> Callable[..., CompiledModel]:
    """Return a function that compiles the Llama with a dtype and ranges; the store keeps what was compiled before."""

    def make(
        *, dtype: str = "float32", ranges: tuple[tuple[int, int], ...] = (), out: Path | None = None
    ) -> CompiledModel:
        return compile_model(
            ModelSpec.of(model_dir, dtype=dtype, max_tokens=MAX_TOKENS, ranges=ranges),
            store=DirectoryStore(home),
            environment=Environment(store_root=home),
            check_weights=False,
            out=out,
        )

    return make


@pytest.fixture(scope="session")
def float32(compiled: Callable[..., CompiledModel]) -> CompiledModel:
    return compiled()


@pytest.fixture(scope="session")
def ranged(compiled: Callable[..., CompiledModel]) -> CompiledModel:
    return compiled(ranges=((1, 1), (2, 64), (65, 256)))


@pytest.fixture(scope="session")
def bfloat16(compiled: Callable[..., CompiledModel]) -> CompiledModel:
    return compiled(dtype="bfloat16")


@pytest.fixture(scope="session")
def bfloat16_reference(reference: nn.Module, model_dir: Path) -> nn.Module:
    return reference_model(model_dir).to(torch.bfloat16)
