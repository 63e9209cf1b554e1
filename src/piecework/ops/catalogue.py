"""All of our own ops of the IR: those whose provider is chosen, and the IR's view of others, lowered by rule.

`linear` is put on torch's or oneDNN's operator by compiler/passes/pack_linear.py; `moe_experts` and `attention` are
steps of a
plan, and have native kernels (providers/libraries.py). `kv_write` finds its cache by the layer's name: calls of it run
inside `running(op, args)`, which has one. In a model's plan the cache is written by `attention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from piecework.ops.activations import gelu_mul, silu_mul
from piecework.ops.attention import ATTENTION_OP, attention_native
from piecework.ops.ir.forward_context import Batch, ForwardContext
from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.op import IrOp, existing
from piecework.ops.layer_attention import AttentionState
from piecework.ops.layer_attention import kv_write as kv_write_op
from piecework.ops.linear import LINEAR_OP, linear_native
from piecework.ops.moe.experts import MOE_EXPERTS_OP, moe_experts
from piecework.ops.moe.route import moe_route
from piecework.ops.norms import TOLERANCE, add_rms_norm, layer_norm, rms_norm
from piecework.ops.quantize import quantize_dynamic_per_token, quantize_group_fp8, quantize_static_fp8
from piecework.ops.rotary import rotary, rotate_pairs


def _linear_inputs(draw: Draw) -> Sequence[Any]:
    inner, outer = draw.width(), draw.choose((32, 1, 7))
    bias = draw.choose((None, draw.tensor(outer)))
    return draw.tensor(draw.rows, inner), draw.tensor(outer, inner, scale=inner**-0.5), bias


def _experts_inputs(draw: Draw) -> Sequence[Any]:
    hidden, experts, chosen, inner = draw.width(), 6, draw.choose((2, 1, 6)), 8
    ids = torch.rand(draw.rows, experts, generator=torch.Generator().manual_seed(draw.rows)).argsort(-1)[:, :chosen]
    weights = draw.tensor(draw.rows, chosen, dtype=torch.float32).abs()
    gate_up = draw.tensor(experts, 2 * inner, hidden, scale=hidden**-0.5)
    return draw.tensor(draw.rows, hidden), ids.to(draw.device), weights, gate_up, draw.tensor(experts, hidden, inner)


def _attention_inputs(draw: Draw) -> Sequence[Any]:
    """Draw one sequence that is prefilled, or as many that decode, one token each."""
    tokens, heads, dim, block = max(1, draw.rows), draw.choose((4, 2)), 16, 4
    decode = draw.choose((False, True))
    seqs = tokens if decode else 1
    width = -(-(3 if decode else tokens) // block)
    tables = torch.arange(seqs * width).view(seqs, width)
    if decode:
        slots, lens, starts = tables[:, 0] * block + 2, torch.full((seqs,), 3), torch.arange(seqs + 1)
    else:
        slots, lens, starts = torch.arange(tokens), torch.tensor([tokens]), torch.tensor([0, tokens])
    indices = [t.to(draw.device) for t in (slots, tables, lens, starts)]
    q, k, v = draw.tensor(tokens, heads, dim), draw.tensor(tokens, 2, dim), draw.tensor(tokens, 2, dim)
    cache = draw.tensor(2, seqs * width, block, 2, dim)
    return q, k, v, cache, *indices, seqs if decode else 0, dim**-0.5


_LAYER: Final = LayerName("model.layers.0.self_attn")
_BLOCK_SIZE: Final = 4


def _kv_write_inputs(draw: Draw) -> Sequence[Any]:
    heads, dim = draw.choose((2, 1, 3)), draw.choose((16, 8))
    both = draw.tensor(draw.rows, 2, heads, dim)  # keys and values side by side, as a merged linear layer leaves them
    return both[:, 0], both[:, 1], _LAYER


def running(op: IrOp, args: Sequence[Any]) -> AbstractContextManager[ForwardContext | None]:
    """Return the context in which an op of the catalogue can be called with `args`.

    For `kv_write` it is a forward context of one layer, whose cache is all zeros, and of a batch whose slots run
    backwards from the cache's last; yields that context. Other ops need none: yields None.
    """
    if op is not kv_write:
        return contextlib.nullcontext()
    key = args[0]
    blocks = key.shape[0] // _BLOCK_SIZE + 2
    cache = key.new_zeros((2, blocks, _BLOCK_SIZE, *key.shape[1:]))
    slots = torch.arange(blocks * _BLOCK_SIZE - 1, -1, -1, device=key.device)[: key.shape[0]]
    tables = torch.arange(blocks, device=key.device)[None]
    lens, starts = (torch.tensor(n, device=key.device) for n in ([key.shape[0]], [0, key.shape[0]]))
    return ForwardContext({_LAYER: AttentionState(cache)}).running(Batch(slots, tables, lens, starts, 0))


linear: Final = existing(LINEAR_OP, linear_native, inputs=_linear_inputs, tolerance=TOLERANCE)
experts: Final = existing(MOE_EXPERTS_OP, moe_experts.function, inputs=_experts_inputs, tolerance=TOLERANCE)
attention: Final = existing(
    ATTENTION_OP, attention_native, inputs=_attention_inputs, tolerance=TOLERANCE, mutates=("kv_cache",)
)
kv_write: Final = existing(kv_write_op.name, kv_write_op.function, inputs=_kv_write_inputs, tolerance=TOLERANCE)

CHOSEN: Final[tuple[IrOp, ...]] = (
    rms_norm,
    add_rms_norm,
    layer_norm,
    silu_mul,
    gelu_mul,
    rotary,
    rotate_pairs,
    quantize_static_fp8,
    quantize_dynamic_per_token,
    quantize_group_fp8,
    moe_route,
)
"""Ops whose provider is chosen."""

VIEWS: Final[tuple[IrOp, ...]] = (linear, experts, attention, kv_write)
"""Operators that are lowered by rule; nobody registers implementations of these."""
