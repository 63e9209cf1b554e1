"""Linear layers with code of ours, compiled into a piece, against torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.run import LoadedModel
from tests.choice import slow_but

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TOKENS = [0, 1, 2, 3, 4, 7, 8, 9, 15, 40, 260, 700]  # several tiles, and several chunks of tokens
WIDTH = 70


class Layers(nn.Module):
    """Layers with and without a bias: of rows that lie together, apart, and turned about; one that does not fit."""

    def __init__(self, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 96, dtype=dtype)
        self.second = nn.Linear(96, 160, bias=False, dtype=dtype)
        self.odd = nn.Linear(160, 20, dtype=dtype)
        self.turned = nn.Linear(4, 32, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [T, WIDTH + 2]."""
        first = self.first(x[:, 1:-1])
        second = self.second(first)
        by_row = x[:, :8].unflatten(1, (4, 2))  # [T, 4, 2], of rows that are WIDTH + 2 apart
        turned = self.turned(by_row.transpose(1, 2))
        return first, second, self.odd(second), turned, self.turned(x[:, 8:24].unflatten(1, (4, 4)))


@pytest.fixture(scope="module", params=slow_but(TOLERANCES), ids=str)
def layers(request: pytest.FixtureRequest) -> Layers:
    torch.manual_seed(0)
    return Layers(dtype=request.param).requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def model(layers: Layers, home: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    out = tmp_path_factory.mktemp("layers") / "bundle"
    x = torch.randn(6, WIDTH + 2, dtype=layers.first.weight.dtype)
    options = piecework.CompileOptions(pack_linear="own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(home))
        piecework.compile(layers, (x,), dynamic={"tokens": piecework.Dim(0, 1024)}, out=out, options=options)
    return piecework.load(out, weights=layers)


def test_weights_are_packed_at_load(model: LoadedModel) -> None:
    packing = {recipe.name: recipe.pack for recipe in model.plan.recipes if recipe.pack != "mkldnn_linear"}
    assert {name for name, how in packing.items() if how == "linear_columns"} == {
        "first.weight",
        "second.weight",
        "turned.weight",
    }


@pytest.mark.parametrize("tokens", TOKENS)
def test_layers_give_what_torchs_do(layers: Layers, model: LoadedModel, tokens: int) -> None:
    dtype = layers.first.weight.dtype
    x = torch.randn(tokens, WIDTH + 2, dtype=dtype)
    found = model(x)
    exact = Layers(dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in layers.state_dict().items()})
    wanted = list(exact(x.double()))
    wanted[1] = exact.second(found[0].double())  # of what the layer before it gave, rounded
    wanted[2] = exact.odd(found[1].double())
    for one, other in zip(found, wanted, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCES[dtype], atol=2 * TOLERANCES[dtype])


def test_a_tokens_results_are_the_same_bits_in_every_batch(layers: Layers, model: LoadedModel) -> None:
    x = torch.randn(300, WIDTH + 2, dtype=layers.first.weight.dtype)
    together = model(x)
    for token in (0, 5, 7, 8, 150, 257, 299):
        alone = model(x[token : token + 1])
        for i in (0, 1, 3, 4):  # those with code of ours
            assert torch.equal(alone[i][0], together[i][token])


def test_a_number_that_is_none_stays_in_its_token(layers: Layers, model: LoadedModel) -> None:
    x = torch.zeros(9, WIDTH + 2, dtype=layers.first.weight.dtype)
    x[4, 5] = float("nan")
    first = model(x)[0]
    assert first[4].isnan().all()
    assert first[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
