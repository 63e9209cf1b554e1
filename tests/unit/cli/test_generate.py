"""`piecework generate`: from arguments to the engine and back, over a bundle that is written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from piecework.bundle.store.directory import DirectoryStore
from piecework.cli.main import main
from piecework.spec.model_spec import ModelSpec
from tests.unit.engine.next_letter import CONFIG, letter_content, write_letter_bundle, write_model_dir

RANDOM = ["--random-weights", "3"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model_dir(tmp_path))


@pytest.fixture
def bundle(model: str) -> str:
    return str(write_letter_bundle(Path(model)).path)


def test_text_streams_from_the_stores_bundle(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    spec = ModelSpec.of(model, ranges="1,2:8", max_tokens=8, passes_off=["rotary"])
    DirectoryStore(tmp_path / "home").put_bundle(spec.key, content=letter_content(spec))
    options = ["--ranges", "1,2:8", "--max-tokens", "8", "--without-pass", "rotary"]
    code = main(["generate", model, "--prompt", "abc", "--max-new-tokens", "4", *options, *RANDOM])
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err) == (0, "defg\n", "")


def test_json_has_text_tokens_and_timings(model: str, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "wx", "--bundle", bundle, "--json", *RANDOM]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["tokens"], found["finish_reason"]) == ("yz", [24, 25, 26], "stop")
    assert (found["bundle"], found["prompt_tokens"]) == (bundle, 2)
    phases = found["load_phases_ms"]
    assert found["load_ms"] == pytest.approx(sum(phases[name] for name in ("verify", "plan", "open", "bind")), abs=0.01)
    assert (found["weights_ms"], found["pack_ms"]) == (phases["weights"], phases["pack"])
    assert phases["verify"] > 0
    assert found["first_token_s"] > 0
    assert found["tokens_per_s"] > 0


def test_the_models_own_weights_are_used(model: str, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", model, "--prompt", "a", "--max-new-tokens", "1", "--bundle", bundle]
    save_file({"b.weight": torch.zeros(2, 3)}, Path(model) / "model.safetensors")
    assert main(arguments) == 1
    assert "a.weight" in capsys.readouterr().err
    save_file({"a.weight": torch.zeros(2, 3)}, Path(model) / "model.safetensors")
    assert main(arguments) == 0
    assert capsys.readouterr().out == "b\n"


def test_chat_uses_the_template(model: str, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(model) / "chat_template.jinja").write_text("{{ messages[0].content }}{{ 'k' }}")
    assert (
        main(["generate", model, "--prompt", "a", "--chat", "--max-new-tokens", "2", "--bundle", bundle, *RANDOM]) == 0
    )
    assert capsys.readouterr().out == "lm\n"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--prompt", ""], "prompt without tokens"),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_tokens 0"),
        (["--prompt", "a", "--chat"], "chat_template"),
    ],
)
def test_impossible_requests_end_with_code_1(
    model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], found: str
) -> None:
    assert main(["generate", model, *arguments, *RANDOM]) == 1
    printed = capsys.readouterr()
    assert found in printed.err
    assert not printed.out


def test_without_weights_it_ends_with_code_1(model: str, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "a", "--bundle", bundle]) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_a_bundle_of_another_model_is_refused(model: str, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(model) / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 16}))
    assert main(["generate", model, "--prompt", "a", "--bundle", bundle, *RANDOM]) == 1
    assert "StaleBundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "differs"),
    [(["--provider", "aten,native"], "providers"), (["--dtype", "bfloat16"], "dtype"), (["--mla", "opaque"], "")],
)
def test_a_given_bundle_must_have_the_options_that_are_asked_for(
    model: str, bundle: str, capsys: pytest.CaptureFixture[str], arguments: list[str], differs: str
) -> None:
    code = main(["generate", model, "--prompt", "wx", "--bundle", bundle, *arguments, *RANDOM])
    assert code == (1 if differs else 0), "latent attention's options count for no other model"
    assert (f"option {differs}: " in capsys.readouterr().err) is bool(differs)


def test_a_rule_for_an_unknown_op_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "wx", "--provider", "rms_nrom=native"]) != 0
    assert "rms_nrom" in capsys.readouterr().err
