"""Operators that are told their layer as a LayerName, a string or an integer; every name gives another result."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.ops.ir.layer import LayerName, LayerNameType, resolve
from piecework.ops.ir.opaque_op import opaque_op


def number_of(name: str | int) -> float:
    """Return a number that is another one for every name of a test."""
    return 1.0 + (name if isinstance(name, int) else sum(i * b for i, b in enumerate(name.encode(), 1)) % 997) / 100


@opaque_op("pwgraph::by_layer")
def by_layer(x: Tensor, layer: LayerNameType) -> Tensor:
    return x * number_of(resolve(layer))


@opaque_op("pwgraph::by_text")
def by_text(x: Tensor, layer: str) -> Tensor:
    return x * number_of(layer)


@opaque_op("pwgraph::by_number")
def by_number(x: Tensor, layer: int = 0) -> Tensor:
    return x * number_of(layer)


@opaque_op("pwgraph::by_two")
def by_two(x: Tensor, first: LayerNameType, second: LayerNameType, window: int = 0) -> Tensor:
    return x * number_of(resolve(first)) - number_of(resolve(second)) + window


for _op in (by_layer, by_text, by_number, by_two):
    _op.fake(lambda x, *_args, **_kwargs: torch.empty_like(x))

WIDTHS = {"even": 1, "odd": 2}
"""By a layer's name: how often `widened` repeats its result. Names that aren't here are an error."""


def _widened(x: Tensor, layer: str) -> Tensor:
    return torch.cat([x * number_of(layer)] * WIDTHS[layer], dim=1)


def _widened_fake(x: Tensor, layer: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * WIDTHS[layer])


library = torch.library.Library("pwgraph", "FRAGMENT")
library.define("widened(Tensor x, str layer) -> Tensor")
library.impl("widened", _widened, "CompositeExplicitAutograd")
torch.library.register_fake("pwgraph::widened", _widened_fake, lib=library)
library.define("widened_meta(Tensor x, str layer) -> Tensor")
library.impl("widened_meta", _widened, "CPU")
library.impl("widened_meta", _widened_fake, "Meta")
library.define("decomposed(Tensor x, str layer) -> Tensor")
library.impl("decomposed", lambda x, layer: x * len(layer), "CompositeImplicitAutograd")
library.define("listed(Tensor x, str[] layers, *, int number=7) -> Tensor")
library.impl(
    "listed", lambda x, layers, number=7: x * sum(map(number_of, layers)) + number, "CompositeExplicitAutograd"
)
torch.library.register_fake("pwgraph::listed", lambda x, layers, number=7: torch.empty_like(x), lib=library)

OPS = {"LayerName": by_layer, "str": by_text, "int": by_number}
NAMES = {
    "LayerName": lambda i: LayerName(f"layers.{i}"),
    "str": lambda i: f"layers.{i}",
    "int": lambda i: i,
}
