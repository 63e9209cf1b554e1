"""Latent attention by a layer's name is what it is with its cache and weights given."""

from __future__ import annotations

import pytest
import torch

from piecework import LayerName, OpError
from piecework.ops.ir.forward_context import Batch, ForwardContext
from piecework.ops.mla.core import LatentWeights
from piecework.ops.mla.layer import LatentState, layer_mla_attention
from tests.unit.ops.mla_cases import BATCHES, TOLERANCES, MlaCase, make_mla_case, reference, reference_cache

LAYER = LayerName("model.layers.0.self_attn")


def run(case: MlaCase, value_size: int) -> torch.Tensor:
    named = case.named
    weights = LatentWeights(*(named[name] for name in LatentWeights._fields))
    state = LatentState(named["norm_weight"], named["eps"], weights, named["latent_cache"])
    batch = Batch(**{name: named[name] for name in Batch.__dataclass_fields__ if name in named})
    tokens = [named[name] for name in ("q_nope", "q_pe", "compressed", "cos", "sin")]
    with ForwardContext({LAYER: state}).running(batch):
        return layer_mla_attention(*tokens, LAYER, named["scale"], value_size)


@pytest.mark.parametrize("batch", ["a long prefix", "chunks and decodes"])
def test_equals_the_dense_reference(batch: str) -> None:
    case = make_mla_case(BATCHES[batch])
    wanted, cache, tolerance = reference(case), reference_cache(case), TOLERANCES[torch.float32]
    out = run(case, 6)
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        case.named["latent_cache"].double(), cache, atol=tolerance, rtol=tolerance, equal_nan=True
    )


def test_another_size_is_refused() -> None:
    with pytest.raises(OpError, match="value_size = 7"):
        run(make_mla_case(BATCHES["a long prefix"]), 7)
