"""Every family, operator by operator and as native code: logits and 64 greedy tokens are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piecework.bundle.run import load
from piecework.bundle.store.directory import DirectoryStore
from piecework.capture.capture import capture
from piecework.compiler.model import compile_model
from piecework.compiler.split import Piece, split
from piecework.engine.engine import EngineConfig, engine_for
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.foundation.environment import Environment
from piecework.models.adapter import build_causal_lm
from piecework.spec.compile_options import BackendName
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.models.tiny import FAMILIES, HYBRID_FAMILIES, MORE_FAMILIES, config_dict, reference_model, write_config

COUNTS = {
    "mixtral": (1, 5),
    "qwen3_moe": (1, 5),
    "gpt_oss": (1, 5),
    "granitemoe": (1, 5),
    "qwen2_moe": (2, 6),
    "glm4_moe": (2, 6),
    "llama4_text": (2, 4),
    "bamba": (2, 5),
    "qwen3_5_text": (4, 10),
    "olmo_hybrid": (1, 5),
    "qwen3_next": (2, 8),
    "granitemoehybrid": (2, 8),
    "falcon_h1": (1, 5),
    "nemotron_h": (3, 4),
    "zamba2": (1, 6),
    "mamba2": (1, 4),
    "mamba": (1, 4),
    "falcon_mamba": (1, 4),
    "jamba": (1, 5),
    "lfm2": (2, 4),
}
"""Kinds of blocks, and different pieces, counted by hand; elsewhere a kind, and what comes first, between and last.

Experts add what comes between their two products and after the second one; a dense layer among them its own step. Of
Llama 4's three layers no two steps are the same: first, to one without rotary embedding, to one with, last. Mixers
with a recurrent state add what comes between their convolution and their scan; where layers that attend come between
those, what leads from one kind to the other and back is not the same. In Zamba, OLMo and Jamba, the layer that attends
is the only one of its class, and so no block. Qwen 3.5's rotary embedding has all of it once more for a single token.
"""

QUICK = [("qwen3", BackendName.EAGER), ("gpt_oss", BackendName.EAGER)]
"""Operator by operator, families are under test in tests/unit/models/test_adapter.py."""


SELDOM = (
    *("mpt", "falcon_alibi", "gptj", "codegen", "qwen3_5_text", "olmo_hybrid", "falcon_h1"),
    *("nemotron_h", "zamba2", "mamba", "falcon_mamba", "jamba", "lfm2"),
)
"""Families whose native code others' is like: they are no part of CI."""


NATIVE = [(family, BackendName.AOTI) for family in (*FAMILIES, *MORE_FAMILIES, *HYBRID_FAMILIES) if family != "llama"]


@pytest.mark.parametrize(
    ("family", "backend"),
    slow_but([*NATIVE, *QUICK], *QUICK, seldom=[(family, BackendName.AOTI) for family in SELDOM]),
)
def test_a_family_equals_transformers(family: str, backend: BackendName, home: Path, tmp_path: Path) -> None:
    model_dir = write_config(tmp_path, family, eos_token_id=None)
    reference = reference_model(model_dir)
    spec = ModelSpec.of(model_dir, dtype="float32", max_tokens=64, backend=backend)
    compiled = compile_model(
        spec, store=DirectoryStore(home), environment=Environment(store_root=home), check_weights=False
    )
    record = compiled.bundle.record()
    assert (record.counts["blocks_traced"], record.counts["unique_pieces"]) == COUNTS.get(family, (1, 3))
    model = load(compiled.bundle, weights=reference)

    count = 21
    ids = torch.randint(5, 130, (count,), generator=torch.Generator().manual_seed(1))
    model.make_states({"blocks": 8, "state_slots": 1})
    logits = model.run(
        {
            "input_ids": ids,
            "positions": torch.arange(count),
            "slot_mapping": torch.arange(16, 16 + count),
            "block_tables": torch.arange(1, 3)[None],
            "seq_lens": torch.tensor([count]),
            "query_start": torch.tensor([0, count]),
            "logits_indices": torch.arange(count),
            "state_slots": torch.tensor([0]),
            "num_decode_tokens": 0,
        }
    )[0]
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()

    params = SamplingParams(max_tokens=64, ignore_eos=True)
    prompts = [ids[:9].tolist(), ids[9:12].tolist()]
    sizes = EngineConfig(num_blocks=10, max_tokens=64, max_seqs=8, prefix_caching=family not in HYBRID_FAMILIES)
    engine = engine_for(model, sizes, model_config=spec.config, tokenizer=None)
    for index, prompt in enumerate(prompts):
        engine.add(GenerationRequest(str(index), tuple(prompt), params))
    tokens: list[list[int]] = [[], []]
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)].append(output.sampled.token)
    for prompt, found in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            made = reference.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        assert found == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", slow_but([*FAMILIES, *MORE_FAMILIES], "gpt_neox"))
def test_pieces_do_not_grow_with_depth(family: str, tmp_path: Path) -> None:
    # Llama 4's kinds of layers come back after four, so that the last one is followed by a first one from five on
    depths = (8, 16) if family == "llama4_text" else (4, 16)
    found = [different_pieces(tmp_path / f"{depth}", family, depth) for depth in depths]
    assert found[0] == found[1]


def different_pieces(directory: Path, family: str, depth: int) -> set[str]:
    """Return the fingerprints of the pieces of a model of so many layers, whose kinds are the config's own."""
    kinds: dict[str, Any] = dict.fromkeys({"no_rope_layers", "mlp_only_layers"} & set(config_dict(family)))
    if "layer_types" in config_dict(family):
        kinds["layer_types"] = ["sliding_attention", "full_attention"] * (depth // 2)
    model_dir = write_config(directory, family, num_hidden_layers=depth, **kinds)
    steps = split(capture(build_causal_lm(ModelSpec.of(model_dir, dtype="float32", max_tokens=64))))
    return {step.program.fingerprint() for step in steps if isinstance(step, Piece)}
