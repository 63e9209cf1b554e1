"""`ModelSpec`: what its options become, on the command line, in facts and for another process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from piecework.errors import CompileError, OpError, UnsupportedModelError
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.spec.command_line import add_model, add_spec_options, spec_of
from piecework.spec.compile_options import BackendName, CompileOptions
from piecework.spec.model_spec import ModelSpec, spec_options
from tests.unit.models.tiny import write_config

# of each option: what Python gives, what the command line gives, the value, the fact
GIVEN: dict[str, tuple[Any, list[str], Any, Any]] = {
    "dtype": ("bfloat16", ["--dtype", "bfloat16"], "bfloat16", "bfloat16"),
    "max_tokens": (64, ["--max-tokens", "64"], 64, 64),
    "mla": ("opaque", ["--mla", "opaque"], "opaque", "opaque"),
    "kv_cache_dtype": ("fp8", ["--kv-cache-dtype", "fp8"], "fp8", "fp8"),
    "weights_dtype": ("int8", ["--weights-dtype", "int8"], "int8", "int8"),
    "weights_group": (64, ["--weights-group", "64"], 64, "64"),
    "device": ("cuda", ["--device", "cuda"], "cuda", "cuda"),
    "backend": (BackendName.EAGER, ["--backend", "eager"], BackendName.EAGER, "eager"),
    "providers": (
        ProviderOrder.parse(["aten,native", "rms_norm=native"]),
        ["--provider", "aten,native", "--provider", "rms_norm=native"],
        ProviderOrder(("aten", "native"), {"rms_norm": ("native",)}),
        "aten,native;rms_norm=native",
    ),
    "ranges": (((1, 1), (2, 64)), ["--ranges", "1,2:64"], ((1, 1), (2, 64)), "1:1,2:64"),
    "passes_off": (
        {"rotary", "no_ops"},
        ["--without-pass", "rotary", "--without-pass", "no_ops"],
        frozenset({"rotary", "no_ops"}),
        "no_ops,rotary",
    ),
    "pack_linear": (False, ["--pack-linear", "off"], False, "off"),
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_config(tmp_path / "model", "deepseek_v3")


def _parsed(model_dir: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model(parser)
    add_spec_options(parser)
    return parser.parse_args([str(model_dir), *arguments])


def test_every_option_is_tested() -> None:
    assert [d.name for d in spec_options()] == list(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_is_the_same_from_python_from_the_command_line_and_in_another_process(
    model_dir: Path, name: str
) -> None:
    python, arguments, value, fact = GIVEN[name]
    base = {"max_tokens": 64}
    spec = ModelSpec.of(model_dir, **{**base, name: python})
    assert value in (getattr(spec, name, None), getattr(spec.options, name, None))
    assert spec_of(_parsed(model_dir, "--max-tokens", "64", *arguments), weights=True) == spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert {f.name: f.value for f in spec.facts}[name] == fact
    other = ModelSpec.of(model_dir, max_tokens=32)
    assert spec.key != other.key
    assert (name in {f.name for f in spec.named.facts}) is (spec != ModelSpec.of(model_dir))


def test_defaults(model_dir: Path) -> None:
    spec = ModelSpec.of(model_dir)
    assert spec_of(_parsed(model_dir), weights=True) == spec == ModelSpec(spec.config)
    assert (spec.source, spec.dtype, spec.max_tokens, spec.options) == (model_dir, "float32", 2048, CompileOptions())
    assert spec.named.facts == ()
    assert spec.named.config == spec.asked.config == spec.config.raw
    assert ModelSpec.of(model_dir, dtype=None, providers=None) == spec


def test_without_latent_attention_its_options_are_no_facts(tmp_path: Path) -> None:
    llama = write_config(tmp_path, "llama")
    assert ModelSpec.of(llama, mla="opaque").facts == ModelSpec.of(llama).facts
    with pytest.raises(UnsupportedModelError, match="a model without latent attention"):
        ModelSpec.of(llama, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dtype": "int3"}, UnsupportedModelError, "one of float32, bfloat16, float16"),
        ({"mla": "hidden"}, UnsupportedModelError, "one of exposed, opaque"),
        ({"kv_cache_dtype": "int4"}, UnsupportedModelError, "one of auto, fp8"),
        ({"device": "tpu"}, CompileError, "one of cpu, cuda"),
        ({"max_tokens": 0}, CompileError, "0 is less than 1"),
        ({"ranges": "1,3:64"}, CompileError, "does not follow on 1:1"),
        ({"ranges": "1:64", "max_tokens": 32}, CompileError, "forward passes of up to 32 tokens"),
        ({"passes_off": ["rms_norms"]}, CompileError, "no pass of that name"),
        ({"providers": "rms_nrom=native"}, OpError, "rms_nrom"),
        ({"dtpye": "float32"}, CompileError, "did you mean dtype"),
    ],
)
def test_what_is_refused(model_dir: Path, options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ModelSpec.of(model_dir, **options)


@pytest.mark.parametrize("arguments", [["--max-tokens", "0"], ["--ranges", "3:1"], ["--dtype", "int3"]])
def test_wrong_usage_of_the_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parsed(*arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"source": 3'])
def test_no_spec(text: str) -> None:
    with pytest.raises(CompileError, match="no spec"):
        ModelSpec.from_json(text)


def test_config_json_is_read_once(model_dir: Path) -> None:
    spec = ModelSpec.of(model_dir)
    (model_dir / "config.json").unlink()
    assert spec.facts
    assert json.loads(spec.to_json())["source"] == str(model_dir)


def test_it_needs_no_torch(model_dir: Path) -> None:
    code = (
        "import sys, piecework; from piecework.spec.command_line import add_spec_options; "
        f"piecework.ModelSpec.of({str(model_dir)!r}).to_json(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
