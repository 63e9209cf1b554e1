"""Arguments against schemas, and which operators say what they give without being run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from piecework.bundle.run.fake_ops import check_arguments, fake_op
from piecework.foundation.torch_private import find_overload
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.rows import ROWS_OP

X = torch.empty(2, 3, device="meta")


@opaque_op("pwfake::without")
def without(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("pwfake::torchs", mutates_args=())
def torchs(x: Tensor) -> Tensor:
    return x.clone()


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("aten::add.Tensor", [X, X], {"alpha": 2}),
        ("aten::cat", [[X, X], 1], {}),
        ("aten::to.dtype", [X, torch.float64], {}),
        ("aten::empty_like", [X], {"memory_format": torch.contiguous_format, "device": torch.device("meta")}),
        ("aten::clamp", [X, None, 1.5], {}),
        ("aten::clamp", [X, None, 1], {}),
        (ROWS_OP, [X, 0, 1], {}),
        ("piecework::kv_write", [X, X, LayerName("a")], {}),
    ],
)
def test_calls_that_fit(name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    check_arguments(find_overload(name), args, kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [([X, 0], {}), ([X, 0, 1, 2], {}), ([X, 0, 1.0], {}), ([X, True, 1], {}), ([X, 0, None], {}), ([[X], 0, 1], {}),
     ([X, 0, "1"], {}), ([X, 0, 1], {"count": 1}), ([X, 0, 1], {"more": 1}), ([0, 0, 1], {})],
)  # fmt: skip
def test_calls_that_don_t(args: list[Any], kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"argument|for '"):
        check_arguments(find_overload(ROWS_OP), args, kwargs)


def test_what_says_nothing_is_not_run() -> None:
    assert fake_op(find_overload("pwfake::without")).run is None
    assert fake_op(find_overload("pwfake::torchs")).run is None
    torchs.register_fake(torch.empty_like)
    found = fake_op(find_overload("pwfake::torchs"))
    assert found.run is not None
    assert found.run(X).shape == X.shape
    declared = fake_op(find_overload(ROWS_OP))
    assert declared.run is not None
    assert declared.run(X, 0, 1).shape == (1, 3)
