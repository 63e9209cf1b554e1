"""Attention and reductions over packed texts: each text alone gives the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from piecework.errors import OpError
from piecework.ops.ir.opaque_op import check_ops
from piecework.ops.texts.packed import packed_attention, packed_reduce

LENGTHS = [5, 2, 7, 2, 1, 7, 7]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)


def alone(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).double() for t in (query, key, value))
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3).transpose(0, 1)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("window", "causal"), [(0, False), (3, False), (0, True), (3, True), (50, False)])
def test_attention_is_that_of_each_text_alone(window: int, causal: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    total = int(STARTS[-1])
    query, key, value = (torch.randn(heads, total, 8).transpose(0, 1) for heads in (4, kv_heads, kv_heads))
    with check_ops():
        out = packed_attention(query, key, value, STARTS, 0.3, window, causal)
    assert out.is_contiguous()
    for begin, end in pairwise(STARTS.tolist()):
        place = torch.arange(end - begin)
        distance = place.unsqueeze(1) - place
        mask = (distance.abs() < (window or 99)) & ((distance >= 0) | (not causal))
        wanted = alone(query[begin:end], key[begin:end], value[begin:end], mask)
        torch.testing.assert_close(out[begin:end].double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [False, True])
def test_reductions_are_those_of_each_text_alone(dtype: torch.dtype, largest: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(int(STARTS[-1]), 6, dtype=dtype)
    with check_ops():
        out = packed_reduce(x, STARTS, largest)
    texts = [x[begin:end] for begin, end in pairwise(STARTS.tolist())]
    wanted = torch.stack([t.amax(0) if largest else t.double().mean(0).to(dtype) for t in texts])
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("starts", [[0, 3, 2, 5], [0, 3], [1, 5], [0, 3, 3, 5], [0]])
def test_places_that_do_not_divide_the_tokens_are_refused(starts: list[int]) -> None:
    x = torch.zeros(5, 2)
    with pytest.raises(OpError, match="texts of 5 tokens"):
        packed_reduce.function(x, torch.tensor(starts))
    with pytest.raises(OpError, match="texts of 5 tokens"):
        packed_attention.function(x[:, None], x[:, None], x[:, None], torch.tensor(starts), 1.0)
