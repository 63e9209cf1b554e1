"""A diffusion transformer of diffusers with random weights, from the process's start to its first result; then steps.

`piecework` is `piecework.compile` and `piecework.load`; with `--warm` only the load of the bundle in `--bundle`.
`piecework_blocks` is `compile_repeated_blocks(backend="piecework", fullgraph=True)`, `inductor_blocks` the same with
torch's Inductor, `torch_compile` is `torch.compile` of the whole, `eager` neither. With `--dynamic` the number of image
and of text tokens vary, else all sizes are fixed. A step is one forward, as a pipeline does for every step of its
schedule.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

WAYS = ("piecework", "piecework_blocks", "inductor_blocks", "torch_compile", "eager")
MODELS = ("flux", "sd3")
_WIDTH = 256
_TEXTS = 64
_IMAGE = 16
"""Height and width of the image in latents, or in patches of them."""


@dataclass(frozen=True)
class Model:
    """A model, the arguments of a step, and the axes of those that vary, by size."""

    module: nn.Module
    inputs: Mapping[str, torch.Tensor]
    axes: Mapping[str, Mapping[str, int]]


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="blocks; Flux has two single ones for each")
    parser.add_argument("--dynamic", action="store_true", help="sizes vary")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="where piecework's bundle is")
    parser.add_argument("--warm", action="store_true", help="the bundle is there already")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="least steps to time (default: 0, none)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="least seconds of steps (default: 1)")
    args = parser.parse_args()
    from benchmarks.common.steps import emit  # `--help` needs no torch

    emit(measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, run it once, and time steps."""
    import torch

    from benchmarks.common.steps import time_steps
    from piecework.foundation.process import seconds_since_start

    with torch.no_grad():
        model = make_model(args.model, args.layers)
        built_s = seconds_since_start()
        counts: dict[str, int] = {}
        call = _piecework(args, model, counts) if args.way == "piecework" else _torch(args, model)
        result = call(**model.inputs, return_dict=False)[0]
        result.sum().item()
        first_s = seconds_since_start()
        error = (result - make_model(args.model, args.layers).module(**model.inputs, return_dict=False)[0]).abs().max()
        figures = {"built_s": round(built_s, 3), "first_s": round(first_s, 3), "error": float(error), **counts}
        if args.steps:
            step = [lambda: call(**model.inputs, return_dict=False)]
            (times,) = time_steps(step, least_steps=args.steps, least_seconds=args.seconds)
            figures |= times.to_json()
    return figures


def make_model(name: str, layers: int) -> Model:
    """Return a model with hidden size 256, in float32."""
    import torch

    torch.manual_seed(0)
    model = {"flux": _flux, "sd3": _sd3}[name](layers)
    model.module.eval().requires_grad_(requires_grad=False)
    return model


def _flux(layers: int) -> Model:
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=2 * layers,
        attention_head_dim=64,
        num_attention_heads=_WIDTH // 64,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    rows = torch.arange(_IMAGE**2)
    inputs = {
        "hidden_states": torch.randn(1, _IMAGE**2, 64),
        "encoder_hidden_states": torch.randn(1, _TEXTS, _WIDTH),
        "pooled_projections": torch.randn(1, _WIDTH),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.stack([rows * 0, rows // _IMAGE, rows % _IMAGE], dim=1).float(),
        "txt_ids": torch.zeros(_TEXTS, 3),
        "guidance": torch.full((1,), 3.5),
    }
    axes = {"image": {"hidden_states": 1, "img_ids": 0}, "texts": {"encoder_hidden_states": 1, "txt_ids": 0}}
    return Model(module, inputs, axes)


def _sd3(layers: int) -> Model:
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=2 * _IMAGE,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=_WIDTH // 64,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        out_channels=16,
        pos_embed_max_size=2 * _IMAGE,
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 2 * _IMAGE, 2 * _IMAGE),
        "encoder_hidden_states": torch.randn(1, _TEXTS, _WIDTH),
        "pooled_projections": torch.randn(1, _WIDTH),
        "timestep": torch.full((1,), 500.0),
    }
    return Model(module, inputs, {"texts": {"encoder_hidden_states": 1}})


def _piecework(args: argparse.Namespace, model: Model, counts: dict[str, int]) -> Callable[..., Any]:
    import piecework

    if not args.warm:
        sizes = {name: piecework.Dim(1, 1024, axes=axes) for name, axes in model.axes.items()} if args.dynamic else {}
        kwargs = {**model.inputs, "return_dict": False}
        made = piecework.compile(model.module, (), kwargs, dynamic=sizes, out=args.bundle)
        counts |= {name: made.record().counts[name] for name in ("pieces", "unique_pieces")}
    return piecework.load(args.bundle, weights=model.module)


def _torch(args: argparse.Namespace, model: Model) -> Callable[..., Any]:
    import torch

    module: Any = model.module
    if args.way == "eager":
        return model.module
    if args.way == "torch_compile":
        compiled: Callable[..., Any] = torch.compile(module, fullgraph=True, dynamic=args.dynamic)
        return compiled
    backend = "piecework" if args.way == "piecework_blocks" else "inductor"
    if args.model == "sd3":  # which declares no blocks: what `compile_repeated_blocks` does, by hand
        for block in module.transformer_blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=args.dynamic)
    else:
        module.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=args.dynamic)
    return model.module


if __name__ == "__main__":
    main()
