"""Operators that take a layer's name as LayerName, str or int, and some more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from piecework.ops.ir.layer import LayerNameType, resolve
from piecework.ops.ir.opaque_op import OpaqueOp, opaque_op


@opaque_op("pwtest::attend_LayerName")
def _attend_name(x: Tensor, layer: LayerNameType) -> Tensor:
    return x * (1 + len(resolve(layer)))


@opaque_op("pwtest::attend_str")
def _attend_str(x: Tensor, layer: str) -> Tensor:
    return x * (1 + len(layer))


@opaque_op("pwtest::attend_int")
def _attend_int(x: Tensor, layer: int) -> Tensor:
    return x * (1 + layer)


@opaque_op("pwtest::update_LayerName")
def _update_name(x: Tensor, layer: LayerNameType) -> Tensor:
    return x + len(resolve(layer))


@opaque_op("pwtest::update_str")
def _update_str(x: Tensor, layer: str) -> Tensor:
    return x + len(layer)


@opaque_op("pwtest::update_int")
def _update_int(x: Tensor, layer: int) -> Tensor:
    return x + layer


attend: Mapping[str, OpaqueOp] = {"LayerName": _attend_name, "str": _attend_str, "int": _attend_int}
update: Mapping[str, OpaqueOp] = {"LayerName": _update_name, "str": _update_str, "int": _update_int}
for _op in (*attend.values(), *update.values()):
    _op.fake(lambda x, layer: torch.empty_like(x))


@opaque_op("pwtest::repeat")
def repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times)


@repeat.fake
def _(x: Tensor, times: int) -> Tensor:
    return x.new_empty(x.shape[0] * times)


@opaque_op("pwtest::narrow")
def narrow(x: Tensor, length: int) -> Tensor:
    return x[:length].clone()


@narrow.fake
def _(x: Tensor, length: int) -> Tensor:
    return x.new_empty(length, *x.shape[1:])


@opaque_op("pwtest::write", mutates=("cache",))
def write(x: Tensor, cache: Tensor) -> None:
    cache.copy_(x)


@opaque_op("pwtest::halves")
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[0] // 2
    return x[:half].clone(), x[half:].clone()


@halves.fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[0] // 2
    return x.new_empty(half), x.new_empty(x.shape[0] - half)


@opaque_op("pwtest::total")
def total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


@total.fake
def _(parts: list[Tensor]) -> Tensor:
    return torch.empty_like(parts[0])


@opaque_op("pwtest::keyword")
def keyword(x: Tensor, *, layer: str) -> Tensor:
    return x * len(layer)


@keyword.fake
def _(x: Tensor, *, layer: str) -> Tensor:
    return torch.empty_like(x)


@opaque_op("pwtest::scaled")
def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


@scaled.fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@opaque_op("pwtest::count_up", mutates=("state",))
def count_up(state: Tensor) -> int:
    state.add_(1)
    return 7


@count_up.fake
def _(state: Tensor) -> int:
    return torch.library.get_ctx().new_dynamic_size()
