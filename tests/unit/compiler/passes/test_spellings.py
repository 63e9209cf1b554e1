"""Every spelling means its op to the bit, is found wherever it stands, and transformers' own code is among them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb as deepseek_rotary
from transformers.models.ernie4_5.modeling_ernie4_5 import apply_rotary_pos_emb as ernie_rotary
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss_rotary
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, Llama4TextRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo_rotary
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi_rotary
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from piecework.compiler.passes import gated
from piecework.compiler.passes import layer_norm as layer_norm_pass
from piecework.compiler.passes import rms_norm as rms_norm_pass
from piecework.compiler.passes import rotary as rotary_pass
from piecework.compiler.passes import rotate_pairs as rotate_pairs_pass
from piecework.compiler.rewrite.recorded import record_body
from piecework.compiler.rewrite.spelling import FLOATS, Spelling
from piecework.compiler.rewrite.terms import terms_of
from piecework.errors import InternalError
from piecework.ops.activations import gelu_mul, silu_mul
from piecework.ops.ir.op import IrOp
from piecework.ops.norms import layer_norm, rms_norm
from piecework.ops.rotary import rotary, rotate_pairs
from tests.choice import slow_but
from tests.unit.compiler.passes.programs import (
    ROWS,
    assert_same_results,
    ops_of,
    passed,
    program_of,
    report,
    spec,
    targets,
)

ALL: list[tuple[IrOp, Spelling]] = [
    *((rms_norm, s) for s in rms_norm_pass.SPELLINGS),
    *((layer_norm, s) for s in layer_norm_pass.SPELLINGS),
    *((silu_mul, s) for s in gated.SILU),
    *((gelu_mul, s) for s in gated.GELU),
    *((rotary, s) for s in rotary_pass.SPELLINGS),
    *((rotate_pairs, s) for s in rotate_pairs_pass.SPELLINGS),
]
CASES = [
    pytest.param(op, s, dtypes, id=f"{op.short_name}-{s.name}-{dtype}{'-mixed' * (n > 0)}")
    for op, s in ALL
    for dtype in FLOATS
    for n, dtypes in enumerate(s.dtypes(dtype))
]
HALVES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def _specs(spelling: Spelling, dtypes: dict[str, str]) -> list[Any]:
    return [spec(*shape, dtype=dtypes[name]) for name, shape in spelling.shapes.items()]


@pytest.mark.parametrize(("op", "spelling", "dtypes"), CASES)
def test_a_spelling_is_its_op(op: IrOp, spelling: Spelling, dtypes: dict[str, str]) -> None:
    numbers = [1e-5 if name == "eps" else 1.0 for name in spelling.numbers]
    program = program_of(lambda *tensors: spelling.before(*tensors, *numbers), _specs(spelling, dtypes))
    made = passed(program, op.short_name)
    given = dict(zip(spelling.shapes, [{"i": n} for n in range(len(spelling.shapes))], strict=True))
    wanted = spelling.arguments(**given, **dict(zip(spelling.numbers, numbers, strict=True)))
    found = [call for call in made.rewritten.program.calls if call.target == f"{op.name.replace('::', '.')}.default"]
    assert_same_results(program, made.rewritten.program)
    if _is_exact(op, spelling, dtypes, numbers):
        assert len(found) == 1
        assert found[0].args[: len(wanted)] == tuple(wanted) or dtypes == dict.fromkeys(dtypes, "float32")
    else:  # with a weight of float32 the result would be that, with half cosines the arithmetic would
        assert len(set(dtypes.values())) == 1 or spelling.name in {"Llama's", "one with a bias"}
        assert all(call.args != tuple(wanted) for call in found)


def _is_exact(op: IrOp, spelling: Spelling, dtypes: dict[str, str], numbers: list[float]) -> bool:
    """Whether a spelling gives what its op does, to the bit."""
    tensors = _decoded(tuple({"i": n} for n in range(len(dtypes))), spelling, dtypes)
    given = dict(zip([*spelling.shapes, *spelling.numbers], [*tensors, *numbers], strict=True))
    return _equal(spelling.before(**given), op.native(*spelling.arguments(**given)))


@pytest.mark.parametrize(("op", "spelling"), ALL, ids=lambda value: getattr(value, "name", ""))
def test_every_spelling_is_exact_in_every_dtype(op: IrOp, spelling: Spelling) -> None:
    numbers = [1e-5 if name == "eps" else 1.0 for name in spelling.numbers]
    for dtype in FLOATS:
        assert any(_is_exact(op, spelling, dtypes, numbers) for dtypes in spelling.dtypes(dtype)), dtype


def _decoded(args: tuple[Any, ...], spelling: Spelling, dtypes: dict[str, str]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).to(getattr(torch, dtypes[name]))
        for name, shape in spelling.shapes.items()
    ]
    return [tensors[a["i"]] if isinstance(a, dict) else a for a in args]


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def _of_module(module: nn.Module, x: Any, *, dtype: str) -> Any:
    """Return the program of a module on one input; its parameters are constants."""
    module = module.to(getattr(torch, dtype))
    named = dict(module.named_parameters())
    specs = [x, *(spec(*p.shape, dtype=dtype) for p in named.values())]

    def call(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(named, weights, strict=True)), (x,))

    return program_of(call, specs, weights=len(named))


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: LlamaRMSNorm(16, eps=1e-5), "rms_norm"),
    "gemma": (lambda: GemmaRMSNorm(16), "rms_norm"),
    "qwen3_next": (lambda: Qwen3NextRMSNorm(16), "rms_norm"),
    "olmo2": (lambda: Olmo2RMSNorm(16), "rms_norm"),
    "gpt_oss": (lambda: GptOssRMSNorm(16), "rms_norm"),
    "llama4": (lambda: Llama4TextRMSNorm(16), "rms_norm"),
    "llama4 without a weight": (lambda: Llama4TextL2Norm(), "rms_norm"),
    "t5": (lambda: T5LayerNorm(16), "rms_norm"),
    "torch": (lambda: nn.RMSNorm(16, eps=1e-5), "rms_norm"),
    "cohere": (lambda: CohereLayerNorm(16), "layer_norm"),
}


@HALVES
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_real_modules(name: str, dtype: str) -> None:
    make, op = NORMS[name]
    program = _of_module(make(), spec(1, ROWS, 16, dtype=dtype), dtype=dtype)
    made = passed(program)
    assert ops_of(made) == [op]
    assert targets(made.rewritten.program) == [f"piecework.{op}.default"]
    assert not [why for found in made.reports for why in found.near_misses]
    assert made.rewritten.origins == (tuple(range(len(program.calls))),)
    assert_same_results(program, made.rewritten.program)


MLP = SimpleNamespace(hidden_size=16, intermediate_size=24, hidden_act="silu", mlp_bias=False)


@HALVES
@pytest.mark.parametrize(
    ("module", "act", "op"),
    [
        (LlamaMLP, "silu", "silu_mul"),
        (GemmaMLP, "gelu_pytorch_tanh", "gelu_mul"),
        (GemmaMLP, "gelu", "gelu_mul"),
        (Phi3MLP, "silu", "silu_mul"),
    ],
)
def test_gated_activations_of_real_modules(module: Any, act: str, op: str, dtype: str) -> None:
    config = SimpleNamespace(**{**vars(MLP), "hidden_act": act})
    program = _of_module(module(config), spec(1, ROWS, 16, dtype=dtype), dtype=dtype)
    made = passed(program)
    assert ops_of(made) == [op]
    assert_same_results(program, made.rewritten.program)


ROTARY: dict[str, tuple[Callable[..., Any], int, str, list[str]]] = {
    "llama": (llama_rotary, 16, "same", ["rotary"]),
    "olmo2": (olmo_rotary, 16, "float32", ["rotary"]),
    "phi3": (phi_rotary, 8, "same", ["rotary"]),
    "glm": (glm_rotary, 8, "same", ["rotary"]),
    "ernie4_5": (ernie_rotary, 16, "float32", ["rotary"]),
    "cohere": (cohere_rotary, 16, "float32", ["rotary"]),
    "deepseek_v3": (deepseek_rotary, 16, "same", ["rotary"]),
    "gpt_oss": (gpt_oss_rotary, 8, "same", ["rotate_pairs", "rotate_pairs"]),
}


@HALVES
@pytest.mark.parametrize("name", slow_but(ROTARY, *list(ROTARY)[::3]))
def test_rotary_of_real_functions(name: str, dtype: str) -> None:
    function, size, wide, ops = ROTARY[name]
    angles = spec(1, ROWS, size, dtype=dtype if wide == "same" else wide)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        rotated = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(tensor.transpose(1, 2) for tensor in rotated)

    specs = [spec(1, ROWS, 4, 16, dtype=dtype), spec(1, ROWS, 2, 16, dtype=dtype), angles, angles]
    program = program_of(call, specs)
    made = passed(program)
    assert ops_of(made) == ops
    assert not [why for found in made.reports for why in found.near_misses]
    assert_same_results(program, made.rewritten.program)


@settings(max_examples=20, deadline=None)
@given(
    axis=st.sampled_from([-1, 2, 1, -2]),
    power=st.sampled_from([2, 3]),
    swapped=st.booleans(),
    weighted=st.booleans(),
    inner=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_a_norm_is_found_or_left_as_it_was(
    *, axis: int, power: int, swapped: bool, weighted: bool, inner: bool, dtype: str, eps: float
) -> None:
    """Whatever is matched has the same bits; and a norm over the last axis is matched however it is written."""

    def norm(x: Tensor, weight: Tensor) -> Any:
        wide = x.float()
        factor = torch.rsqrt(wide.pow(power).mean(axis, keepdim=True) + eps)
        normed = (factor * wide if swapped else wide * factor).to(x.dtype)
        made = (normed * weight if swapped else weight * normed) if weighted else normed * 2
        return (made, normed) if inner else made

    program = program_of(norm, [spec(1, ROWS, 16, dtype=dtype), spec(16, dtype=dtype)], weights=1)
    made = passed(program, "rms_norm")
    is_norm = axis in {-1, 2} and power == 2
    assert ops_of(made) == (["rms_norm"] if is_norm else [])
    if is_norm and weighted and not inner:
        assert targets(made.rewritten.program) == ["piecework.rms_norm.default"]
    assert bool(report(made, "rms_norm").near_misses) == (not is_norm)
    assert_same_results(program, made.rewritten.program)


@pytest.mark.parametrize(("op", "spelling", "dtypes"), CASES)
def test_one_run_tells_what_a_trace_does(op: IrOp, spelling: Spelling, dtypes: dict[str, str]) -> None:
    numbers = [0.25] * len(spelling.numbers)
    program = program_of(lambda *tensors: spelling.before(*tensors, *numbers), _specs(spelling, dtypes))
    ran = record_body(
        spelling.before, [*_decoded(tuple({"i": n} for n in range(len(dtypes))), spelling, dtypes), *numbers]
    )
    ours, traced = terms_of(ran.calls, ran.results), terms_of(program.calls, program.outputs)
    assert ours == traced
    assert [ours.of(result) for result in ran.results] == [traced.of(result) for result in program.outputs]


def test_a_run_that_writes_to_a_tensor_or_has_one_of_its_own_is_refused() -> None:
    with pytest.raises(InternalError, match="writes to a tensor"):
        record_body(lambda x: x.add_(1), [torch.ones(2)])
    own = torch.ones(2)
    with pytest.raises(InternalError, match="tensor of its own"):
        record_body(lambda x: x + own, [torch.ones(2)])
