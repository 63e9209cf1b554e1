"""`piecework explain`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from piecework.cli.main import main
from tests.unit.models.tiny import write_config
from tests.unit.report.layered import compiled, model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    return str(compiled(model({3: {"act": nn.functional.gelu}}), tmp_path / "b").path)


def test_a_bundle(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["explain", bundle]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[:4] == [
        f"explained      {bundle}",
        "from           the bundle",
        "pieces         7, of which 4 unique",
        "names lifted   6 of 6, at no cost",
    ]
    assert "  layers 0-2, 4 share 1 piece: B" in lines
    assert "  layer 3 differs from layer 2 in its piece: C, not B" in lines
    assert any("call 4: aten.gelu against aten.silu at tests/unit/report/layered.py:" in line for line in lines)


def test_two_layers(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", bundle, "--layers", "2,3"]) == 0
    text = capsys.readouterr().out
    assert "layers 2 and 3 of layers" in text
    assert "argument 2 (name): 'layers.2.mix' against 'layers.3.mix', at no cost" in text


def test_json(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", bundle, "--layers", "2,3", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["pairs"][0]["layers"] == [2, 3]
    assert [piece["pieces"] for piece in value["pairs"][0]["pieces"]] == [["B", "B"], ["B", "C"]]


def test_layers_out_of_range(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", bundle, "--layers", "2,6", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["error"] == "PieceworkError"
    assert value["found"] == "layers with the layers 0-5"


@pytest.mark.parametrize("layers", ["3", "3,3", "a,b", "1,2,3", "-1,2", ""])
def test_no_pair(layers: str, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", bundle, f"--layers={layers}"])
    assert caught.value.code == 2
    assert "is not two different layers' numbers, such as 3,7" in capsys.readouterr().err


def test_targets_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(tmp_path / "none"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "BundleError"
    assert main(["explain", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "UnsupportedModelError"


def test_a_bundle_needs_neither_torch_nor_a_compiler(bundle: str) -> None:
    code = (
        "import sys\n"
        "from piecework.cli.main import main\n"
        f"assert main(['explain', {bundle!r}]) == 0\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'transformers', 'sympy', 'numpy'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(write_config(tmp_path / "model", "llama"))
    assert main(["explain", directory, "--backend", "eager"]) == 0
    text = capsys.readouterr().out
    assert "from           a capture: nothing was compiled" in text
    assert "note           the store has no bundle of it with these options" in text
    assert "  layers 0-1 share 1 piece: B" in text
    assert "C also has model.norm.weight, lm_head.weight, of no layer" in text
    assert "piecework::attention at transformers/models/llama/modeling_llama.py:" in text
    assert not (tmp_path / "home" / "bundles").exists()

    assert main(["compile", directory, "--backend", "eager", "--weights", "none"]) == 0
    capsys.readouterr()
    assert main(["explain", directory, "--backend", "eager"]) == 0
    stored = capsys.readouterr().out
    assert "from           the bundle" in stored
    assert stored.partition("unique pieces")[2] == text.partition("unique pieces")[2]
