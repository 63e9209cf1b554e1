"""Unmodified models of diffusers: results, no more pieces for more blocks, and an image of a whole pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.record import Recorder
from piecework.spec.compile_options import BackendName, CompileOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*", "ignore::DeprecationWarning:diffusers.*"),
]

EAGER = CompileOptions(backend=BackendName.EAGER)
EXAMPLE = Path(__file__).parents[2] / "examples" / "flux_blocks.py"


def flux(blocks: int) -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=blocks,
        num_single_layers=blocks + 1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def sd3(blocks: int) -> nn.Module:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=blocks,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )


def flux_inputs(*, image: int, texts: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, image, 16),
        "encoder_hidden_states": torch.randn(1, texts, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.rand(1),
        "img_ids": torch.arange(3 * image).reshape(image, 3).float(),
        "txt_ids": torch.zeros(texts, 3),
        "return_dict": False,
    }


def sd3_inputs(*, texts: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "encoder_hidden_states": torch.randn(1, texts, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.rand(1) * 1000,
        "return_dict": False,
    }


def made(make: Callable[[int], nn.Module], blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return make(blocks).eval().requires_grad_(False)


@torch.no_grad()
def same(found: Any, module: nn.Module, given: dict[str, Any]) -> None:
    torch.testing.assert_close(found[0], module(**given)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("blocks", "unique"), [(2, 8), (4, 8)])
def test_flux_has_no_more_pieces_for_more_blocks(blocks: int, unique: int, tmp_path: Path) -> None:
    module = made(flux, blocks)
    sizes = {
        "image": piecework.Dim(1, 64, axes={"hidden_states": 1, "img_ids": 0}),
        "texts": piecework.Dim(1, 32, axes={"encoder_hidden_states": 1, "txt_ids": 0}),
    }
    given = flux_inputs(image=16, texts=8)
    bundle = piecework.compile(module, (), given, dynamic=sizes, options=EAGER, out=tmp_path / "b")
    assert bundle.record().counts["unique_pieces"] == unique
    model = piecework.load(bundle, weights=module)
    for image, texts in ((1, 1), (16, 8), (64, 32), (9, 1)):
        given = flux_inputs(image=image, texts=texts)
        same(model(**given), module, given)


@pytest.mark.parametrize("make", [flux, sd3])  # of Flux, a graph that takes a difference of sizes is left to Inductor
def test_whole_with_torch_compile(make: Callable[[int], nn.Module]) -> None:
    module, recorder = made(make, 2), Recorder()
    inputs = [flux_inputs(image=n, texts=m) if make is flux else sd3_inputs(texts=m) for n, m in ((16, 8), (25, 5))]
    options = {"backend": "eager", "recorder": recorder}
    torch._dynamo.reset()
    run = torch.compile(module, backend="piecework", fullgraph=True, dynamic=True, options=options)
    with torch.no_grad():
        for given in inputs:
            same(run(**given), module, given)
    assert make is flux or recorder.finish().notes == ()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flux_blocks", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(example: ModuleType, **options: Any) -> list[Tensor]:
    """Draw images of two sizes and lengths, with the repeated blocks compiled where options are given."""
    torch._dynamo.reset()
    pipeline = example.make_pipeline()
    if options:
        pipeline.transformer.compile_repeated_blocks(backend="piecework", fullgraph=True, **options)
    return [example.draw(pipeline, size=size, texts=texts) for size, texts in ((32, 8), (64, 5))]


def test_the_examples_image_of_other_sizes(example: ModuleType) -> None:
    recorder = Recorder()
    found = images(example, dynamic=True, options={"backend": "eager", "recorder": recorder})
    torch.testing.assert_close(found, images(example), rtol=1e-3, atol=1e-4)
    assert recorder.finish().notes == ()  # sizes that are sums, of texts and image, are no reason to leave it


def test_the_examples_image_with_native_code(example: ModuleType) -> None:
    torch.testing.assert_close(images(example, dynamic=True), images(example), rtol=1e-3, atol=1e-4)
