"""Execute a plan's recipes: from checkpoint tensors to the constants of instances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import torch
from torch import nn

from piecework.bundle.packings import HEAD_COLUMNS, LINEAR_COLUMNS, MKLDNN_LINEAR
from piecework.bundle.plan import Recipe
from piecework.bundle.recipes import (
    Concat,
    HeadProduct,
    HeadRows,
    Quantized,
    Source,
    Stack,
    Take,
    numbered,
    resolved,
    takes,
)
from piecework.bundle.run.quantized import quantized_part
from piecework.errors import WeightsError
from piecework.foundation import torch_private
from piecework.ops.packed import packed_linear, packed_matrices

_PACKED: Final = {
    MKLDNN_LINEAR: torch_private.pack_linear_weight,
    LINEAR_COLUMNS: packed_linear,
    HEAD_COLUMNS: packed_matrices,
}


@runtime_checkable
class TensorSource(Protocol):
    """Anything that gives tensors by name; see models/checkpoint.py for safetensors."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor; raises WeightsError where there is none of that name."""


@dataclass(frozen=True)
class _Tensors:
    """A mapping of tensors as a source."""

    tensors: Mapping[str, torch.Tensor]

    def names(self) -> Iterable[str]:
        return self.tensors

    def get(self, name: str) -> torch.Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise WeightsError(
                asked=f"bind the weight {name}",
                found=f"it is not among the {len(self.tensors)} tensors given",
                try_="pass the weights of the model that was compiled",
            ) from None


def as_source(weights: object) -> TensorSource:
    """Return `weights` (a module, a mapping of tensors, or paths of safetensors files) as a source."""
    if isinstance(weights, nn.Module):
        tensors = {**dict(weights.named_parameters(remove_duplicate=False)), **dict(weights.named_buffers())}
        return _Tensors({n: t.detach() for n, t in tensors.items()})
    if isinstance(weights, Mapping):
        return _Tensors(weights)
    if isinstance(weights, (str, Path)):
        return _read_files([Path(weights)])
    if isinstance(weights, TensorSource):
        return weights
    if isinstance(weights, Sequence):
        return _read_files([Path(p) for p in weights])
    raise WeightsError(
        asked="bind weights to a bundle",
        found=f"a {type(weights).__name__}",
        try_="pass the module, a mapping of names to tensors, or paths of safetensors files",
    )


def _read_files(paths: Sequence[Path]) -> TensorSource:
    from safetensors import SafetensorError  # noqa: PLC0415  only where weights come from files
    from safetensors.torch import load_file  # noqa: PLC0415

    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            tensors.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                asked=f"read the weights in {path}", found=str(error), try_="check that the file is whole"
            ) from error
    return _Tensors(tensors)


def make_constants(
    recipes: Sequence[Recipe], *, source: TensorSource, literals: Mapping[str, torch.Tensor], device: str
) -> list[torch.Tensor]:
    """Return the tensor that each recipe makes: taken, checked, cast and moved, but not packed.

    Raises WeightsError where a tensor is missing or has another shape.
    """
    made = [None if r.source else _take(r, source=source, literals=literals, device=device) for r in recipes]
    composed = [i for i, r in enumerate(recipes) if r.source]
    names = frozenset(source.names()) if composed else frozenset()
    with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:
        found = pool.map(lambda i: _compose(recipes[i], source=source, names=names, device=device), composed)
        return [next(found) if tensor is None else tensor for tensor in made]


def pack_constants(recipes: Sequence[Recipe], constants: list[torch.Tensor]) -> None:
    """Replace, in `constants`, those whose recipe packs them by their packed form; in parallel."""
    packed = [i for i, r in enumerate(recipes) if r.pack]
    if packed:
        with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:
            for i, tensor in zip(packed, pool.map(lambda i: _pack(constants[i], recipes[i].pack), packed), strict=True):
                constants[i] = tensor


def _pack(weight: torch.Tensor, how: str) -> torch.Tensor:
    with torch.no_grad():
        return _PACKED[how](weight)


def _take(recipe: Recipe, *, source: TensorSource, literals: Mapping[str, torch.Tensor], device: str) -> torch.Tensor:
    tensor = literals[recipe.name] if recipe.literal else source.get(recipe.name)
    return _whole(tensor, recipe, name=recipe.name, device=device)


def _whole(tensor: torch.Tensor, recipe: Recipe, *, name: str, device: str) -> torch.Tensor:
    """Return a checkpoint's tensor as it is wanted, itself where it is so already."""
    _check(tensor, name=name, shape=recipe.shape)
    made: torch.Tensor = tensor.detach().to(device=device, dtype=getattr(torch, recipe.dtype))
    return made.contiguous()


def _check(tensor: torch.Tensor, *, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise WeightsError(
            asked=f"bind the weight {name} of shape {list(shape)}",
            found=f"a tensor of shape {list(tensor.shape)}",
            try_="pass the weights of the model that was compiled",
        )
    if tensor.is_meta:
        raise WeightsError(
            asked=f"bind the weight {name}",
            found="a tensor on the meta device, which has no values",
            try_="pass real weights",
        )


def _compose(recipe: Recipe, *, source: TensorSource, names: frozenset[str], device: str) -> torch.Tensor:
    """Make a constant of several tensors, or of a part of one, in one new tensor, where it isn't there as a whole."""
    assert recipe.source is not None
    what = resolved(recipe.source, names)
    if isinstance(what, Take):
        return _whole(source.get(what.name), recipe, name=what.name, device=device)
    for take in takes(what):  # what they are decides how much memory is taken for the whole
        _check(source.get(take.name), name=take.name, shape=take.shape)
    made = torch.empty(recipe.shape, dtype=getattr(torch, recipe.dtype), device=device)
    _fill(made, what, source)
    return made


def _fill(target: torch.Tensor, what: Source, source: TensorSource) -> None:
    match what:
        case Take():
            target.copy_(_taken(what, source))
        case Concat(parts):
            begin = 0
            for part in parts:
                _fill(target[begin : begin + part.shape[0]], part, source)
                begin += part.shape[0]
        case Stack(of, count):
            for number in range(count):
                _fill(target[number], numbered(of, number), source)
        case HeadRows(of, heads, begin, end, transpose):
            if isinstance(of, Take):
                whole = _taken(of, source)
            else:
                whole = torch.empty(of.shape, dtype=target.dtype, device=target.device)
                _fill(whole, of, source)
            rows = whole.unflatten(0, (heads, -1))[:, begin:end]
            target.copy_(rows.transpose(1, 2) if transpose else rows)
        case HeadProduct(left, right, heads):
            a, b = (torch.empty(part.shape, device=target.device) for part in (left, right))  # float32
            _fill(a, left, source)
            _fill(b, right, source)
            target.unflatten(1, (heads, -1)).copy_(
                torch.bmm(a.unflatten(1, (heads, -1)).transpose(0, 1), b).transpose(0, 1)
            )
        case Quantized(of=parts):
            target.copy_(quantized_part(what, [_whole_part(part, source, device=target.device) for part in parts]))


def _whole_part(part: Source, source: TensorSource, *, device: torch.device) -> torch.Tensor:
    """Return a tensor of a quantized weight's layout in the type that it is stored in, or a made one in float32."""
    if isinstance(part, Take):
        return _taken(part, source).to(device)
    made = torch.empty(part.shape, device=device)
    _fill(made, part, source)
    return made


def _taken(take: Take, source: TensorSource) -> torch.Tensor:
    tensor = source.get(take.name)
    _check(tensor, name=take.name, shape=take.shape)
    return tensor.detach()
