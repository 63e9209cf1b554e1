"""Multi-head latent attention's operators against a dense reference, alone and together, in every regime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from piecework import OpError, check_ops
from piecework.ops.mla import plain as mla_plain
from piecework.ops.mla.attention import mla_attention
from piecework.ops.mla.core import LatentCores, Regime, by_head, latent_attention
from piecework.ops.mla.operators import (
    PLAIN,
    TRACED,
    mla_decode,
    mla_prefill,
    mla_write,
    mla_write_decode,
)
from piecework.ops.packed import packed_linear
from piecework.ops.rows import rows, rows_view
from tests.choice import one_in
from tests.unit.ops.mla_cases import (
    BATCHES,
    TOLERANCES,
    MlaCase,
    Sizes,
    drawn_mla_cases,
    make_mla_case,
    reference,
    reference_cache,
)


def exposed(case: MlaCase, cores: LatentCores = TRACED, regime: str | None = None) -> Tensor:
    return latent_attention(regime or case.regime, cores, **case.values)


def check(case: MlaCase, out: Tensor, *, cache: Tensor | None = None) -> None:
    """Compare results, and the cache after the call."""
    tolerance = TOLERANCES[out.dtype]
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(case), atol=tolerance, rtol=tolerance)
    check_cache(case, case.named["latent_cache"] if cache is None else cache)


def check_cache(case: MlaCase, cache: Tensor) -> None:
    tolerance = TOLERANCES[cache.dtype]
    expected = reference_cache(case)
    torch.testing.assert_close(cache.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "block_size", "batch"),
    one_in(4, [(torch.float32, 4), (torch.float32, 16), (torch.float16, 4), (torch.bfloat16, 16)], BATCHES),
)
def test_equals_the_dense_reference(batch: str, dtype: torch.dtype, block_size: int) -> None:
    case = make_mla_case(BATCHES[batch], dtype=dtype, block_size=block_size)
    twin = case.twin()
    with check_ops():
        check(case, exposed(case))
        out = mla_attention(**twin.named)
    check(twin, out)
    torch.testing.assert_close(out, exposed(case), rtol=1e-5, atol=1e-6 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_mixed_forward_is_right_for_every_batch(batch: str) -> None:
    case, twin = (make_mla_case(BATCHES[batch]) for _ in range(2))
    with check_ops():
        mixed = exposed(case, regime="mixed")
    check(case, mixed)
    torch.testing.assert_close(mixed, mla_attention(**twin.named), rtol=1e-5, atol=1e-6)


@given(drawn_mla_cases(dtypes=(torch.float32,)))
@settings(max_examples=10, deadline=None)
def test_equals_the_reference_whatever_the_batch(case: MlaCase) -> None:
    check(case, exposed(case, PLAIN))


@pytest.mark.parametrize("batch", BATCHES)
def test_context_is_merged_whatever_the_chunk(batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_plain, "CONTEXT_CHUNK", 7)
    monkeypatch.setattr(mla_plain, "_SCORES", 100)
    case = make_mla_case(BATCHES[batch], large=4.0)
    check(case, exposed(case))


@pytest.mark.parametrize("batch", [b for b in BATCHES if "decode" in b or b in ("uneven", "mixed")])
@pytest.mark.parametrize("gathered", [1, 20, 10_000])
def test_decodes_in_groups_of_any_size(batch: str, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_plain, "_GATHERED", gathered)
    monkeypatch.setattr(mla_plain, "_SHORT", 4)
    case = make_mla_case(BATCHES[batch])
    check(case, exposed(case))


def test_one_sequences_nan_stays_its_own() -> None:
    case = make_mla_case([(20, 1), (20, 1), (0, 9), (5, 9)])
    case.named["compressed"][1] = float("nan")
    case.named["compressed"][2 + 4] = float("nan")
    out = mla_attention(**case.named)
    assert [bool(o.isnan().any()) for o in out.split([1, 1, 9, 9])] == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    case = make_mla_case([(0, 50)], dtype=dtype)
    named = case.named
    entry = mla_write(*(named[n] for n in WRITES))
    x = named["compressed"][:, :10]
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + named["eps"])
    assert torch.equal(entry[:, :10], named["norm_weight"] * normed.to(dtype))
    assert torch.equal(named["latent_cache"].flatten(0, 1)[named["slot_mapping"]], entry)


WRITES = ("compressed", "norm_weight", "eps", "cos", "sin", "latent_cache", "slot_mapping")


def test_nothing_but_the_new_tokens_slots_is_written() -> None:
    case = make_mla_case(BATCHES["mixed"], stale=7.0)
    before = case.named["latent_cache"].clone()
    mla_attention(**case.named)
    changed = (case.named["latent_cache"] != before).any(-1).flatten().nonzero().squeeze(1)
    assert sorted(changed.tolist()) == sorted(case.named["slot_mapping"].tolist())


@pytest.mark.parametrize("num", [0, 2])
def test_decode_of_the_first_rows_only(num: int) -> None:
    case = make_mla_case(BATCHES["mixed"])
    named = case.named
    entry = mla_write(*(named[n] for n in WRITES))
    rest = (named["latent_cache"], named["block_tables"], named["seq_lens"], named["scale"])
    q_latent = by_head(named["q_nope"][:num], named["w_uk"])
    out = mla_decode.check(q_latent, named["q_pe"], entry, *rest)
    assert out.shape == (num, 3, 10)
    torch.testing.assert_close(
        by_head(out, named["w_uv"]).flatten(1).double(), reference(case)[:num], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(out, mla_decode(q_latent, named["q_pe"], None, *rest))


@pytest.mark.parametrize("turned", [True, False])
def test_writing_and_decoding_in_one_is_both(turned: bool) -> None:
    case, other = make_mla_case(BATCHES["decodes"]), make_mla_case(BATCHES["decodes"])
    named, wanted = case.named, other.named
    q_latent = by_head(named["q_nope"], named["w_uk"])
    q_pe = named["q_pe"] if turned else mla_plain.rotate(named["q_pe"], named["cos"], named["sin"])
    entry = mla_write(*(wanted[n] for n in WRITES))
    rest = ("block_tables", "seq_lens", "scale")
    expected = mla_decode(q_latent, q_pe, entry, wanted["latent_cache"], *(wanted[n] for n in rest))
    given = [named[n] for n in (*WRITES, *rest)]
    torch.testing.assert_close(mla_write_decode.check(q_latent, named["q_pe"], turned, *given), expected)
    assert torch.equal(named["latent_cache"].nan_to_num(), wanted["latent_cache"].nan_to_num())


def test_decoded_rows_are_copied_into_the_result() -> None:
    case = make_mla_case(BATCHES["mixed"])
    named = case.named
    entry = mla_write(*(named[n] for n in WRITES))
    given_rows = torch.randn(2, 3 * 6)
    kv = entry[2:, :10] @ named["kv_b_weight"].t()
    names = ("kv_b_weight", "latent_cache", "block_tables", "seq_lens", "query_start", "num_decode_tokens", "scale")
    out = mla_prefill.check(named["q_nope"], named["q_pe"], kv, entry, *(named[n] for n in names), given_rows)
    assert torch.equal(out[:2], given_rows)
    for too_few in (given_rows[:1], None):
        with pytest.raises(OpError, match="2 decode tokens"):
            mla_prefill(named["q_nope"], named["q_pe"], kv, entry, *(named[n] for n in names), too_few)
    torch.testing.assert_close(out[2:].double(), reference(case)[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("regime", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("cores", [PLAIN, TRACED])
def test_queries_are_rotated_in_any_regime(cores: LatentCores, regime: str) -> None:
    batch = BATCHES[{"decode": "decodes", "prefill": "prefills alike", "mixed": "mixed"}[regime]]
    case, other = make_mla_case(batch), make_mla_case(batch)
    other.named["q_pe"] = mla_plain.rotate(case.named["q_pe"], case.named["cos"], case.named["sin"])
    case.named["turned"] = False
    with check_ops():
        out = latent_attention(regime, cores, **case.values)
    torch.testing.assert_close(out, latent_attention(regime, cores, **other.values))


@pytest.mark.parametrize("wrong", [{"sin": None}, {"cos": None}, {"cos": torch.ones(9, 3)}])
@pytest.mark.parametrize("cores", [PLAIN, TRACED])
def test_angles_come_in_pairs(cores: LatentCores, wrong: dict[str, Tensor | None]) -> None:
    case = make_mla_case(BATCHES["mixed"])
    named = case.named
    angles = {"cos": named["cos"], "sin": named["sin"], **wrong}
    entry = mla_write(*(named[n] for n in WRITES))
    q_latent = by_head(named["q_nope"][:2], named["w_uk"])
    rest = [named[n] for n in ("latent_cache", "block_tables", "seq_lens", "scale")]
    with pytest.raises(OpError, match="rotary dimensions"):
        cores.decode(q_latent, named["q_pe"], entry, *rest, **angles)
    kv = entry[2:, :10] @ named["kv_b_weight"].t()
    names = ("kv_b_weight", "latent_cache", "block_tables", "seq_lens", "query_start", "num_decode_tokens", "scale")
    with pytest.raises(OpError, match="rotary dimensions"):
        cores.prefill(
            named["q_nope"], named["q_pe"], kv, entry, *(named[n] for n in names), torch.ones(2, 18), **angles
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_prompts_context_may_be_packed(dtype: torch.dtype) -> None:
    case = make_mla_case(BATCHES["mixed"], sizes=Sizes(heads=4, nope=8, value=8), dtype=dtype)
    named = case.named
    entry = mla_write(*(named[n] for n in WRITES))
    num = case.num_decode_tokens
    kv, decoded = entry[num:, :10] @ named["kv_b_weight"].t(), torch.zeros(num, 32, dtype=dtype)
    first = named["q_nope"], named["q_pe"], kv, entry
    rest = [named[n] for n in ("latent_cache", "block_tables", "seq_lens", "query_start", "num_decode_tokens", "scale")]
    out = mla_prefill(*first, named["kv_b_weight"], *rest, decoded)
    packed = mla_prefill.check(*first, packed_linear(named["kv_b_weight"]), *rest, decoded, packed=True)
    assert torch.equal(packed, out)


@pytest.mark.parametrize("x", [torch.randn(7, 3), torch.randn(7, 3, 8)[..., 2:5], torch.randn(3, 7).t()])
def test_rows(x: Tensor) -> None:
    for begin, count in ((0, 7), (0, 0), (2, 3), (7, 0)):
        made = rows.check(x, begin, count)
        assert torch.equal(made, x[begin : begin + count])
        assert made.is_contiguous()
        view = rows_view(x, begin, count)
        assert torch.equal(view, made)
        assert view.is_contiguous()
        shared = view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert shared == x[begin : begin + count].is_contiguous()
    with pytest.raises((IndexError, RuntimeError)):
        rows(x, 5, 3)


def _trace(case: MlaCase, regime: str) -> torch.fx.Graph:
    def forward(tensors: dict[str, Any]) -> Tensor:
        given = MlaCase({**case.named, **tensors}, case.histories)
        return latent_attention(regime, TRACED, **given.values)

    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, _inputs: object) -> Any:
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    tensors = {k: v for k, v in case.named.items() if isinstance(v, Tensor)}
    out = torch.compile(forward, backend=backend, fullgraph=True)(tensors)
    check(case, out)
    (graph,) = graphs
    return graph


@pytest.mark.parametrize("regime", ["decode", "prefill", "mixed"])
def test_traces_whole_with_no_more_than_the_regime_needs(regime: str) -> None:
    batch = {"decode": "decodes", "prefill": "prefills alike", "mixed": "mixed"}[regime]
    graph = _trace(make_mla_case(BATCHES[batch]), regime)
    called = [str(n.target).rpartition(".")[0] or n.name for n in graph.nodes if "piecework" in str(n.target)]
    assert (
        called
        == {
            "decode": ["piecework.head_matmul", "piecework.mla_write_decode", "piecework.head_matmul"],
            "prefill": ["piecework.mla_write", "piecework.mla_prefill"],
            "mixed": [
                *("piecework.mla_write", "piecework.rows", "piecework.head_matmul", "piecework.mla_decode"),
                *("piecework.rows", "piecework.head_matmul", "piecework.mla_prefill"),
            ],
        }[regime]
    )
    texts = " ".join(str(n.target) for n in graph.nodes)
    assert "cat" not in texts
    assert ("getitem" in texts) == (regime != "decode")  # latents without their rotated keys


def test_sizes_that_do_not_fit_are_told_in_a_trace() -> None:
    case = make_mla_case(BATCHES["mixed"])
    with torch.device("meta"):
        tensors = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.named.items()}
        with pytest.raises(OpError, match="kv_b_weight"):
            mla_attention(**{**tensors, "kv_b_weight": torch.empty(7, 10)})
        with pytest.raises(OpError, match="latent_cache"):
            mla_write(*({**tensors, "latent_cache": torch.empty(4, 4, 9)}[n] for n in WRITES))


def test_regimes_are_spelled_as_in_plans() -> None:
    assert [r.value for r in Regime] == ["decode", "prefill", "mixed"]


@pytest.mark.parametrize("sizes", [Sizes(heads=16, nope=128, rope=64, value=128, rank=512), Sizes(1, 2, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_sizes(sizes: Sizes, dtype: torch.dtype) -> None:
    case = make_mla_case([(40, 1), (3, 1), (0, 20), (20, 9)], sizes=sizes, dtype=dtype, block_size=16)
    check(case, mla_attention(**case.named))
