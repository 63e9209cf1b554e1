"""Which fields of config.json and which files are facts of a model's bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle.facts import ABSENT, Fact, check
from piecework.models.adapter import build_causal_lm
from piecework.models.reads import model_reads
from piecework.spec.config import read_config
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import config_dict, write_config


def facts_of(model_dir: Path) -> dict[str, Fact]:
    """Return the facts of building a model; those of tracing it would come on top."""
    with model_reads(read_config(model_dir)) as reads:
        with reads.building():
            build_causal_lm(ModelSpec.of(model_dir))
        return {fact.name: fact for fact in reads.facts()}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fact]:
    return facts_of(write_config(tmp_path_factory.mktemp("llama"), "llama"))


def test_a_field_that_is_left_to_its_default_is_a_fact_and_so_is_the_file_with_the_default(
    facts: dict[str, Fact],
) -> None:
    assert facts["rms_norm_eps"].value == ABSENT
    source = facts["transformers/models/llama/configuration_llama.py"]
    assert check([source]) == ()
    [difference] = check([Fact(source.kind, source.name, "0" * 64)])
    assert "configuration_llama.py" in str(difference)


@pytest.mark.parametrize("field", ["rope_theta", "rope_scaling"])
def test_what_config_json_may_get_is_a_fact(facts: dict[str, Fact], field: str) -> None:
    """Modelling code reads `rope_parameters`, which is made of these where config.json has them."""
    assert facts[field].value == ABSENT


def test_of_two_forms_of_one_thing_only_what_decides_is_a_fact(tmp_path: Path) -> None:
    """transformers lets `rope_scaling` replace `rope_parameters`, and `rope_theta` only fill in what that lacks."""
    facts = facts_of(write_config(tmp_path, "llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    assert facts["rope_scaling"].value == ABSENT
    assert "rope_parameters" in facts
    assert "rope_theta" not in facts


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_what_modelling_code_reads_is_a_fact(facts: dict[str, Fact], field: str) -> None:
    assert facts[field].kind == "config"


@pytest.mark.parametrize("field", ["initializer_range", "eos_token_id", "transformers_version", "_name_or_path"])
def test_what_nobody_reads_for_the_graph_is_none(facts: dict[str, Fact], field: str) -> None:
    assert field not in facts


@pytest.mark.parametrize(
    ("family", "config", "fields"),
    [
        # every second layer attends: a third one would have to be there for another period to make a difference
        ("jamba", {"attn_layer_period": 2}, {"attn_layer_period", "attn_layer_offset"}),
        # a window from a layer on that isn't there; which fields make one, only several together show
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 28}, {"use_sliding_window", "max_window_layers"}),
        ("qwen2", {"use_sliding_window": False, "max_window_layers": 28}, {"use_sliding_window"}),
        # names that transformers writes to no config.json, and takes from there
        ("mixtral", {}, {"experts_implementation"}),
        ("mixtral", {"_experts_implementation": "batched_mm"}, {"_experts_implementation"}),
    ],
)
def test_a_field_that_its_config_reads_is_a_fact(
    tmp_path: Path, family: str, config: dict[str, Any], fields: set[str]
) -> None:
    assert fields <= facts_of(write_config(tmp_path, family, **config)).keys()


def test_a_config_inside_another_is_a_fact(tmp_path: Path) -> None:
    text = config_dict("llama4_text", num_hidden_layers=1, no_rope_layers=[1])
    outer = {"architectures": text.pop("architectures"), "vocab_size": text["vocab_size"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", **outer}))
    assert "text_config" in facts_of(tmp_path)
