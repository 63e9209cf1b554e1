"""Linear layers of a model become layers on `piecework::linear_quantized`, where its weights are quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from piecework.bundle.quantized_layouts import LAYOUTS, Layout, Part, Sizes
from piecework.bundle.recipes import Quantized, Source, Take
from piecework.errors import UnsupportedModelError
from piecework.models.adapted import AdaptedModel
from piecework.ops import linear_quantized as _op  # noqa: F401  registers piecework::linear_quantized
from piecework.spec.quantization import Quantization


def with_quantized_weights(model: AdaptedModel, how: Quantization) -> AdaptedModel:
    """Put a model's linear layers on quantized weights, and say how these are made; its module is changed.

    Raises UnsupportedModelError where a quantized checkpoint has more than linear layers to quantize.
    """
    sources = dict(model.sources)
    owners = {id(p): name for name, p in model.module.named_parameters()}
    modules = model.module.named_modules(remove_duplicate=False)
    layers = [(name, part) for name, part in modules if type(part) is nn.Linear]
    made: dict[nn.Linear, QuantizedLinear] = {}
    for name, layer in layers:
        chosen = how.of(name, layer.out_features, layer.in_features)
        if chosen is not None and layer not in made:
            layout, sizes = chosen
            # of a head that is the embedding, the latter's name
            weight = owners[id(layer.weight)]
            taken = sources.get(weight, Take(weight, (sizes.rows, sizes.columns)))
            parts = _parts(taken, LAYOUTS[layout], sizes, name=name)
            sources.pop(f"{name}.weight", None)
            sources |= {
                f"{name}.{part.value}": Quantized(layout, part, sizes, parts)
                for part in Part
                if part is not Part.OFFSETS or LAYOUTS[layout].has_offsets
            }
            made[layer] = QuantizedLinear(layer, layout, sizes)
        if layer in made:  # which several blocks may share
            parent, _, last = name.rpartition(".")
            setattr(model.module.get_submodule(parent), last, made[layer])
    num_layers = len({layer for _, layer in layers})
    notes = (*model.notes, f"{len(made)} of {num_layers} linear layers have quantized weights ({how.layout})")
    return replace(model, sources=sources, notes=(*notes, *_experts(model.module, how)))


@final
class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight; all parameters are on the meta device.

    Args:
        layer: whose place it takes.
        layout: of its weight, one of LAYOUTS.
        sizes: of its weight.
    """

    values: Tensor
    scales: Tensor
    offsets: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, layout: str, sizes: Sizes) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        kept = LAYOUTS[layout]
        for part in Part:
            made = None
            if part is not Part.OFFSETS or kept.has_offsets:
                shape, dtype = kept.shape(part, sizes), getattr(torch, kept.dtype(part))
                made = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
            self.register_parameter(part.value, made)
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's result [..., out] of x [..., in], in x's type."""
        made: Tensor = torch.ops.piecework.linear_quantized(x, self.values, self.scales, self.offsets, self.bias)
        return made


def _parts(taken: Source, layout: Layout, sizes: Sizes, *, name: str) -> tuple[Source, ...]:
    """Return what a layout's tensors are made of, for a layer whose weight would be `taken` of a usual checkpoint."""
    if [stored.suffix for stored in layout.tensors] == ["weight"]:
        return (taken,)
    if not isinstance(taken, Take):
        raise UnsupportedModelError(
            asked=f"the quantized weight of {name}",
            found="a weight that is made of several tensors of the checkpoint",
            try_="the checkpoint that it was quantized from, with --weights-dtype",
        )
    stem = taken.name.removesuffix("weight")
    return tuple(Take(f"{stem}{stored.suffix}", stored.shape(sizes)) for stored in layout.tensors)


def _experts(module: nn.Module, how: Quantization) -> tuple[str, ...]:
    """Return a note where a model has stacked experts, which keep their type; of a quantized checkpoint an error."""
    stacked = [name for name, p in module.named_parameters() if p.dim() == 3 and "expert" in name]
    if stacked and how.stored:
        raise UnsupportedModelError(
            asked="a quantized checkpoint of a model with experts",
            found=f"{stacked[0]}, which is no linear layer's weight",
            try_="the checkpoint that it was quantized from; --weights-dtype leaves experts as they are",
        )
    return (f"experts' weights ({len(stacked)}) are not quantized",) if stacked else ()
