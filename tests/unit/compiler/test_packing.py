"""Which weights are packed, for which machine and by which option."""

from __future__ import annotations

import pytest

from piecework import BackendName, CompileError, CompileOptions
from piecework.bundle.packings import HEAD_COLUMNS, LINEAR_COLUMNS, MKLDNN_LINEAR
from piecework.compiler.packing import packing_of
from piecework.foundation.target import Target
from piecework.ops.ir.program import Call, Program, TensorSpec

BOTH = frozenset({"float32", "bfloat16"})
ALL = BOTH | {"float16"}


def _target(isa: str, machine: str = "x86_64") -> Target:
    return Target(machine=machine, system="linux", isa=isa, flags=())


@pytest.mark.parametrize(
    ("target", "onednn", "own"),
    [
        (_target("avx512_bf16"), BOTH, ALL),
        (_target("amx_bf16"), BOTH, {"float16"}),
        (_target("avx512"), BOTH, ALL),
        (_target("avx2"), {"float32"}, ALL),
        (_target("baseline"), frozenset(), frozenset()),
        (_target("sve2_bf16", "aarch64"), frozenset(), frozenset()),
    ],
)
def test_the_target_decides(target: Target, onednn: frozenset[str], own: frozenset[str]) -> None:
    found = packing_of(CompileOptions(), target=target, device="cpu")
    assert (found.onednn, found.own, found.matrices) == (onednn, own, True)


def test_an_option_decides_instead() -> None:
    fast, other = _target("avx512_bf16"), _target("amx_bf16")
    assert packing_of(CompileOptions(pack_linear="onednn"), target=fast, device="cpu").own == frozenset()
    assert packing_of(CompileOptions(pack_linear="own"), target=other, device="cpu").own == ALL
    none = packing_of(CompileOptions(pack_linear=False), target=fast, device="cpu")
    assert (none.onednn, none.own) == (frozenset(), frozenset())
    with pytest.raises(CompileError, match="pack_linear='mkl'"):
        CompileOptions(pack_linear="mkl")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"backend": BackendName.EAGER}, {}])
def test_nothing_is_packed_where_no_library_is_made_for_a_cpu(options: dict[str, BackendName]) -> None:
    device = "cpu" if options else "cuda"
    found = packing_of(CompileOptions(**options), target=_target("avx512_bf16"), device=device)
    assert (found.onednn, found.own, found.matrices) == (frozenset(), frozenset(), False)


def test_layers_whose_sizes_do_not_fit_are_left_to_onednn() -> None:
    """Outputs are whole blocks of columns, and inputs are even."""
    x = TensorSpec(("s0", 8), (8, 1), "bfloat16", "cpu")
    odd = TensorSpec(("s0", 7), (7, 1), "bfloat16", "cpu")
    weights = [(64, 8), (48, 8), (64, 7)]
    specs = tuple(TensorSpec(shape, (shape[1], 1), "bfloat16", "cpu") for shape in weights)
    heads = TensorSpec((2, 8, 32), (256, 32, 1), "bfloat16", "cpu")
    calls = [Call("piecework.linear.default", ({"i": int(i == 2)}, {"c": i}), {}) for i in range(3)]
    product = Call("piecework.head_matmul.default", ({"i": 2}, {"c": 3}), {})
    by_head = TensorSpec(("s0", 2, 8), (16, 8, 1), "bfloat16", "cpu")
    program = Program((("s0", 1, 9),), (x, odd, by_head), (*specs, heads), (*calls, product), ({"n": 0},))
    found = packing_of(CompileOptions(), target=_target("avx512_bf16"), device="cpu").of(program)
    assert found == {0: LINEAR_COLUMNS, 1: MKLDNN_LINEAR, 2: MKLDNN_LINEAR, 3: HEAD_COLUMNS}
    without = packing_of(CompileOptions(), target=_target("baseline"), device="cpu").of(program)
    assert without == {3: HEAD_COLUMNS}
