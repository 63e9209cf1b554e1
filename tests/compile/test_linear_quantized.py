"""Linear layers with quantized weights, compiled into a piece, against the op's own definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.quantized_layouts import Part, Sizes
from piecework.bundle.recipes import Quantized
from piecework.bundle.run import LoadedModel
from piecework.bundle.run.quantized import quantized_part
from piecework.ops.linear_quantized import dequantized
from tests.choice import slow_but

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
TOKENS = [0, 1, 2, 3, 4, 7, 8, 9, 15, 33, 40, 260, 600]  # several tiles, and several chunks of tokens
WIDTH = 64


class Layer(nn.Module):
    """A layer whose weight is quantized; x: [..., columns]."""

    def __init__(self, layout: str, *sizes: int, offsets: bool = False, bias: torch.dtype | None = None) -> None:
        super().__init__()
        shape = Sizes(*sizes)
        weight = torch.randn(shape.rows, shape.columns) / 8
        self.values, self.scales = (
            nn.Parameter(quantized_part(Quantized(layout, part, shape, ()), [weight]), requires_grad=False)
            for part in (Part.VALUES, Part.SCALES)
        )
        self.register_parameter("offsets", _parameter(torch.randn_like(self.scales) / 20) if offsets else None)
        self.register_parameter("bias", _parameter(torch.randn(shape.rows, dtype=bias)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.piecework.linear_quantized(x, self.values, self.scales, self.offsets, self.bias)
        return made


class Layers(nn.Module):
    """Layers of all types of values: by row and by group, with offsets or not; the last one doesn't fit in blocks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                Layer("int8", 64, WIDTH, WIDTH),
                Layer("int8", 96, WIDTH, 32, bias=dtype),
                Layer("int4", 64, WIDTH, 32, offsets=True),
                Layer("int4", 32, WIDTH, WIDTH, offsets=True, bias=dtype),
                Layer("fp8", 64, WIDTH, WIDTH),
                Layer("int4", 32, 24, 8),
                Layer("int8", 20, WIDTH, WIDTH),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: [T, WIDTH + 2], whose rows are taken apart."""
        return [layer(x[:, 1 : 1 + _columns(layer)]) for layer in self.layers]


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _columns(layer: nn.Module) -> int:
    values = layer.values
    assert isinstance(values, Tensor)
    return values.shape[1] * (8 if values.dtype is torch.int32 else 1)


@pytest.fixture(scope="module", params=slow_but(TOLERANCES, torch.bfloat16), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(scope="module")
def layers(dtype: torch.dtype) -> Layers:
    torch.manual_seed(0)
    return Layers(dtype)


@pytest.fixture(scope="module")
def model(layers: Layers, dtype: torch.dtype, home: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    out = tmp_path_factory.mktemp("quantized") / "bundle"
    x = torch.randn(6, WIDTH + 2, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(home))
        piecework.compile(layers, (x,), dynamic={"tokens": piecework.Dim(0, 1024)}, out=out)
    return piecework.load(out, weights=layers)


def test_values_scales_and_offsets_are_packed_where_they_fit(model: LoadedModel) -> None:
    packed = {recipe.name for recipe in model.plan.recipes if recipe.pack == "linear_columns"}
    assert {f"layers.{n}.{name}" for n in range(6) for name in ("values", "scales")} <= packed
    assert "layers.2.offsets" in packed
    assert not any(name.startswith("layers.6") or name.endswith("bias") for name in packed)


@pytest.mark.parametrize("tokens", TOKENS)
def test_layers_give_what_the_dequantized_weights_do(
    layers: Layers, model: LoadedModel, dtype: torch.dtype, tokens: int
) -> None:
    x = torch.randn(tokens, WIDTH + 2, dtype=dtype)
    for layer, found in zip(layers.layers, model(x), strict=True):
        assert isinstance(layer, Layer)
        weight = dequantized(layer.values, layer.scales, layer.offsets).double()
        bias = None if layer.bias is None else layer.bias.double()
        wanted = nn.functional.linear(x[:, 1 : 1 + _columns(layer)].double(), weight, bias)
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCES[dtype], atol=2 * TOLERANCES[dtype])


def test_a_tokens_results_are_the_same_bits_in_every_small_batch(model: LoadedModel, dtype: torch.dtype) -> None:
    """Matrix units, which larger batches go to where there are some, round otherwise."""
    x = torch.randn(7, WIDTH + 2, dtype=dtype)
    together = model(x)
    for token in range(7):
        for alone, all_of in zip(model(x[token : token + 1])[:6], together[:6], strict=True):
            assert torch.equal(alone[0], all_of[token])


def test_a_number_that_is_none_stays_in_its_token(model: LoadedModel, dtype: torch.dtype) -> None:
    x = torch.zeros(40, WIDTH + 2, dtype=dtype)
    x[3] = torch.nan
    for found in model(x):
        assert found[3].isnan().all()
        assert found[[0, 1, 2, *range(4, 40)]].isfinite().all()
