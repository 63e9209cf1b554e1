"""A stored bundle is used where a compile would make the same, and nowhere else: each field of config.json in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle.bundle import Bundle
from piecework.bundle.facts import check
from piecework.bundle.store.interface import MemoryStore
from piecework.compiler.model import compile_model
from piecework.errors import PieceworkError
from piecework.foundation.environment import Environment
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import write_config

ABSENT = {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.5, "unknown_field": 3, "initializer_range": 0.5}
ABSENT |= {"_name_or_path": "elsewhere", "transformers_version": "1.2.3", "use_cache": False, "hidden_act": "gelu"}
ABSENT |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0}
ABSENT |= {"pad_token_id": 3, "eos_token_id": 5, "bos_token_id": 4, "pretraining_tp": 2, "attention_dropout": 0.5}


def compiled(spec: ModelSpec, home: Path) -> Bundle:
    """Return the bundle that a compile makes of a spec, whatever was compiled before."""
    home.mkdir()
    return compile_model(
        spec, store=MemoryStore(home), environment=Environment(store_root=home), check_weights=False
    ).bundle


def spec_of(model_dir: Path) -> ModelSpec:
    return ModelSpec.of(model_dir, dtype="float32", max_tokens=32, backend="eager")


def what_runs(bundle: Bundle) -> Any:
    """Return all of a bundle that runs: its plan, which names artifacts by their content, and its constants."""
    return bundle.plan(), bundle.constants()


def others(value: Any) -> list[Any]:
    """Return values that a field of config.json might have instead."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value * 2 or 1]
        case float():
            return [value * 2]
        case str():
            return [f"{value}_"]
        case list():
            return [[*value, *value]]
        case dict():
            name, inner = next(iter(value.items()))
            return [{**value, name: other} for other in others(inner)]
    return [1, True]


@pytest.mark.slow  # some forty captures each
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_changed_field_is_a_miss_exactly_where_the_bundle_would_differ(family: str, tmp_path: Path) -> None:
    few = {"num_hidden_layers": 1} | ({"first_k_dense_replace": 0} if family == "deepseek_v3" else {})
    model_dir = write_config(tmp_path / "model", family, **few)
    config = json.loads((model_dir / "config.json").read_text())
    first = spec_of(model_dir)
    made = compiled(first, tmp_path / "first")
    changes = [(name, other) for name, value in config.items() for other in others(value)]
    changes += [(name, value) for name, value in ABSENT.items() if name not in config]
    hits, misses, wrong, needless, unnamed = [], [], [], [], []
    for number, (name, value) in enumerate(changes):
        (model_dir / "config.json").write_text(json.dumps({**config, name: value}))
        try:
            spec = spec_of(model_dir)
            other = compiled(spec, tmp_path / str(number))
        except PieceworkError:
            continue  # no model that can be compiled
        differing = check(made.facts, asked=spec.asked)
        hit = not differing and spec.key == first.key
        (hits if hit else misses).append(name)
        same = what_runs(other) == what_runs(made)
        if hit and not same:
            wrong.append((name, value))
        if same and not hit:
            needless.append((name, value))
        if not hit and name not in {difference.fact.name for difference in differing}:
            unnamed.append((name, value))
    assert (wrong, needless, unnamed) == ([], [], [])
    assert {"unknown_field", "initializer_range", "_name_or_path", "transformers_version", "eos_token_id"} <= set(hits)
    assert {"hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps"} <= set(misses)
