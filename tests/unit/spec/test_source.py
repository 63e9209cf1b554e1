"""What may be written for MODEL: directories, and ids of the Hub, which is one on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from piecework.errors import UnsupportedModelError, WeightsError
from piecework.spec.model_spec import ModelSpec
from piecework.spec.source import HubId, hub_id, model_directory, model_name
from tests.unit.models.tiny import write_config
from tests.unit.spec.hub import COMMIT, LocalHub, local_hub

SMALL = {"config.json", "tokenizer.json", "1_Pooling/config.json"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "original").mkdir()
    write_config(directory, "llama")
    for name in ("tokenizer.json", "1_Pooling/config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"):
        (directory / name).write_text(json.dumps({"of": name}))
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"):
        (directory / name).write_text("not needed")
    return directory


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub(model) as hub:
        # what HF_ENDPOINT and HF_HUB_CACHE set before the library is imported
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_only_what_is_needed_is_fetched_and_once(hub: LocalHub, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = ModelSpec.of("owner/tiny", weights=False)
    assert capfd.readouterr().err == "", "bars are for terminals"
    assert set(hub.downloads) == SMALL
    assert spec.key == ModelSpec.of(model).key, "where it came from is no part of the key"
    assert ModelSpec.of("owner/tiny").source == spec.source
    assert sorted(set(hub.downloads) - SMALL) == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    before = len(hub.downloads), hub.requests
    assert ModelSpec.of(Path(f"owner/tiny@{COMMIT}")).source == spec.source
    assert (len(hub.downloads), hub.requests) == before, "of a commit that is cached, nothing is asked"
    assert ModelSpec.of("owner/tiny@old").source == spec.source
    assert len(hub.downloads) == before[0]


def test_the_cache_serves_where_there_is_no_network(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = ModelSpec.of("owner/tiny", weights=False).source
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert ModelSpec.of("owner/tiny", weights=False).source == fetched
    with pytest.raises(UnsupportedModelError, match=r"127\.0\.0\.1:9 can't be reached"):
        ModelSpec.of("owner/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ModelSpec.of("owner/tiny", weights=False).source == fetched
    with pytest.raises(UnsupportedModelError, match=r"not all of it in the cache .* HF_HUB_OFFLINE is set"):
        ModelSpec.of("owner/tiny")


def test_the_first_repositories_have_no_owner(
    hub: LocalHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec.of("tiny")
    assert spec.key == ModelSpec.of(model).key
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ModelSpec.of("tiny").source == spec.source
    with pytest.raises(UnsupportedModelError, match="no directory modle, not all of it in the cache"):
        ModelSpec.of("modle")
    (tmp_path / "tiny").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        ModelSpec.of("tiny")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("modle", "neither a directory modle, nor a repository"),
        ("owner/other", "neither a directory owner/other, nor a repository"),
        ("owner/tiny@new", "no branch, tag or commit new"),
        ("owner/ti--ny", "nor an id of the Hub"),
    ],
)
def test_what_the_hub_has_not_is_said(hub: LocalHub, name: str, found: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        model_directory(name)
    assert found in error.value.found
    assert error.value.try_


def test_a_gated_repository_says_where_to_ask(hub: LocalHub) -> None:
    hub.refusal = "GatedRepo"
    with pytest.raises(UnsupportedModelError, match="a gated repository") as error:
        model_directory("owner/tiny")
    assert f"{hub.endpoint}/owner/tiny" in error.value.try_


def test_a_repository_without_safetensors_says_how_to_convert_it(hub: LocalHub) -> None:
    for name in [name for name in hub.files if name.endswith("of-2.safetensors")]:
        del hub.files[name]
    with pytest.raises(WeightsError, match=r"from_pretrained\(.*owner/tiny"):
        ModelSpec.of("owner/tiny")


def test_a_repository_of_other_files_is_told(hub: LocalHub) -> None:
    hub.files.clear()
    hub.files["model.Q4_K_M.gguf"] = b"GGUF"
    with pytest.raises(UnsupportedModelError, match=r"without config\.json"):
        ModelSpec.of("owner/tiny")


def test_a_download_that_fails_is_our_error(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the cache's directory should be")
    with pytest.raises(UnsupportedModelError, match="failed: "):
        model_directory("owner/tiny")


def test_the_command_line_takes_ids(hub: LocalHub, model: Path, tmp_path: Path) -> None:
    def hits(home: Path, **variables: str) -> bool:
        words = [sys.executable, "-m", "piecework", "why", "owner/tiny", "--no-pieces", "--json"]
        more = {"HF_HOME": str(home), "PIECEWORK_HOME": str(tmp_path / "store"), **variables}
        done = subprocess.run(words, env={**os.environ, **more}, stdout=subprocess.PIPE, check=False)
        found: bool = json.loads(done.stdout)["hit"]
        return found

    assert hits(tmp_path / "fetched", HF_ENDPOINT=hub.endpoint) is False
    assert set(hub.downloads) == SMALL
    repository = tmp_path / "written/hub/models--owner--tiny"  # the layout of the Hub's cache, by hand
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    assert hits(tmp_path / "written", HF_HUB_OFFLINE="1") is False


def test_a_path_that_exists_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/tiny").mkdir(parents=True)
    assert hub_id("models/tiny") is None
    assert (model_name("models/tiny"), model_name("owner/tiny@main")) == ("tiny", "owner/tiny")
    assert [hub_id("tiny"), hub_id("tiny@main")] == [HubId("tiny", None), HubId("tiny", "main")]
    assert model_name("tiny") == "tiny"
    for path in ("./tiny", "tiny.Q4_K_M.gguf", "/tmp/tiny", "~/tiny", "models/of/tiny", "../tiny", "owner/tiny@"):
        assert hub_id(path) is None, path


def test_a_directory_is_read_without_the_hubs_library(model: Path) -> None:
    code = (
        "import sys; from piecework.spec.model_spec import ModelSpec; "
        f"ModelSpec.of({str(model)!r}); raise SystemExit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
