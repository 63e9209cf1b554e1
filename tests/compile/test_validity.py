"""A stored bundle is used where a compile would make the same, and nowhere else: each field of a model's directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from piecework.bundle.bundle import Bundle
from piecework.bundle.facts import Fact, check
from piecework.bundle.store.interface import MemoryStore
from piecework.compiler.deduplicate import Forward
from piecework.compiler.model import compile_model
from piecework.errors import PieceworkError
from piecework.foundation.environment import Environment
from piecework.spec.model_spec import ModelSpec
from piecework.spec.passes import PASS_NAMES
from tests.compile.perturbed import Change, changes, forwards, what_runs
from tests.unit.models import tiny
from tests.unit.models.encoders import DENSE, ENCODERS, NORMALIZE, write_encoder, write_plain

QUICK = ("llama",)
"""Those that run with the long tests; the others have a marker of their own."""

FAMILIES = (*tiny.FAMILIES, *tiny.MORE_FAMILIES, *tiny.HYBRID_FAMILIES, *tiny.LATENT_FAMILIES)
TWO_KINDS = {"gemma2", "gemma3_text", "qwen2_moe", "gpt_oss", "llama4_text", *tiny.HYBRID_FAMILIES} - {
    *("falcon_h1", "mamba2", "mamba", "falcon_mamba"),
}
SCORES = {"bert": "BertForSequenceClassification", "modernbert": "ModernBertForSequenceClassification"}

READ_ALL_THE_SAME = {
    **dict.fromkeys(("use_sliding_window", "sliding_window", "max_window_layers"), "which make a window together"),
    "tie_word_embeddings": "which transformers asks for in models without a head",
    "max_position_embeddings": "which a rotary embedding keeps",
    "global_attn_every_n_layers": "of which two numbers make the same of few layers",
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), "which all models are asked for"),
    **dict.fromkeys(("output_router_logits", "router_jitter_noise"), "which is looked at, and then is of training"),
    "mlp_only_layers": "whose order and repetitions mean nothing",
    "deterministic_flash_attn": "which is handed to attention of another kind",
    **dict.fromkeys(("n_embd", "n_head", "n_heads", "n_layer", "n_layers", "n_ctx"), "of which the other name decides"),
    **dict.fromkeys(("layerdrop", "z_loss_coefficient"), "of training"),
    **dict.fromkeys(("linear_a_log_min", "linear_a_log_max"), "by which weights begin"),
    **dict.fromkeys(("linear_dt_min", "linear_dt_max", "linear_dt_init_floor"), "by which weights begin"),
    **dict.fromkeys(("pretraining_tp", "slow_but_exact"), "by which Bloom adds in another order where both are set"),
    **dict.fromkeys(("multi_query", "num_ln_in_parallel_attn"), "of which Falcon's newer architecture decides"),
    "rope_parameters": "which Falcon has no use for with alibi",
    "no_rope_layer_interval": "of which a list of layers decides",
    "attn_layer_indices": "whose repetitions mean nothing",
    "mamba_chunk_size": "which our scan chooses for itself",
}
"""Fields that code reads without effect on some models' graphs: a change of them is a miss, as of all that was read."""


@dataclass
class Seen:
    """What became of changes: of which a start would use the stored bundle, and which of these were mistakes."""

    hits: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class First:
    """A bundle's key and facts, and what it runs."""

    key: str
    facts: tuple[Fact, ...]
    paths: list[Forward]


def spec_of(model_dir: Path) -> ModelSpec:
    return ModelSpec.of(model_dir, dtype="float32", backend="eager")


def compiled(spec: ModelSpec, home: Path) -> Bundle:
    home.mkdir()
    environment = Environment(store_root=home)
    return compile_model(spec, store=MemoryStore(home), environment=environment, check_weights=False).bundle


def perturb(model_dir: Path, home: Path, *, rare: bool) -> Seen:
    """Compile a directory's model, change each field of its files in turn, and compare what would run."""
    seen, spec = Seen(), spec_of(model_dir)
    first = First(spec.key, compiled(spec, home).facts, forwards(spec))
    for change in changes(model_dir, rare=rare):
        path = model_dir / change.file
        as_it_was = path.read_text()
        path.write_text(json.dumps(change.content))
        try:
            _compare(seen, change, model_dir, first=first)
        finally:
            path.write_text(as_it_was)
    return seen


def _compare(seen: Seen, change: Change, model_dir: Path, *, first: First) -> None:
    """Note what a change means for the stored bundle, and what is to be held against that."""
    try:
        spec = spec_of(model_dir)
    except PieceworkError:
        seen.refused.append(str(change))  # before anything is looked up
        return
    differing = check(first.facts, asked=spec.asked)
    hit = not differing and spec.key == first.key
    try:
        paths = forwards(spec)
    except PieceworkError as error:
        seen.refused.append(str(change))
        # what a forward doesn't need may be of a type that transformers refuses before it makes a model
        same = hit and "can't read its config.json" in error.found
    else:
        same = what_runs(paths) == what_runs(first.paths)
        if hit and not same:
            same = what_runs(paths, passes=PASS_NAMES) == what_runs(first.paths, passes=PASS_NAMES)
        (seen.hits if hit else seen.misses).append(str(change))
    if hit and not same:
        seen.wrong.append(str(change))
    if same and not hit and change.name not in READ_ALL_THE_SAME:
        seen.needless.append(f"{change}: {'; '.join(map(str, differing))}")
    names = {change.name} if change.file == "config.json" else {"encoder", "max_tokens", "text tokens"}
    if not hit and names.isdisjoint(difference.fact.name for difference in differing):
        seen.unnamed.append(str(change))


def write_family(directory: Path, family: str) -> Path:
    """Write a language model's directory, with as few layers as have all of its kinds."""
    config = tiny.config_dict(family)
    layers = 3 if family == "nemotron_h" else 2 if family in TWO_KINDS else 1
    listed = {name: config[name][:layers] for name in ("layer_types", "layers_block_type", "no_rope_layers")
              if name in config}  # fmt: skip
    dense = {"first_k_dense_replace": 0} if "first_k_dense_replace" in config else {}
    tiny.write_config(directory, family, num_hidden_layers=layers, **listed, **dense)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.5}))
    return directory


def write_texts(directory: Path, family: str) -> Path:
    """Write an encoder's directory with all files that it may have."""
    layers = {"n_layers" if family == "distilbert" else "num_hidden_layers": 2 if family == "modernbert" else 1}
    write_encoder(directory, family, rest=[DENSE, NORMALIZE], **layers)
    config = json.loads((directory / "config.json").read_text())
    twice = {name for name, other in CONFIG_MAPPING[config["model_type"]].attribute_map.items() if other in config}
    kept = {name: value for name, value in config.items() if name not in twice}
    (directory / "config.json").write_text(json.dumps(kept))
    prompts = {"prompts": {"query": "q: "}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return directory


def few_but(names: Any) -> list[Any]:
    """Mark all as exhaustive, and a few as slow besides, which are part of CI."""
    marks = [pytest.mark.exhaustive, pytest.mark.slow]
    return [pytest.param(n, marks=marks[: 1 + (n in QUICK)]) for n in names]


@pytest.mark.parametrize("family", few_but(FAMILIES))
def test_a_changed_field_is_a_miss_exactly_where_the_bundle_would_differ(family: str, tmp_path: Path) -> None:
    seen = perturb(write_family(tmp_path / "model", family), tmp_path / "home", rare=family in {"llama", "mixtral"})
    assert (seen.wrong, seen.needless, seen.unnamed) == ([], [], [])
    assert len(seen.hits) > 3
    assert len(seen.misses) > 5


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ENCODERS)
def test_a_changed_field_of_an_encoder(family: str, tmp_path: Path) -> None:
    seen = perturb(write_texts(tmp_path / "model", family), tmp_path / "home", rare=family == "bert")
    assert (seen.wrong, seen.needless, seen.unnamed) == ([], [], [])


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", SCORES)
def test_a_changed_field_of_a_cross_encoder(family: str, tmp_path: Path) -> None:
    labels = {"architectures": [SCORES[family]], "id2label": {"0": "LABEL_0"}, "num_hidden_layers": 1}
    seen = perturb(write_plain(tmp_path / "model", family, **labels), tmp_path / "home", rare=False)
    assert (seen.wrong, seen.needless, seen.unnamed) == ([], [], [])
