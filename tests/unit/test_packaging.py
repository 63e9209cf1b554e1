"""What ships: the demo model, the pins, the commands of the README, and nothing of the machine it was made on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import piecework
from piecework.foundation.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "src" / "piecework" / "demo_model"
# Written in parts, so that this file doesn't find itself.
MACHINE_PATHS = re.compile(
    rb"(?<![\w./-])/(?:ro" + rb"ot|wo" + rb"rk|tmp/p" + rb"w)(?:/|\b)"  # the build's own directories
    rb"|(?<![\w./-])/ho" + rb"me/\w"
)


@pytest.fixture(scope="module")
def project() -> dict:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_the_demo_model_is_small():
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 8_000_000


def test_the_demo_model_has_the_tensors_its_config_asks_for():
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    with safe_open(DEMO_MODEL / "model.safetensors", framework="numpy") as weights:
        names = set(weights.keys())
        embedding = weights.get_slice("model.embed_tokens.weight")
        assert embedding.get_shape() == [config["vocab_size"], config["hidden_size"]]
        assert embedding.get_dtype() == {"bfloat16": "BF16", "float32": "F32"}[config["dtype"]]
    assert "lm_head.weight" not in names
    assert {int(m[1]) for name in names if (m := re.match(r"model\.layers\.(\d+)\.", name))} == set(
        range(config["num_hidden_layers"])
    )


def test_the_demo_model_has_between_two_and_four_million_parameters():
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    size = {"bfloat16": 2, "float32": 4}[config["dtype"]]
    assert 2e6 <= (DEMO_MODEL / "model.safetensors").stat().st_size / size <= 4e6


@pytest.mark.parametrize("text", ["The for statement is used to", 'x = {"a": 1}\n\n    # é × 漢'])
def test_the_demo_tokenizer_gives_text_back(text):
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_demo_model_knows_where_to_stop():
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    generation = json.loads((DEMO_MODEL / "generation_config.json").read_text())
    settings = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.token_to_id(settings["eos_token"])
    assert "messages" in settings["chat_template"]


def test_importing_piecework_imports_no_torch():
    code = "import sys, piecework; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_no_tracked_file_names_the_machine_it_was_made_on():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name for name in listed.decode().split("\0") if name]
    assert files
    found = [
        str(file.relative_to(ROOT)) for file in files if file.is_file() and MACHINE_PATHS.search(file.read_bytes())
    ]
    assert found == []


def test_the_search_for_machine_paths_finds_them():
    assert MACHINE_PATHS.search(b'"/ro' + b'ot/model"')
    assert MACHINE_PATHS.search(b"cd /wo" + b"rk/x")
    assert not MACHINE_PATHS.search(b"see piecework/store, https://example.org/wo" + b"rk/x and ./wo" + b"rk")


def test_every_dependency_is_pinned(project, pins):
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    assert names - pins.keys() == set()
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    assert pins["torch"] == "2.13.0"


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in readme if line.startswith("python3 -m venv ")]
    assert [command.rsplit("/", 1)[1] for command in commands] == ["piecework demo", "pytest -q -n auto"]
    assert "grep -m1 -E '^python3 -m venv .*pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_version_is_said_in_one_place(project):
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)


@pytest.mark.parametrize("page", ["how-a-compile-flows.md", "how-a-request-flows.md", "serving.md"])
def test_the_docs_name_files_that_exist(page):
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / "docs" / page).read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "src" / "piecework" / name).exists()] == []


def test_dir_lists_the_public_names() -> None:
    assert dir(piecework) == sorted(piecework.__all__)
