"""`piecework serve`: from arguments to options, and what is told before anything is loaded."""

from __future__ import annotations

import argparse
import builtins
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piecework.cli.main import main, make_parser
from piecework.cli.serve import _engine_options, _settings
from piecework.engine.options import WhileCompiling, parse_size
from piecework.engine.profile_options import ProfileOptions
from piecework.errors import RequestError
from piecework.foundation.environment import read_environment
from piecework.spec.command_line import spec_of
from piecework.spec.model_spec import ModelSpec
from piecework.spec.sampling_defaults import SamplingDefaults
from tests.unit.models.tiny import write_config


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny-llama", "llama")


def _parse(*arguments: str) -> argparse.Namespace:
    return make_parser(["serve"]).parse_args(["serve", *arguments])


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500MB", 500_000_000), ("4GiB", 4 << 30), ("4G", 4 << 30), ("1.5 kB", 1500), ("2k", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "4GG", "much", "4 XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"no size|no byte"):
        parse_size(text)


def test_defaults(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIECEWORK_API_KEY", raising=False)
    args = _parse(str(model_dir))
    options, settings = _engine_options(args), _settings(args, read_environment(), model_dir)
    assert (args.host, args.port) == ("127.0.0.1", 8000)
    assert spec_of(args, weights=True) == ModelSpec.of(model_dir)
    assert options.max_seqs is None
    assert options.while_compiling is WhileCompiling.WAIT
    assert (options.kv_cache_memory, options.memory_fraction, options.prefix_caching) == (None, None, True)
    assert (settings.model_names, settings.api_key, settings.seed) == (("tiny-llama",), None, None)
    assert settings.defaults == SamplingDefaults()
    assert settings.limits.concurrent_requests == 512


def test_options_arrive(model_dir: Path) -> None:
    args = _parse(
        str(model_dir), "--served-model-name", "a", "--served-model-name", "b", "--api-key", "k", "--dtype", "bfloat16",
        "--max-tokens", "64", "--max-seqs", "3", "--kv-memory", "1MiB", "--no-prefix-caching", "--while-compiling",
        "eager", "--max-requests", "7", "--max-body", "1kB", "--max-prompt-tokens", "5", "--max-n", "2",
        "--max-prompts", "4", "--max-logprobs", "6", "--retry-after", "9", "--drain", "0.5", "--default-temperature",
        "0", "--random-weights", "11",
    )  # fmt: skip
    options, settings = _engine_options(args), _settings(args, read_environment(), model_dir)
    assert spec_of(args, weights=True) == ModelSpec.of(model_dir, dtype="bfloat16", max_tokens=64)
    assert (options.max_seqs, options.kv_cache_memory) == (3, 1 << 20)
    assert (options.prefix_caching, options.while_compiling) == (False, WhileCompiling.EAGER)
    assert options.random_weights == 11
    assert (settings.model_names, settings.api_key, settings.defaults.temperature) == (("a", "b"), "k", 0.0)
    limits = settings.limits
    assert (limits.concurrent_requests, limits.body_bytes, limits.prompt_tokens, limits.n) == (7, 1000, 5, 2)
    assert (limits.prompts, limits.logprobs, limits.retry_after_s, limits.drain_s) == (4, 6, 9, 0.5)


def test_sampling_defaults_are_those_of_the_model(model_dir: Path, tmp_path: Path) -> None:
    said = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 99, "do_sample": True, "eos_token_id": 3}
    (model_dir / "generation_config.json").write_text(json.dumps(said))
    of_model = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, max_tokens=99)
    for more, expected in (
        ((), of_model),
        (("--default-temperature", "0"), replace(of_model, temperature=0.0)),
        (("--generation-config", "vllm"), SamplingDefaults()),
        (("--generation-config", str(tmp_path / "other")), SamplingDefaults()),
    ):
        args = _parse(str(model_dir), *more)
        assert _settings(args, read_environment(), model_dir).defaults == expected
    (model_dir / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(RequestError, match="top_p 7"):
        _settings(_parse(str(model_dir)), read_environment(), model_dir)


def test_flags_of_vllm(model_dir: Path) -> None:
    args = _parse(
        "--model", str(model_dir), "--max-num-seqs", "3", "--max-num-batched-tokens=64", "--dtype", "half",
        "--max-model-len", "32", "--no-enable-prefix-caching", "--enable-auto-tool-choice", "--seed", "5",
        "--tensor-parallel-size", "1", "--chat-template", "there.jinja",
    )  # fmt: skip
    options = _engine_options(args)
    assert spec_of(args, weights=True) == ModelSpec.of(model_dir, dtype="float16", max_tokens=64)
    assert (options.max_seqs, options.max_model_len, options.prefix_caching) == (3, 32, False)
    assert options.chat_template == Path("there.jinja")
    assert _settings(args, read_environment(), model_dir).seed == 5
    assert spec_of(_parse(f"--model={model_dir}", "--dtype", "auto"), weights=True) == ModelSpec.of(model_dir)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu-memory-utilization", "0.9"], "--memory-fraction"),
        (["--tensor-parallel-size", "2"], "one process"),
        (["--trust-remote-code"], "no code"),
        (["--max-model-length", "5"], "is --max-model-len meant?"),
        (["--prot", "80"], "is --port meant?"),
    ],
)
def test_flags_that_mean_nothing_here_say_what_does(
    model_dir: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(model_dir), *options])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_profiling(model_dir: Path) -> None:
    assert _engine_options(_parse(str(model_dir))).profile is None
    options = _engine_options(_parse(str(model_dir), "--profile", "there", "--profile-steps", "5"))
    assert options.profile == ProfileOptions(Path("there"), steps=5)
    with pytest.raises(SystemExit):
        _parse(str(model_dir), "--profile", "there", "--profile-steps", "0")


def test_the_key_may_come_from_the_environment(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_API_KEY", "from-there")
    assert _settings(_parse(str(model_dir)), read_environment(), model_dir).api_key == "from-there"
    assert (
        _settings(_parse(str(model_dir), "--api-key", "from-here"), read_environment(), model_dir).api_key
        == "from-here"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--max-seqs", "0"],
        ["--memory-fraction", "1.5"],
        ["--kv-memory", "some"],
        ["--kv-memory", "1G", "--memory-fraction", "0.5"],
        ["--while-compiling", "sleep"],
    ],
)
def test_wrong_usage(model_dir: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(model_dir), *options])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--api-key", ""], "an empty API key"),
        (["--served-model-name", ""], "a model without a name"),
        (["--drain", "-1"], "the limit drain_s -1.0"),
    ],
)
def test_wrong_values(model_dir: Path, options: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(model_dir), *options]) == 1
    assert found in capsys.readouterr().err


def test_a_model_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nothing")]) == 1
    assert "no directory" in capsys.readouterr().err


def test_a_port_that_is_taken(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(model_dir), "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"listen on 127.0.0.1, port {port}" in error
    assert "in use" in error


def test_an_installation_without_the_extra(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "piecework.server.app":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return original(name, *args, **kwargs)

    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", str(model_dir), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert "no package fastapi" in error
    assert "pip install 'piecework[serve]'" in error
