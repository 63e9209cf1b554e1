"""Model directories in which one field of one JSON file is another, for each field that can be written there."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from piecework.bundle.plan import ShapeRange
from piecework.compiler.deduplicate import Forward, deduplicate
from piecework.compiler.driver import capture_variants
from piecework.compiler.planning import make_plan
from piecework.compiler.split import split
from piecework.models.adapter import build_request
from piecework.spec.model_spec import ModelSpec

ANYWHERE: dict[str, Any] = {"unknown_field": 3, "_name_or_path": "elsewhere", "transformers_version": "1.2.3"}
"""Fields that any config.json may have, and that are none of a family's."""

RARE: dict[str, Any] = {
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "_attn_implementation": "eager",
    "attn_implementation": "eager",
    "_experts_implementation": "batched_mm",
    "experts_implementation": "eager",
    "auto_map": {"AutoModel": "a.B"},
    "quantization_config": {"quant_method": "fp8"},
    "compression_config": {"format": "dense"},
    "per_layer_config": {"0": {"intermediate_size": 32}},
    "chunk_size_feed_forward": 2,
    "is_decoder": True,
    "gradient_checkpointing": True,
    "is_encoder_decoder": True,
    "num_labels": 3,
    "tie_word_embeddings": True,
    "torchscript": True,
    "head_dim": 8,
    "pruned_heads": {"0": [1]},
    "bos_token_id": 4,
    "eos_token_id": 5,
    "initializer_range": 0.5,
    "use_cache": False,
    "pretraining_tp": 2,
    "attention_dropout": 0.5,
    "base_model_tp_plan": {"layers.*": "colwise"},
    "id2label": {"0": "a"},
}
"""Fields of every config, or of code that is common to families: tried with some of them."""

_ACTIVATIONS = ("gelu", "silu")
_TEXTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation", "mamba_hidden_act", "mlp_hidden_act"), _ACTIVATIONS),
    **dict.fromkeys(("activation", "activation_function"), ("gelu", "Identity")),
    "pooling_mode": ("cls", "max"),
    "classifier_pooling": ("cls", "mean"),
    "rope_type": ("linear", "dynamic"),
    "topk_method": ("greedy", "group_limited_greedy"),
    "default_prompt_name": ("query",),
}
"""Texts of which a field has one."""


@dataclass(frozen=True)
class Change:
    """Another value of one field: the file, the keys that lead to it, and what the whole file holds then."""

    file: str
    keys: tuple[str | int, ...]
    content: Any

    @property
    def name(self) -> str:
        """The field of the file that the change is in."""
        return str(self.keys[0])

    def __str__(self) -> str:
        at = self.content
        for key in self.keys:
            at = at[key]
        return f"{self.file} {'.'.join(map(str, self.keys))}={at!r}"


def changes(model_dir: Path, *, rare: bool) -> Iterator[Change]:
    """Yield all changes of a directory's JSON files, with those of fields that config.json may have and hasn't."""
    for path in sorted(model_dir.rglob("*.json")):
        file, content = str(path.relative_to(model_dir)), json.loads(path.read_text())
        if file != "tokenizer.json":
            yield from (Change(file, keys, _with(content, keys, other)) for keys, other in _inside(content))
        if file == "config.json":
            absent = {**_defaults(content), **ANYWHERE, **(RARE if rare else {})}
            for name, other in absent.items():
                if name not in content:
                    yield Change(file, (name,), {**content, name: other})


def forwards(spec: ModelSpec) -> list[Forward]:
    """Return what a model is before code is generated from it."""
    return [Forward(made, split(made), variant) for made, variant in capture_variants(build_request(spec))]


def what_runs(paths: list[Forward], *, passes: Collection[str] = ()) -> Any:
    """Return the plan, in which pieces are named by their programs, and constants.

    Providers and backends see programs and options only; so where these are the same, bundles are. Where programs
    differ as they were captured, they may be the same after passes.
    """
    pieces = deduplicate(paths, passes=passes)
    ranges = [[ShapeRange(1, 1, unique.program.fingerprint())] for unique in pieces.unique]
    plan = make_plan(paths, pieces, artifacts=ranges).to_json()
    made = {**plan, "pieces": [piece["ranges"] for piece in plan["pieces"]]}
    literals = {name: tensor for path in paths for name, tensor in path.captured.literals.items()}
    return made, {name: (str(t.dtype), t.tolist()) for name, t in literals.items()}


def _defaults(content: Any) -> dict[str, Any]:
    """Return the family's own fields, each with another value than its default."""
    cls = CONFIG_MAPPING[content["model_type"]]
    base, general = cls(), {f.name for f in fields(PretrainedConfig)}
    own = [f.name for f in fields(cls) if f.name not in general]
    return {name: _others(getattr(base, name, None), name)[0] for name in own}


def _inside(content: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield all keys that lead to a value, and another value for each."""
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in inner:
        if (isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))) and value:
            yield from _inside(value, (*keys, key))
        else:
            yield from (((*keys, key), other) for other in _others(value, str(key)))


def _others(value: Any, name: str) -> list[Any]:
    """Return values that a field might have instead."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value * 2 or 1]
        case float():
            return [value * 2 or 0.5]
        case str():
            return [next((text for text in _TEXTS.get(name, ()) if text != value), f"{value}_")]
        case list() | tuple():
            return [[*value, *value], *([[*value[1:], value[0]]] if len(set(map(str, value))) > 1 else [])]
        case dict():
            linear = {"rope_type": "linear", "factor": 2.0}
            return [dict.fromkeys(value, linear) if "full_attention" in value else {**value, **linear}]
    return [0.5] if "dropout" in name else [1, True]


def _with(content: Any, keys: tuple[str | int, ...], other: Any) -> Any:
    key, *rest = keys
    inner = _with(content[key], tuple(rest), other) if rest else other
    if isinstance(content, dict):
        return {**content, key: inner}
    return [inner if number == key else value for number, value in enumerate(content)]
