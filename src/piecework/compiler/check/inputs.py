"""At which sizes and on which inputs a module and what was compiled of it are run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from piecework.bundle.check_plan import forms
from piecework.bundle.run.sample_sizes import sample_sizes
from piecework.capture.capture import CapturedGraph
from piecework.capture.request import CaptureRequest, SizeInput, TensorInput
from piecework.compiler.driver import Built
from piecework.foundation.torch_private import size_at

_MOST_BYTES: Final = 64 << 20
"""Of the greatest tensor that a forward makes."""

_SEED: Final = 20


def points(built: Built) -> Iterator[Mapping[str, int]]:
    """Yield the ends of the sizes' ranges, of each forward and each range of artifacts; too great ones made smaller."""
    plan, seen = built.plan, list[Mapping[str, int]]()
    for bounds in forms(plan):
        for path, forward in zip(plan.forwards, built.paths, strict=True):
            ends = sample_sizes(plan, path, bounds=bounds, seed="")[:2]
            for end in ends:
                fits = _smaller(forward.captured, ends[0], end)
                if fits not in seen:
                    seen.append(fits)
                    yield fits


def _smaller(captured: CapturedGraph, low: Mapping[str, int], high: Mapping[str, int]) -> Mapping[str, int]:
    """Return sizes from `low` to `high` whose tensors are not too large."""
    while high != low and _greatest_bytes(captured, high) > _MOST_BYTES:
        high = {name: low[name] + (value - low[name]) // 2 for name, value in high.items()}
    return high


def _greatest_bytes(captured: CapturedGraph, sizes: Mapping[str, int]) -> int:
    named = {symbol: sizes[name] for symbol, name in captured.size_names.items() if name in sizes}
    found = 0
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            found = max(found, value.element_size() * math.prod(size_at(d, named) for d in value.shape))
    return found


def random_inputs(request: CaptureRequest, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return random named inputs of some sizes."""
    generator = torch.Generator().manual_seed(_SEED)
    return {i.name: _input(i, request.values.get(i.name), sizes, generator) for i in request.inputs}


def _input(
    given: TensorInput | SizeInput, example: Tensor | None, sizes: Mapping[str, int], generator: torch.Generator
) -> Tensor | int:
    """Return a random value of an input: numbers spread as the example's, whole ones that it has somewhere."""
    if isinstance(given, SizeInput):
        return sizes[given.size]
    shape, dtype = [sizes[d] if isinstance(d, str) else d for d in given.shape], getattr(torch, given.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        if example is not None and example.numel() > 1:
            known = example.detach().to("cpu", made.dtype)
            made = made * known.std() + known.mean()
    elif example is not None and example.numel():
        made = example.cpu().flatten()[torch.randint(example.numel(), shape, generator=generator)]
    else:
        made = torch.zeros(shape)
    made = made.to(given.device, dtype)
    if given.stride is None:
        return made
    return torch.empty_strided(shape, given.stride, dtype=dtype, device=given.device).copy_(made)
