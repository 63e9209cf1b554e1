"""Products of heads with matrices of their own, compiled into a piece, against torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.bundle import open_bundle
from piecework.bundle.run import LoadedModel
from piecework.ops.head_matmul import head_matmul, head_matmul_native
from tests.choice import slow_but

HEADS, DEPTH = 3, 70
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
TOKENS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 23, 40]


class Products(nn.Module):
    """Two products: of rows that lie apart, and of what comes out of that; the second is no whole block wide."""

    def __init__(self, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(HEADS, DEPTH, 96, dtype=dtype) / DEPTH**0.5)
        self.second = nn.Parameter(torch.randn(HEADS, 96, 20, dtype=dtype) / 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, HEADS, DEPTH + 2]."""
        made = head_matmul(x[:, :, 1:-1], self.first)
        return made, head_matmul(made, self.second).flatten(1)


class Apart(nn.Module):
    """A product of rows whose elements lie apart."""

    def __init__(self, first: nn.Parameter) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, DEPTH, HEADS]."""
        return head_matmul(x.transpose(1, 2), self.first)


@pytest.fixture(scope="module", params=slow_but(TOLERANCES), ids=str)
def products(request: pytest.FixtureRequest) -> Products:
    torch.manual_seed(0)
    return Products(dtype=request.param).requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def bundle(products: Products, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("products") / "bundle"
    x = torch.randn(6, HEADS, DEPTH + 2, dtype=products.first.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(home))
        piecework.compile(products, (x,), dynamic={"tokens": piecework.Dim(0, 64)}, out=out)
    return out


@pytest.fixture(scope="module")
def model(products: Products, bundle: Path) -> LoadedModel:
    return piecework.load(bundle, weights=products)


def test_matrices_of_whole_blocks_are_packed_at_load(model: LoadedModel) -> None:
    packing = {recipe.name: recipe.pack for recipe in model.plan.recipes}
    assert packing == {"first": "head_columns", "second": ""}


def test_the_piece_has_the_code(bundle: Path) -> None:
    (library,) = bundle.rglob("*.so")
    assert b"aoti_torch_cpu_head_matmul_cpu" in library.read_bytes()
    facts = {fact.name.rpartition("/")[2] for fact in open_bundle(bundle).facts if fact.kind == "source"}
    assert {"products.h", "products_shim.h", "lanes.h", "elements.h", "vectors.h"} <= facts


@pytest.mark.parametrize("tokens", TOKENS)
def test_products_are_those_of_torch(products: Products, model: LoadedModel, tokens: int) -> None:
    dtype = products.first.dtype
    x = torch.randn(tokens, HEADS, DEPTH + 2, dtype=dtype)
    first, second = model(x)
    wanted = head_matmul_native(x[:, :, 1:-1].double(), products.first.double())
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(first.double(), wanted, rtol=tolerance, atol=tolerance)
    wanted = head_matmul_native(first.double(), products.second.double()).flatten(1)
    torch.testing.assert_close(second.double(), wanted, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.slow
def test_elements_of_a_row_may_lie_apart(products: Products, home: Path, tmp_path: Path) -> None:
    module, dtype = Apart(products.first), products.first.dtype
    x = torch.randn(11, DEPTH, HEADS, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(home))
        piecework.compile(module, (x,), dynamic={"tokens": piecework.Dim(1, 64)}, out=tmp_path / "bundle")
    made = piecework.load(tmp_path / "bundle", weights=module)(x)
    wanted = head_matmul_native(x.transpose(1, 2).double(), products.first.double())
    torch.testing.assert_close(made.double(), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_a_number_that_is_none_stays_in_its_token(products: Products, model: LoadedModel) -> None:
    x = torch.zeros(9, HEADS, DEPTH + 2, dtype=products.first.dtype)
    x[4, 1, 5] = float("nan")
    first, _ = model(x)
    assert first[4, 1].isnan().all()
    first[4, 1] = 0
    assert not first.any()
