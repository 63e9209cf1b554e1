"""A language model's bundle beside its module: every kind of batch, and what differs is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.sample_bundles import Sample, language_model
from piecework.bundle.run.constants import as_source
from piecework.compiler.check.model import check_model
from piecework.errors import CheckError
from piecework.spec.compile_options import BackendName
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.models.tiny import write_config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    return tmp_path


def sample(home: Path, family: str) -> tuple[Path, Sample]:
    directory = write_config(home / "model", family)
    return directory, language_model(home, directory, BackendName.EAGER)


@pytest.mark.parametrize("family", slow_but(("llama", "qwen3", "deepseek_v2"), "llama"))
def test_logits_of_every_kind_of_batch(family: str, home: Path) -> None:
    directory, made = sample(home, family)
    found = check_model(ModelSpec.of(directory, max_tokens=64), made.bundle, weights=as_source(made.weights))
    assert len(found.tried) == 5
    assert "1 × 64 prompt tokens after 0 each" in found.tried
    assert 0 <= found.errors["logits"] < 1e-5


def test_another_model_is_found_out(home: Path) -> None:
    directory, made = sample(home, "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    spec = ModelSpec.of(directory, max_tokens=64)
    with pytest.raises(CheckError, match="output logits") as caught:
        check_model(spec, made.bundle, weights=as_source(made.weights))
    assert "1 × 1 prompt tokens" in caught.value.asked
