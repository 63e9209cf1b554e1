"""`LLM` on models with recurrent states: greedy tokens are transformers', in a mixed batch with preemptions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from safetensors.torch import save_file

from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.model import compile_model
from piecework.engine.llm import LLM
from piecework.engine.sampling_params import SamplingParams
from piecework.foundation.environment import Environment
from piecework.spec.compile_options import BackendName
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.engine.test_engine_models import NUM_TOKENS, assert_greedy, mixed_prompts
from tests.unit.models.tiny import reference_model, write_config

PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
BLOCKS = 30


@pytest.mark.parametrize(
    ("family", "backend"),
    slow_but(
        itertools.product(["bamba", "qwen3_next", "mamba2"], [BackendName.EAGER, BackendName.AOTI]),
        ("bamba", BackendName.EAGER),
        seldom=[("qwen3_next", BackendName.AOTI), ("mamba2", BackendName.AOTI)],
    ),
)
def test_many_requests(family: str, backend: BackendName, home: Path, tmp_path: Path) -> None:
    model_dir = write_config(tmp_path, family)
    reference = reference_model(model_dir)
    save_file({n: t.contiguous() for n, t in reference.state_dict().items()}, model_dir / "model.safetensors")
    spec = ModelSpec.of(model_dir, dtype="float32", max_tokens=32, backend=backend)
    compiled = compile_model(spec, store=DirectoryStore(home), environment=Environment(store_root=home))
    prompts = mixed_prompts(12)
    # one layer of bamba's and of qwen3_next's three attends; mamba2 has no KV cache, and so nobody is preempted
    block = 2 * 16 * 2 * 16 * 4
    notes: list[str] = []
    options = {"kv_cache_memory": BLOCKS * block, "max_seqs": 8}
    with LLM(model_dir, bundle=compiled.bundle.path, on_note=notes.append, **options) as llm:
        found = llm.generate(prompts, PARAMS)
        stats = llm.stats()
    for prompt, completion in zip(prompts, found, strict=True):
        assert_greedy(reference, prompt, list(completion.tokens))
    assert (stats.preemptions > 0, stats.prefix_hit_tokens) == (family != "mamba2", 0)
    assert any("recurrent states" in note for note in notes)
