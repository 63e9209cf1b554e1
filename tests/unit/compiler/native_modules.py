"""Opaque ops that call IR ops inside, and modules around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import piecework
from piecework.ops.activations import silu_mul
from piecework.ops.ir.declared_calls import DynamicSizes
from piecework.ops.ir.inputs import Draw
from piecework.ops.norms import rms_norm
from piecework.ops.quantize import quantize_dynamic_per_token

WIDTH = 32


def _inputs(draw: Draw) -> tuple[Any, ...]:
    width = draw.width()
    return draw.tensor(draw.rows, width), draw.tensor(draw.rows, width)


@piecework.op("piecework_test_natives::gated_int8", inputs=_inputs, tolerance={torch.float32: 1e-5})
def gated_int8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compose two IR ops: its body is one piece, in which both are fused."""
    return quantize_dynamic_per_token(silu_mul(gate, up), torch.int8)


@piecework.opaque_op("piecework_test_natives::activate")
def activate(x: Tensor, weight: Tensor, layer: str) -> Tensor:
    """Gate, norm and quantize the rows in two parts, of which the second may be empty."""
    parts = []
    for part in (x[:1], x[1:]):
        gate, up = part.chunk(2, dim=-1)
        normed = rms_norm(silu_mul(gate, up), weight, eps=1e-5)
        quantized, scale = gated_int8(gate, up)
        parts.append(normed + quantized.to(x.dtype) * scale.to(x.dtype))
    return torch.cat(parts)


@activate.fake
def _activate_fake(x: Tensor, weight: Tensor, layer: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@activate.calls
def _activate_calls(sizes: DynamicSizes, x: Tensor, weight: Tensor, layer: str) -> Iterator[Any]:
    gate, up = x.new_empty(sizes.dynamic(x.shape[0]), x.shape[1]).chunk(2, dim=-1)
    yield silu_mul, (gate, up)
    yield rms_norm, (torch.empty_like(gate, memory_format=torch.contiguous_format), weight), {"eps": 1e-5}
    yield gated_int8, [gate, up]


class Layers(nn.Module):
    """Layers around the opaque op, alike but for their names."""

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(num_layers))
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for number, inner in enumerate(self.inner):
            x = activate(inner(x), self.weight, f"layers.{number}")
        return x


def layers(dtype: torch.dtype = torch.float32, *, num_layers: int = 2) -> Layers:
    """Return the module with the same weights every time."""
    torch.manual_seed(0)
    return Layers(num_layers).requires_grad_(False).to(dtype)
