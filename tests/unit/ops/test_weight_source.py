"""Weights made of checkpoint tensors: shapes, names, JSON, and the values that loading makes of them."""

from __future__ import annotations

import json

import pytest
import torch

from piecework.bundle.plan import Recipe
from piecework.bundle.recipes import (
    Concat,
    HeadProduct,
    HeadRows,
    Source,
    Stack,
    Take,
    label,
    renamed,
    resolved,
    source_from_json,
    source_to_json,
    takes,
)
from piecework.bundle.run.constants import as_source, make_constants
from piecework.errors import WeightsError

A, B = torch.arange(12.0).view(4, 3), 100 + torch.arange(6.0).view(2, 3)
EXPERTS = {f"e.{n}.{part}": torch.randn(2, 3) for n in range(3) for part in ("gate", "up")}
C = torch.arange(20.0).view(5, 4) - 7
TENSORS = {"l.0.a": A, "l.0.b": B, "l.0.c": C, **EXPERTS}
TAKE_A, TAKE_B, TAKE_C = Take("l.0.a", (4, 3)), Take("l.0.b", (2, 3)), Take("l.0.c", (5, 4))
EXPERT = Concat((Take("e.*.gate", (2, 3)), Take("e.*.up", (2, 3))))
CASES: list[tuple[Source, torch.Tensor, str]] = [
    (TAKE_A, A, "l.0.a"),
    (Concat((TAKE_A, TAKE_B)), torch.cat([A, B]), "l.0.a + b"),
    (
        Stack(EXPERT, 3),
        torch.stack([torch.cat([EXPERTS[f"e.{n}.gate"], EXPERTS[f"e.{n}.up"]]) for n in range(3)]),
        "e.*.gate + up[0:3]",
    ),
    (HeadRows(TAKE_A, 2, 1, 2), A.view(2, 2, 3)[:, 1:2], "l.0.a[2 heads, 1:2]"),
    (HeadRows(TAKE_A, 2, 0, 2, transpose=True), A.view(2, 2, 3).transpose(1, 2), "l.0.a[2 heads, 0:2]"),
    (
        HeadProduct(TAKE_C, HeadRows(TAKE_A, 2, 0, 2), 2),
        torch.einsum("xhv,hvl->xhl", C.view(5, 2, 2), A.view(2, 2, 3)).flatten(1),
        "l.0.c * a[2 heads, 0:2]",
    ),
    (
        Concat((HeadRows(TAKE_A, 2, 1, 2), HeadRows(TAKE_B, 1, 0, 1))),
        torch.cat([A.view(2, 2, 3)[:, 1:], B[None, :1]]),
        "",
    ),
]


@pytest.mark.parametrize(("source", "expected", "name"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_makes_it(source: Source, expected: torch.Tensor, name: str, dtype: str) -> None:
    assert source.shape == expected.shape
    recipe = Recipe(label(source), source.shape, dtype, source=source)
    (made,) = make_constants([recipe], source=as_source(TENSORS), literals={}, device="cpu")
    assert made.is_contiguous()
    assert torch.equal(made, expected.to(getattr(torch, dtype)))
    assert source_from_json(json.loads(json.dumps(source_to_json(source)))) == source
    if name:
        assert label(source) == name


def test_a_stacks_tensors_are_numbered() -> None:
    assert [take.name for take in takes(Stack(EXPERT, 2))] == ["e.0.gate", "e.0.up", "e.1.gate", "e.1.up"]


def test_a_stack_is_taken_where_the_checkpoint_has_it_as_a_whole() -> None:
    stack = Stack(EXPERT, 3, whole="e.all")
    recipe = Recipe(label(stack), stack.shape, "float32", source=stack)
    assert source_from_json(json.loads(json.dumps(source_to_json(stack)))) == stack
    apart = torch.stack([torch.cat([EXPERTS[f"e.{n}.gate"], EXPERTS[f"e.{n}.up"]]) for n in range(3)])
    (made,) = make_constants([recipe], source=as_source(TENSORS), literals={}, device="cpu")
    assert torch.equal(made, apart)
    whole = torch.randn(3, 4, 3)
    (made,) = make_constants([recipe], source=as_source({"e.all": whole}), literals={}, device="cpu")
    assert made.data_ptr() == whole.data_ptr()
    with pytest.raises(WeightsError, match=r"e\.all"):
        make_constants([recipe], source=as_source({"e.all": whole[:2]}), literals={}, device="cpu")
    with pytest.raises(WeightsError, match=r"e\.0\.gate"):
        make_constants([recipe], source=as_source({"e.other": whole}), literals={}, device="cpu")
    inside = Concat((renamed(stack, lambda name: "x." + name), stack))
    assert [take.name for take in takes(resolved(inside, {"x.e.all", "e"}))][:2] == ["x.e.all", "e.0.gate"]


def test_a_tensor_of_another_shape_is_refused() -> None:
    recipe = Recipe("x", (6, 3), "float32", source=Concat((TAKE_B, Take("l.0.a", (4, 3)))))
    with pytest.raises(WeightsError, match=r"l\.0\.a"):
        make_constants([recipe], source=as_source({**TENSORS, "l.0.a": B}), literals={}, device="cpu")


@pytest.mark.parametrize(
    "data", [["other", 1], ["take", "a"], ["concat"], ["stack", ["take", "a", [1]]], [], ["take", "a", [-1]]]
)
def test_what_is_no_source_is_refused(data: object) -> None:
    with pytest.raises((ValueError, TypeError, IndexError)):
        source_from_json(data)
