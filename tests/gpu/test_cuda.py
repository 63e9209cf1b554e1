"""Bundles for CUDA: compiled with Triton kernels, loaded without a compiler, run against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.unit.models.tiny import write_config

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

_PROBE = """
import json, sys, torch
from piecework.bundle.run import load
bundle, weights, out = sys.argv[1:]
model = load(bundle, weights=[weights])
model.make_states({"blocks": 16})
ids = torch.tensor(json.loads(sys.stdin.read()))
count = len(ids)
def inputs(tokens, start, decode):
    n = len(tokens)
    return {"input_ids": tokens, "positions": torch.arange(start, start + n),
            "slot_mapping": torch.arange(16 + start, 16 + start + n), "block_tables": torch.arange(1, 9)[None],
            "seq_lens": torch.tensor([start + n]), "query_start": torch.tensor([0, n]),
            "logits_indices": torch.arange(n), "num_decode_tokens": decode}
prefill = model.run(inputs(ids[:-1], 0, 0))[0]
decode = model.run(inputs(ids[-1:], count - 1, 1))[0]
torch.save(torch.cat([prefill, decode]).float().cpu(), out)
banned = [m for m in sys.modules if m.split(".")[0] in ("sympy", "triton", "transformers")
          or m.startswith(("torch._dynamo", "torch._inductor"))]
print(json.dumps(banned))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_cuda_bundle_equals_transformers(tmp_path: Path, family: str, dtype: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_dir = write_config(tmp_path / "model", family)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir)).to(getattr(torch, dtype)).eval()
    reference.save_pretrained(model_dir)
    home = {**os.environ, "PIECEWORK_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "piecework", "compile", str(model_dir), "--device", "cuda", "--dtype", dtype]
    done = subprocess.run(
        [*command, "--max-tokens", "64", "--json"], env=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(done.stdout)
    assert made["unique_pieces"] == 3
    ids = torch.randint(5, 60, (33,))
    out = tmp_path / "logits.pt"
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, made["bundle"], str(model_dir / "model.safetensors"), str(out)],
        input=json.dumps(ids.tolist()),
        env=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr
    assert json.loads(probe.stdout) == []
    logits = torch.load(out)
    with torch.no_grad():
        exact = reference.float().cuda()(ids[None].cuda()).logits[0].float().cpu()
        eager = reference.to(getattr(torch, dtype))(ids[None].cuda()).logits[0].float().cpu()
    error = (logits - exact).abs().max().item()
    if dtype == "float32":
        assert error <= 1e-4 * exact.abs().max().item()
    else:
        assert error <= 2 * (eager - exact).abs().max().item()
