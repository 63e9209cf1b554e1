"""`piecework generate`: from arguments to the engine and back, with a made-up model in place of a loaded bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import piecework.bundle.bundle
import piecework.bundle.run
import piecework.engine.bundles
from piecework.bundle.facts import config_fact
from piecework.bundle.plan import Plan, Recipe
from piecework.bundle.record import Record
from piecework.cli.main import main
from piecework.engine.bundles import FoundBundle
from piecework.models.checkpoint import RandomCheckpoint, SafetensorsCheckpoint
from piecework.spec.model_spec import ModelSpec

VOCAB = 60


class AlphabetModel:
    """Continues every letter with the next one."""

    plan = SimpleNamespace(sizes={"tokens": (1, 8), "seqs": (1, 4)})
    record = Record(phases={"plan": 0.125, "weights": 1.0, "pack": 0.25, "open": 0.25, "bind": 0.5})

    def make_states(self, sizes: Mapping[str, int]) -> None:
        assert sizes["blocks"] >= 1

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        tokens, wanted = inputs["input_ids"], inputs["logits_indices"]
        assert isinstance(tokens, Tensor)
        assert len(tokens) <= 8
        return [torch.nn.functional.one_hot(tokens[wanted] + 1, VOCAB).float()]


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the made-up model behind `load` and `find_or_compile`; return what those were called with."""
    alphabet = {chr(ord("a") + i): i for i in range(26)} | {"</s>": 26}
    tokenizer = HuggingFaceTokenizer(models.WordLevel(alphabet, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "eos_token_id": 26,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    calls: dict[str, Any] = {"model": str(tmp_path)}

    def find_or_compile(wanted: ModelSpec, **_: Any) -> FoundBundle:
        calls["find"] = (wanted.source, wanted.dtype, wanted.max_tokens, wanted.options.device)
        return FoundBundle(open_bundle(tmp_path / "stored"), compiled=False, verify_s=0.125)

    def open_bundle(path: Path, **_: Any) -> Any:
        return SimpleNamespace(path=path, plan=dict, facts=(config_fact(calls.get("compiled for", config)),))

    def load(bundle: Any, *, weights: object, check_facts: bool) -> AlphabetModel:
        assert not check_facts  # they were checked when the bundle was found
        calls["load"] = (bundle.path, weights)
        return AlphabetModel()

    recipes = (Recipe("a.weight", (2, 3), "bfloat16"), Recipe("inv_freq", (4,), "float32", literal=True))
    monkeypatch.setattr(piecework.engine.bundles, "find_or_compile", find_or_compile)
    monkeypatch.setattr(piecework.bundle.bundle, "open_bundle", open_bundle)
    monkeypatch.setattr(piecework.bundle.run, "load", load)
    monkeypatch.setattr(Plan, "from_json", staticmethod(lambda data: SimpleNamespace(recipes=recipes)))
    return calls


def test_text_streams_from_the_stores_bundle(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", seen["model"], "--prompt", "abc", "--max-new-tokens", "4", "--random-weights", "3"])
    assert (code, capsys.readouterr().out) == (0, "defg\n")
    assert seen["find"] == (Path(seen["model"]), "float32", 2048, "cpu")
    path, weights = seen["load"]
    assert path == Path(seen["model"]) / "stored"
    assert isinstance(weights, RandomCheckpoint)
    assert weights.names() == ["a.weight"]


def test_json_has_text_tokens_and_timings(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "wx", "--random-weights", "3", "--bundle", "given.pwb", "--json"]
    assert main(["generate", seen["model"], *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "find" not in seen
    assert (found["text"], found["tokens"], found["finish_reason"]) == ("yz", [24, 25, 26], "stop")
    assert (found["bundle"], found["prompt_tokens"], found["pack_ms"]) == ("given.pwb", 2, 250.0)
    phases = found["load_phases_ms"]
    assert (phases["open"], phases["bind"]) == (250.0, 500.0)
    assert found["load_ms"] == pytest.approx(875.0 + phases["verify"])
    assert found["first_token_s"] > 0
    assert found["tokens_per_s"] > 0


def test_the_models_own_weights_are_used(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(2, 3)}, Path(seen["model"]) / "model.safetensors")
    assert main(["generate", seen["model"], "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert isinstance(seen["load"][1], SafetensorsCheckpoint)


def test_chat_uses_the_template(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (Path(seen["model"]) / "chat_template.jinja").write_text("{{ messages[0].content }}{{ 'k' }}")
    arguments = ["--prompt", "a", "--chat", "--max-new-tokens", "2", "--random-weights", "0"]
    assert main(["generate", seen["model"], *arguments]) == 0
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
    seen: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: list[str], found: str
) -> None:
    assert main(["generate", seen["model"], *arguments, "--random-weights", "0"]) == 1
    printed = capsys.readouterr()
    assert found in printed.err
    assert not printed.out


def test_without_weights_it_ends_with_code_1(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", seen["model"], "--prompt", "a"]) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_a_bundle_of_another_model_is_refused(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    seen["compiled for"] = {"model_type": "llama", "hidden_size": 16}
    assert main(["generate", seen["model"], "--prompt", "a", "--random-weights", "3", "--bundle", "other.pwb"]) == 1
    assert "StaleBundle" in capsys.readouterr().err


def test_a_given_bundle_must_have_the_providers_that_are_asked_for(
    seen: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "wx", "--random-weights", "3", "--bundle", "given.pwb", "--provider", "aten,native"]
    assert main(["generate", seen["model"], *arguments]) != 0
    assert "option providers" in capsys.readouterr().err


def test_a_rule_for_an_unknown_op_is_refused(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", seen["model"], "--prompt", "wx", "--provider", "rms_nrom=native"]) != 0
    assert "rms_nrom" in capsys.readouterr().err
    assert "find" not in seen
