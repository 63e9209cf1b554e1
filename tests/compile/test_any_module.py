"""`piecework.compile` with native code: an MLP with few outputs, an encoder, and an opaque op in between."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import piecework


class Encoder(nn.Module):
    """A small bidirectional encoder with a batch and a length that vary, and a dict for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([layer, nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)])
        self.head = nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        hidden = self.embed(ids) * scale
        for layer in self.layers:
            hidden = layer(hidden)
        return {"hidden": hidden, "scores": self.head(hidden.mean(dim=1))}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_an_mlp_with_few_outputs(
    tmp_path_factory: pytest.TempPathFactory, rows: int, mlp: tuple[nn.Module, Path]
) -> None:
    module, bundle = mlp
    model = piecework.load(bundle, weights=module)
    x = torch.randn(rows, 8)
    torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory, home: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)).eval().requires_grad_(False)
    out = tmp_path_factory.mktemp("mlp") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(home))
        piecework.compile(module, (torch.randn(3, 8),), dynamic={"rows": piecework.Dim(1, 64)}, out=out)
    return module, out


class Remembering(nn.Module):
    """Another way below 16 rows, a cache of its own, a count that it returns, and norms in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norms = nn.ModuleList(nn.BatchNorm1d(32) for _ in range(3))
        self.register_buffer("keys", torch.zeros(64, 32), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, *places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        for place in places:
            self.keys.index_copy_(0, place, self.k(x))
        self.count = self.count + x.shape[0]
        x = (self.q(x) @ self.keys.T).softmax(-1) @ self.keys + x
        for norm in self.norms:
            x = x + norm(x)
        return x.tanh() if x.shape[0] < 16 else x.sin(), self.count, 2 * x.shape[0]


@pytest.mark.slow
def test_parts_of_a_range_and_buffers_that_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Remembering().train().requires_grad_(False)
    alone = copy.deepcopy(module)
    example, sizes = (torch.randn(5, 32), torch.arange(5)), {"rows": piecework.Dim(2, 64)}
    bundle = piecework.compile(module, example, dynamic=sizes, out=tmp_path / "b", check=True)
    assert "checked against the module at rows = 2; rows = 15; rows = 16; rows = 64" in bundle.record().notes
    model = piecework.load(bundle, weights=module)
    for rows in (5, 16, 2, 64, 15):
        given = torch.randn(rows, 32), torch.randperm(64)[:rows]
        found, expected = model(*given), alone(*given)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
        assert (int(found[1]), found[2]) == (int(expected[1]), expected[2])
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_encoder_with_two_dynamic_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Encoder().eval().requires_grad_(False)
    # Inductor's code for this module does not hold for a batch of 1: the first size's range is split there
    sizes = {
        "batch": piecework.Dim(1, 8, axes={"ids": 0}),
        "length": piecework.Dim(1, 40, axes={"ids": 1}),
    }
    ids = torch.randint(0, 50, (3, 5))
    bundle = piecework.compile(module, (ids,), {"scale": 0.5}, dynamic=sizes, out=tmp_path / "encoder.pwb")
    model = piecework.load(bundle, weights=module.state_dict())
    for batch, length in ((1, 1), (3, 5), (8, 40), (1, 40), (8, 1)):
        given = torch.randint(0, 50, (batch, length))
        expected = module(given, scale=0.5)
        found = model(given, scale=0.5)
        assert list(found) == ["hidden", "scores"]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    with pytest.raises(piecework.ShapeContractError):
        model(torch.zeros((1, 41), dtype=torch.int64), scale=0.5)
