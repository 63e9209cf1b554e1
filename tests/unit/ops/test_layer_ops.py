"""What holds for all operators that address a layer by name, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_RUN = """
import sys
import torch
from piecework import LayerName
from piecework.ops.ir.forward_context import Batch, ForwardContext
from piecework.ops.mixers.gated_delta_net import GatedDeltaNetState, GatedDeltaNetWeights, gated_delta_net
from piecework.ops.ir.layer import IS_OBJECT
from piecework.ops.layer_attention import AttentionState, kv_write, layer_attention
from piecework.ops.mixers.mamba2 import Mamba2State, Mamba2Weights, mamba2_mixer
from piecework.ops.moe.layer import MoeWeights, SharedMoeWeights, moe_forward, moe_forward_shared

assert IS_OBJECT == (sys.argv[1] == "1")
routed = MoeWeights(torch.ones(2, 6, 4), torch.ones(2, 4, 3), top_k=1)
heads = torch.ones(2)
states = {
    "attention": AttentionState(torch.zeros(2, 1, 4, 1, 4)),
    "moe": routed,
    "shared": SharedMoeWeights(routed, torch.ones(6, 4), torch.ones(4, 3)),
    "mamba2": Mamba2State(
        Mamba2Weights(torch.ones(12, 4), None, heads, heads, heads, torch.ones(8)),
        torch.zeros(1, 12, 3),
        torch.zeros(1, 2, 4, 2),
    ),
    "delta": GatedDeltaNetState(
        GatedDeltaNetWeights(torch.ones(16, 4), None, heads, heads), torch.zeros(1, 16, 3), torch.zeros(1, 2, 2, 4)
    ),
}
batch = Batch(
    slot_mapping=torch.arange(3),
    block_tables=torch.zeros(1, 1, dtype=torch.int64),
    seq_lens=torch.tensor([3]),
    query_start=torch.tensor([0, 3]),
    num_decode_tokens=0,
    state_slots=torch.tensor([0]),
)
layer = {name: LayerName(name) for name in states}
x = torch.ones(3, 4)
with ForwardContext(states).running(batch), torch.no_grad():
    for way in ("__call__", "function"):  # through the dispatcher, and as the plan executor calls them
        query = x.view(3, 1, 4)
        token = getattr(kv_write, way)(query, query, layer["attention"])
        results = [
            getattr(layer_attention, way)(query, query, query, layer["attention"], 0.5, after=token),
            getattr(moe_forward, way)(x, x[:, :2], layer["moe"]),
            *getattr(moe_forward_shared, way)(x, x[:, :2], layer["shared"]),
            getattr(mamba2_mixer, way)(torch.ones(3, 22), layer["mamba2"], 8),
            getattr(gated_delta_net, way)(torch.ones(3, 16), heads.expand(3, 2), heads.expand(3, 2), layer["delta"], 4),
        ]
        assert [list(r.shape) for r in results] == [[3, 1, 4], [3, 4], [3, 4], [3, 4], [3, 8], [3, 2, 4]]
        assert all(r.isfinite().all() for r in results)
bad = {"sympy", "torch._dynamo", "torch._inductor", "triton", "transformers"} & set(sys.modules)
raise SystemExit(f"imported {sorted(bad)}" if bad else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layer_names", ["1", "0"])
def test_all_run_without_a_compiler_and_with_layer_names_as_strings(layer_names: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, layer_names],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIECEWORK_LAYERNAME": layer_names},
    )
    assert done.returncode == 0, done.stderr
