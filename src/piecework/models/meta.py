"""Modules whose parameters take no memory: they are made on the meta device, while computed buffers stay real."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Put every parameter that is registered inside on the meta device; buffers stay real."""
    original = nn.Module.register_parameter
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if id(param) not in made:
                meta = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
                made[id(param)] = (param, meta)  # the original is kept, so that its id isn't used again
            param = made[id(param)][1]
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
