"""The engine on a GPU: greedy tokens are transformers', with latent attention, experts' bodies and Triton's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.test_engine_models import NUM_TOKENS, assert_greedy, mixed_prompts
from tests.unit.models.tiny import reference_model, write_config

from piecework.engine.llm import LLM
from piecework.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("providers", [None, "@cuda=triton,native"])
@pytest.mark.parametrize(
    ("family", "mla"), [("llama", "exposed"), ("deepseek_v3", "exposed"), ("deepseek_v3", "opaque")]
)
def test_generated_tokens_are_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, mla: str, providers: str | None
) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    model_dir = write_config(tmp_path / "model", family, eos_token_id=None)
    reference: Any = reference_model(model_dir)
    config = (model_dir / "config.json").read_text()
    reference.save_pretrained(model_dir)
    (model_dir / "config.json").write_text(config)
    prompts = mixed_prompts(8)
    with LLM(
        model_dir, device="cuda", dtype="float32", max_tokens=64, mla=mla, providers=providers, kv_cache_memory=1 << 22
    ) as llm:
        found = llm.generate(prompts, PARAMS)
    for prompt, completion in zip(prompts, found, strict=True):
        assert_greedy(reference, prompt, list(completion.tokens))
