"""Which products of heads are done by code of ours, and what the pass makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from piecework.compiler.job import Job
from piecework.foundation.digests import digest_json
from piecework.ops.head_matmul import head_matmul, head_matmul_native
from piecework.ops.program import Call, Program, TensorSpec
from piecework.passes.native_matmul import native_matmul, native_sources, plain_matmul

_X = TensorSpec(("s0", 4, 8), (32, 8, 1), "float32", "cpu")
_W = TensorSpec((4, 8, 64), (512, 64, 1), "float32", "cpu")
_PRODUCT = Call("piecework.head_matmul.default", ({"i": 0}, {"c": 0}), {})
PROGRAM = Program((("s0", 0, 64),), (_X,), (_W,), (_PRODUCT,), ({"n": 0},))
PLAIN = "piecework.head_matmul_plain.default"


def test_a_constant_of_whole_blocks_is_multiplied_natively() -> None:
    made = native_matmul(PROGRAM)
    assert [call.target for call in made.program.calls] == ["piecework.head_matmul_cpu.default"]
    assert made.program.calls[0].args == _PRODUCT.args
    assert made.source.startswith("#define PIECEWORK_FLOAT32\n#include ")
    (names,) = made.options.values()
    assert list(names) == [torch.ops.piecework.head_matmul_cpu.default]


@pytest.mark.parametrize(
    "weight",
    [
        replace(_W, device="cuda"),
        replace(_W, dtype="float16"),
        replace(_W, stride=(512, 1, 8)),
        replace(_W, shape=(4, 8, 48), stride=(384, 48, 1)),
        replace(_W, shape=(4, 7, 64), stride=(448, 64, 1)),
    ],
)
def test_others_are_torchs(weight: TensorSpec) -> None:
    made = native_matmul(replace(PROGRAM, constants=(weight,)))
    assert [call.target for call in made.program.calls] == [PLAIN]
    assert (made.source, made.options) == ("", {})


def test_a_matrix_that_differs_from_call_to_call_is_torchs() -> None:
    given = replace(PROGRAM, inputs=(_X, _W), constants=(), calls=(replace(_PRODUCT, args=({"i": 0}, {"i": 1})),))
    assert [call.target for call in native_matmul(given).program.calls] == [PLAIN]


def test_all_can_be_torchs() -> None:
    assert [call.target for call in plain_matmul(PROGRAM).calls] == [PLAIN]


def test_a_piece_is_compiled_again_when_the_code_changes() -> None:
    sources = native_sources(PROGRAM)
    assert {"head_matmul.h", "head_matmul_shim.h", "elements.h", "vectors.h"} <= set(sources)
    without = replace(PROGRAM, calls=(replace(_PRODUCT, target="aten.bmm.default"),))
    assert native_sources(without) == {}
    assert Job(PROGRAM).key() != digest_json(Job(PROGRAM).to_json())
    assert Job(without).key() == digest_json(Job(without).to_json())
    eager = Job(PROGRAM, options={"backend": "eager"})  # which compiles nothing
    assert eager.key() == digest_json(eager.to_json())


def test_the_operator_is_torchs_bmm_with_tokens_first() -> None:
    x, weight = torch.randn(5, 3, 7).transpose(0, 1)[:, :, :6], torch.randn(5, 6, 4)
    made = head_matmul(x, weight)
    assert made.is_contiguous()
    torch.testing.assert_close(made, torch.einsum("thk,hkw->thw", x, weight))
    for other in (torch.ops.piecework.head_matmul_cpu, torch.ops.piecework.head_matmul_plain, head_matmul_native):
        torch.testing.assert_close(other(x, weight), made)
