"""A block around each operator under test, the state that it finds under its layer's name, and stacks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from piecework.ops.ir.forward_context import Batch
from piecework.ops.layer_attention import AttentionState, kv_write, layer_attention
from piecework.ops.mixers.gated_delta_net import GatedDeltaNetState, GatedDeltaNetWeights, gated_delta_net
from piecework.ops.mixers.mamba import MambaState, MambaWeights, mamba_mixer
from piecework.ops.mixers.mamba2 import Mamba2State, Mamba2Weights, mamba2_mixer
from piecework.ops.mla.core import LatentWeights
from piecework.ops.mla.layer import LatentState, layer_mla_attention
from piecework.ops.moe.layer import MoeWeights, moe_forward
from tests.unit.names.adapter import Adapter, adapter
from tests.unit.names.kinds import KINDS, OPS

HIDDEN = 8
HEADS, HEAD_DIM = 2, 4
SLOTS, TAPS, STATE = 2, 4, 4
LATENT, ROTARY, RANK = 6, 2, 3


class Block(nn.Module):
    """Two linear layers with the operator between them, and a residual that keeps 80 of them in bounds."""

    def __init__(self, kind: str, index: int, *, features: int = HIDDEN) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HIDDEN, features), nn.Linear(HIDDEN, HIDDEN)
        self.layer = KINDS[kind](index)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.after(self.mix(self.before(x))))

    def mix(self, projected: Tensor) -> Tensor:
        raise NotImplementedError


class AttentionBlock(Block):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index, features=3 * HIDDEN)
        self.attention = OPS[layer_attention][kind]

    def mix(self, projected: Tensor) -> Tensor:
        query, key, value = projected.view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        return self.attention(query, key, value, self.layer, 0.5).flatten(1)


class UpdateBlock(AttentionBlock):
    """The cache is written by an operator of its own, which need not end a piece."""

    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index)
        self.update = OPS[kv_write][kind]

    def mix(self, projected: Tensor) -> Tensor:
        query, key, value = projected.view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        token = self.update(key, value, self.layer)
        return self.attention(query, key, value, self.layer, 0.5, after=token).flatten(1)


class MoeBlock(Block):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index)
        self.router, self.experts = nn.Linear(HIDDEN, 4), OPS[moe_forward][kind]

    def mix(self, projected: Tensor) -> Tensor:
        return self.experts(projected, self.router(projected), self.layer)


class LatentBlock(Block):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index, features=HEADS * (HEAD_DIM + ROTARY) + LATENT + ROTARY)
        self.attention = OPS[layer_mla_attention][kind]

    def mix(self, projected: Tensor) -> Tensor:
        queries, compressed = projected.tensor_split([HEADS * (HEAD_DIM + ROTARY)], dim=-1)
        q_nope, q_pe = queries.unflatten(-1, (HEADS, -1)).split([HEAD_DIM, ROTARY], dim=-1)
        ones = compressed[:, : ROTARY // 2] * 0 + 1
        return self.attention(q_nope, q_pe, compressed, ones, ones * 0, self.layer, 0.5, HEAD_DIM)


class MambaBlock(Block):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index, features=2 * HIDDEN)
        self.mixer = OPS[mamba_mixer][kind]

    def mix(self, projected: Tensor) -> Tensor:
        return self.mixer(projected, self.layer, HIDDEN)


class Mamba2Block(Block):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index, features=HIDDEN + (HIDDEN + 2 * STATE) + HEADS)
        self.mixer = OPS[mamba2_mixer][kind]

    def mix(self, projected: Tensor) -> Tensor:
        return self.mixer(projected, self.layer, HIDDEN)


class DeltaBlock(Block):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index, features=2 * HEAD_DIM + HIDDEN + 2 * HEADS)
        self.mixer = OPS[gated_delta_net][kind]

    def mix(self, projected: Tensor) -> Tensor:
        qkv, b, a = projected.split([2 * HEAD_DIM + HIDDEN, HEADS, HEADS], dim=-1)
        return self.mixer(qkv, b, a, self.layer, HEAD_DIM).flatten(1)


class AdapterBlock(Block):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__(kind, index)
        self.adapter = OPS[adapter][kind]

    def mix(self, projected: Tensor) -> Tensor:
        return self.adapter(projected, self.layer, strength=0.25)


class Stack(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _cache() -> AttentionState:
    return AttentionState(torch.randn(2, 4, 4, HEADS, HEAD_DIM))


def _experts() -> MoeWeights:
    return MoeWeights(torch.randn(4, 12, HIDDEN), torch.randn(4, HIDDEN, 6), top_k=2)


def _latent() -> LatentState:
    keys, values = torch.randn(HEADS, HEAD_DIM, LATENT), torch.randn(HEADS, LATENT, HEAD_DIM)
    expanding = torch.cat([keys, values.transpose(1, 2)], dim=1).flatten(0, 1)
    weights = LatentWeights(expanding, keys, values)
    return LatentState(torch.rand(LATENT), 1e-6, weights, torch.randn(4, 4, LATENT + ROTARY))


def _mamba() -> MambaState:
    weights = MambaWeights(
        conv_weight=torch.randn(HIDDEN, TAPS),
        conv_bias=torch.randn(HIDDEN),
        x_proj=torch.randn(RANK + 2 * STATE, HIDDEN),
        dt_proj=torch.randn(HIDDEN, RANK),
        dt_bias=torch.randn(HIDDEN),
        a_log=torch.rand(HIDDEN, STATE),
        d=torch.randn(HIDDEN),
    )
    return MambaState(weights, torch.randn(SLOTS, HIDDEN, TAPS - 1), torch.randn(SLOTS, HIDDEN, STATE))


def _mamba2() -> Mamba2State:
    channels = HIDDEN + 2 * STATE
    weights = Mamba2Weights(
        conv_weight=torch.randn(channels, TAPS),
        conv_bias=torch.randn(channels),
        dt_bias=torch.randn(HEADS),
        a_log=torch.rand(HEADS),
        d=torch.randn(HEADS),
        norm_weight=torch.rand(HIDDEN),
    )
    return Mamba2State(weights, torch.randn(SLOTS, channels, TAPS - 1), torch.randn(SLOTS, HEADS, HEAD_DIM, STATE))


def _delta() -> GatedDeltaNetState:
    channels = 2 * HEAD_DIM + HIDDEN
    weights = GatedDeltaNetWeights(torch.randn(channels, TAPS), None, torch.randn(HEADS), torch.rand(HEADS))
    conv, recurrent = torch.randn(SLOTS, channels, TAPS - 1), torch.randn(SLOTS, HEADS, HEAD_DIM, HEAD_DIM)
    return GatedDeltaNetState(weights, conv, recurrent)


def _adapter() -> Adapter:
    return Adapter(torch.randn(HIDDEN, 2), torch.randn(2, HIDDEN), torch.zeros(1))


@dataclass(frozen=True)
class Family:
    """An operator under test: a block that calls it, and what makes one layer's state, different each time."""

    block: Callable[[str, int], Block]
    state: Callable[[], Any]


FAMILIES: Mapping[str, Family] = {
    "attention": Family(AttentionBlock, _cache),
    "KV update": Family(UpdateBlock, _cache),
    "latent attention": Family(LatentBlock, _latent),
    "MoE": Family(MoeBlock, _experts),
    "Mamba": Family(MambaBlock, _mamba),
    "Mamba2": Family(Mamba2Block, _mamba2),
    "gated delta net": Family(DeltaBlock, _delta),
    "user's op": Family(AdapterBlock, _adapter),
}


def make_stack(family: str, kind: str, *, num_layers: int) -> Stack:
    torch.manual_seed(0)
    stack = Stack([FAMILIES[family].block(kind, index) for index in range(num_layers)])
    return stack.eval().requires_grad_(False)


def make_states(family: str, *, num_layers: int) -> list[Any]:
    """Return the layers' states; no two are alike, so that a result tells whether every layer found its own."""
    torch.manual_seed(1)
    return [FAMILIES[family].state() for _ in range(num_layers)]


def forwards() -> list[tuple[Batch, Tensor]]:
    """Return two forwards: a prompt's second chunk of 5 tokens; its decode beside another prompt of 3 tokens."""
    torch.manual_seed(2)
    chunk = Batch(
        slot_mapping=torch.arange(3, 8),
        block_tables=torch.tensor([[0, 1, 2]]),
        seq_lens=torch.tensor([8]),
        query_start=torch.tensor([0, 5]),
        num_decode_tokens=0,
        state_slots=torch.tensor([1]),
    )
    mixed = Batch(
        slot_mapping=torch.tensor([8, 12, 13, 14]),
        block_tables=torch.tensor([[0, 1, 2], [3, 3, 3]]),
        seq_lens=torch.tensor([9, 3]),
        query_start=torch.tensor([0, 1, 4]),
        num_decode_tokens=1,
        state_slots=torch.tensor([1, 0]),
    )
    return [(chunk, torch.randn(5, HIDDEN)), (mixed, torch.randn(4, HIDDEN))]
