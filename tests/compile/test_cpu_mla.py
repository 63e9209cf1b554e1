"""The native kernels of multi-head latent attention against the dense reference, for this machine and lesser ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from piecework.compiler.backends.toolchain import find_toolchain
from piecework.errors import OpError
from piecework.ops.mla import cache as mla_cache
from piecework.ops.mla import plain as mla_plain
from piecework.ops.mla.attention import MLA_ATTENTION_OP
from piecework.ops.mla.core import LatentCores, latent_attention
from piecework.ops.mla.operators import PLAIN, row_view
from piecework.ops.packed import packed_linear
from piecework.providers.cpu_mla import prefill, rounds
from piecework.providers.cpu_mla.kernel import CpuMla
from piecework.providers.libraries import CPU_MLA, open_kernel
from tests.choice import one_in
from tests.compile.native_kernels import MACHINES, build
from tests.unit.ops.mla_cases import (
    BATCHES,
    TOLERANCES,
    MlaCase,
    Sizes,
    drawn_mla_cases,
    in_fp8,
    make_mla_case,
    reference,
    reference_cache,
)

LITE = Sizes(heads=16, nope=128, rope=64, value=128, rank=512)


@pytest.fixture(scope="module", params=MACHINES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CPU_MLA.main, CPU_MLA.dtypes, request.param, tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def mla(library: Path) -> CpuMla:
    return CpuMla(library)


@pytest.fixture(autouse=True)
def no_plain_torch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail where a call that a kernel should do is left to plain torch."""

    def refuse(*_args: object) -> None:
        pytest.fail("plain torch was called")

    if "falls_back" not in request.node.name:
        for name in ("write", "decode", "write_decode", "prefill"):
            monkeypatch.setattr(mla_plain, name, refuse)


def cores_of(mla: CpuMla) -> LatentCores:
    return LatentCores(mla.write, mla.decode, mla.write_decode, mla.prefill, row_view)


def run(mla: CpuMla, case: MlaCase, regime: str | None = None, cores: LatentCores | None = None) -> Tensor:
    return latent_attention(regime or case.regime, cores or cores_of(mla), **case.values)


def check(
    mla: CpuMla, case: MlaCase, regime: str | None = None, *, times: float = 1.0, cores: LatentCores | None = None
) -> Tensor:
    out = run(mla, case, regime, cores)
    tolerance = TOLERANCES[out.dtype] * times
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(case), atol=tolerance, rtol=tolerance)
    cache = case.named["latent_cache"].double()
    torch.testing.assert_close(cache, reference_cache(case), atol=tolerance, rtol=tolerance, equal_nan=True)
    return out


@pytest.mark.parametrize(("heads", "dtype", "batch"), one_in(4, [1, 3, 6, 16], TOLERANCES, BATCHES))
def test_equals_the_reference(mla: CpuMla, batch: str, heads: int, dtype: torch.dtype) -> None:
    check(mla, make_mla_case(BATCHES[batch], sizes=Sizes(heads=heads), dtype=dtype))


@pytest.mark.parametrize("batch", BATCHES)
def test_a_mixed_forward_is_right_for_every_batch(mla: CpuMla, batch: str) -> None:
    check(mla, make_mla_case(BATCHES[batch]), "mixed")


@pytest.mark.parametrize("batch", [[(40, 1), (3, 1), (0, 20), (20, 9)], [(700, 1), (64, 1)], [(130, 70)]])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_true_sizes(mla: CpuMla, batch: list[tuple[int, int]], dtype: torch.dtype) -> None:
    case = make_mla_case(batch, sizes=LITE, dtype=dtype, block_size=16)
    check(mla, case)


ROTATED = (LITE, Sizes(heads=3), Sizes(2, 2, 2, 2, 2), Sizes(heads=1, rope=20))


@pytest.mark.parametrize(("sizes", "batch", "dtype"), one_in(3, ROTATED, ["decodes", "mixed", "prefills"], TOLERANCES))
def test_queries_are_rotated_where_they_are_not(mla: CpuMla, batch: str, sizes: Sizes, dtype: torch.dtype) -> None:
    """Pairs that lie apart in a wider tensor, as in what a projection makes; angles of both types."""
    cases = [make_mla_case(BATCHES[batch], sizes=sizes, dtype=dtype) for _ in range(3)]
    named = cases[0].named
    wide = torch.randn(named["q_pe"].shape[0], sizes.heads, sizes.rope + 6).to(dtype)
    pairs = wide[:, :, 3:-3]
    for case, angles in zip(cases, (torch.float32, torch.float32, dtype), strict=True):
        case.named["cos"], case.named["sin"] = case.named["cos"].to(angles), case.named["sin"].to(angles)
    rotary = cases[0].named["cos"], cases[0].named["sin"]
    cases[0].named["q_pe"] = mla_plain.rotate(pairs, *rotary)
    found = [run(mla, cases[0])]
    for case in cases[1:]:
        case.named["q_pe"] = pairs
        case.named["turned"] = False
        found.append(run(mla, case))
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(found[-1], found[0], atol=tolerance, rtol=tolerance)


def packed_cores(mla: CpuMla) -> LatentCores:
    """Prompts' context is expanded by packed weights."""

    def prefill(*args: Any) -> Tensor:
        return mla.prefill(*args[:4], packed_linear(args[4]), *args[5:], packed=True)

    return replace(cores_of(mla), prefill=prefill)


PACKED = (LITE, Sizes(heads=4), Sizes(heads=2, nope=20, value=12), Sizes(heads=1, nope=64, value=32, rope=6, rank=130))


@pytest.mark.parametrize(
    ("batch", "sizes", "fp8", "dtype"),
    one_in(
        4, ["chunks and decodes", "a long prefix", "prefills"], PACKED, [False, True], [torch.float32, torch.bfloat16]
    ),
)
def test_context_is_expanded_by_packed_weights(
    mla: CpuMla, batch: str, sizes: Sizes, fp8: bool, dtype: torch.dtype
) -> None:
    sizes = replace(sizes, value=sizes.nope) if sizes.heads == 4 else sizes  # heads that divide blocks of columns
    case = make_mla_case(BATCHES[batch], sizes=sizes, dtype=dtype, block_size=16)
    case = in_fp8(case) if fp8 else case
    twin = case.twin()
    out = latent_attention(case.regime, packed_cores(mla), **case.values)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out, run(mla, twin), atol=tolerance, rtol=tolerance)
    if not fp8:
        torch.testing.assert_close(out.double(), reference(case), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [1, 64])
def test_packed_weights_in_rounds(mla: CpuMla, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "LEAST_CHUNK", chunk)
    monkeypatch.setattr(rounds, "LEAST_CHUNK", 1)
    monkeypatch.setattr(prefill, "_EXPANDED_BYTES", 1)
    case = make_mla_case(BATCHES["chunks and decodes"], sizes=Sizes(heads=2, nope=20, value=12), large=4.0)
    out = latent_attention(case.regime, packed_cores(mla), **case.values)
    torch.testing.assert_close(out.double(), reference(case), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes", [Sizes(heads=2, nope=24, value=12), Sizes(heads=2, nope=20, value=12, rank=9), Sizes(2, 2, 2, 2, 2)]
)
def test_packed_weights_of_no_such_layout_are_refused(mla: CpuMla, sizes: Sizes) -> None:
    """Neither the kernel nor plain torch takes what can't have been packed."""
    case = make_mla_case([(40, 20)], sizes=sizes)

    def as_if_packed(*args: Any) -> Tensor:
        return mla.prefill(*args, packed=True)

    cores = replace(cores_of(mla), prefill=as_if_packed)
    with pytest.raises(pytest.fail.Exception, match="plain torch was called"):
        run(mla, case, cores=cores)


def test_packed_weights_of_another_type_falls_back(mla: CpuMla) -> None:
    sizes = Sizes(heads=2, nope=20, value=12)
    case = make_mla_case(BATCHES["mixed"], sizes=sizes, dtype=torch.float16)
    out = latent_attention(case.regime, packed_cores(mla), **case.values)
    torch.testing.assert_close(out.double(), reference(case), atol=4e-3, rtol=4e-3)


@pytest.mark.slow
@given(case=drawn_mla_cases())
@settings(max_examples=20, deadline=None)
def test_equals_the_reference_whatever_the_batch(mla: CpuMla, case: MlaCase) -> None:
    check(mla, case)


@pytest.mark.parametrize(
    ("batch", "chunk"), one_in(3, [b for b in BATCHES if BATCHES[b][-1][1] > 1], [1, 5, 64, 10_000])
)
def test_context_in_rounds_of_any_size(mla: CpuMla, batch: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "LEAST_CHUNK", chunk)
    monkeypatch.setattr(rounds, "LEAST_CHUNK", 1)
    monkeypatch.setattr(prefill, "_EXPANDED_BYTES", 1)
    check(mla, make_mla_case(BATCHES[batch], sizes=Sizes(heads=2), large=4.0))


@pytest.mark.parametrize(
    ("threads", "dtype", "packed"), one_in(4, [1, 2, 5], [torch.float32, torch.bfloat16], [False, True])
)
def test_work_is_split_among_threads(mla: CpuMla, threads: int, dtype: torch.dtype, packed: bool) -> None:
    sizes = Sizes(heads=8, nope=16, rope=8, value=12, rank=40)
    case = make_mla_case([(2000, 1), (3, 1), (999, 1), (300, 90), (0, 200)], sizes=sizes, block_size=16, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(mla, case, cores=packed_cores(mla) if packed else None)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_scores_neither_overflow_nor_vanish(mla: CpuMla, sign: float) -> None:
    case = make_mla_case([(900, 1), (0, 70), (80, 20)], large=100.0, block_size=16)
    case.named["scale"] = sign
    check(mla, case, times=20)  # scores of a thousand have that many fewer digits


def test_one_sequences_nan_stays_its_own(mla: CpuMla) -> None:
    case = make_mla_case([(20, 1), (20, 1), (0, 9), (5, 9)])
    case.named["compressed"][1] = float("nan")
    case.named["compressed"][2 + 4] = float("nan")
    out = run(mla, case)
    assert [bool(o.isnan().any()) for o in out.split([1, 1, 9, 9])] == [False, True, True, False]


def test_writes_every_new_token_to_its_slot_and_nothing_else(mla: CpuMla) -> None:
    case = make_mla_case(BATCHES["mixed"], stale=7.0)
    before = case.named["latent_cache"].clone()
    run(mla, case)
    changed = (case.named["latent_cache"] != before).any(-1).flatten().nonzero().squeeze(1)
    assert sorted(changed.tolist()) == sorted(case.named["slot_mapping"].tolist())


WRITES = ("compressed", "norm_weight", "eps", "cos", "sin", "latent_cache", "slot_mapping")
WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a slot outside of the cache": ("slot_mapping", lambda t: t + 1000),
    "a slot outside of the cache: negative": ("slot_mapping", lambda t: t - 1000),
    "a block outside of the cache": ("block_tables", lambda t: t + 1000),
    "a block outside of the cache: negative": ("block_tables", lambda t: -t),
    "sequence lengths": ("seq_lens", lambda t: t * 100),
    "sequence lengths: none": ("seq_lens", lambda t: t * 0),
    "sequence lengths: starts": ("query_start", lambda t: t.flip(0)),
}


@pytest.mark.parametrize(
    ("found", "regime"),
    [(f, r) for f in WRONG for r in ("decode", "prefill") if (WRONG[f][0], r) != ("query_start", "decode")],
)
def test_numbers_that_lead_outside_are_refused(mla: CpuMla, found: str, regime: str) -> None:
    name, change = WRONG[found]
    sizes = Sizes(heads=2, nope=20, value=12)
    case = make_mla_case([(5, 1), (9, 1)] if regime == "decode" else [(5, 6), (9, 3)], sizes=sizes)
    case.named[name] = change(case.named[name])
    for cores in (cores_of(mla), packed_cores(mla)):
        with pytest.raises(OpError, match=found.partition(":")[0]):
            latent_attention(case.regime, cores, **case.values)


FALLBACKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "queries whose last dimension is not dense": lambda n: {
        "q_nope": torch.stack([n["q_nope"]] * 2, dim=-1)[..., 0],
        "q_pe": torch.stack([n["q_pe"]] * 2, dim=-1)[..., 0],
    },
    "block tables that are not dense": lambda n: {"block_tables": torch.stack([n["block_tables"]] * 2, dim=-1)[..., 0]},
    "block tables of another type": lambda n: {"block_tables": n["block_tables"].int()},
    "angles of another type": lambda n: {"cos": n["cos"].double(), "sin": n["sin"].double()},
    "latents that are not dense": lambda n: {"compressed": torch.stack([n["compressed"]] * 2, dim=-1)[..., 0]},
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_falls_back_to_plain_torch(mla: CpuMla, what: str) -> None:
    case = make_mla_case(BATCHES["mixed"])
    case.named.update(FALLBACKS[what](case.named))
    check(mla, case)


@pytest.mark.parametrize("sizes", [Sizes(rank=1100), Sizes(nope=300), Sizes(nope=7, value=5, rank=9), Sizes(value=300)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_falls_back_for_sizes_that_it_lacks(mla: CpuMla, sizes: Sizes, dtype: torch.dtype) -> None:
    case = make_mla_case(BATCHES["mixed"], sizes=sizes, dtype=dtype)
    check(mla, case)


def test_angles_of_the_model_s_type(mla: CpuMla) -> None:
    case = make_mla_case(BATCHES["mixed"], dtype=torch.bfloat16)
    named = {**case.named, "cos": case.named["cos"].bfloat16(), "sin": case.named["sin"].bfloat16()}
    expected = {**named, "cos": named["cos"].float(), "sin": named["sin"].float()}
    assert torch.equal(mla.write(*(named[n] for n in WRITES)), mla.write(*(expected[n] for n in WRITES)))


def test_threads_of_python_may_call_it_at_once(mla: CpuMla) -> None:
    sizes = Sizes(heads=2, nope=20, value=12)
    cases = [make_mla_case(BATCHES["uneven"], sizes=sizes, seed=seed) for seed in range(4)]
    failures: list[Exception] = []

    def many(case: MlaCase) -> None:
        try:
            for _ in range(10):
                check(mla, case)
                check(mla, case, cores=packed_cores(mla))
        except (AssertionError, OpError) as error:  # for the main thread
            failures.append(error)

    threads = [threading.Thread(target=many, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("batch", ["decodes", "mixed", "prefills"])
def test_the_one_operator_uses_the_same_kernels(library: Path, mla: CpuMla, batch: str) -> None:
    case, twin = (make_mla_case(BATCHES[batch]) for _ in range(2))
    out = open_kernel(CPU_MLA.name, library)[MLA_ATTENTION_OP](**case.named)
    torch.testing.assert_close(out, run(mla, twin), rtol=1e-5, atol=1e-6)
    assert torch.equal(case.named["latent_cache"].nan_to_num(), twin.named["latent_cache"].nan_to_num())


@pytest.mark.slow
def test_a_library_without_the_type_falls_back(tmp_path: Path) -> None:
    library = tmp_path / "kernel.so"
    find_toolchain(tmp_path, compiler=None).compile_kernel(CPU_MLA.main, macros=("PIECEWORK_BFLOAT16",), target=library)
    case, twin = (make_mla_case(BATCHES["mixed"]) for _ in range(2))
    assert torch.equal(run(CpuMla(library), case), run_plain(twin))


FP8_CASES = (
    (LITE, "mixed"),
    (LITE, "uneven"),
    (Sizes(heads=3), "chunks and decodes"),
    (Sizes(heads=6, rope=6, rank=130), "chunks and decodes"),
    (Sizes(heads=1, rank=300), "decodes"),
    (Sizes(2, 2, 2, 2, 2), "mixed"),
)


@pytest.mark.parametrize(("sizes", "batch", "dtype"), one_in(3, FP8_CASES, TOLERANCES))
def test_caches_in_fp8(mla: CpuMla, batch: str, sizes: Sizes, dtype: torch.dtype) -> None:
    """Entries are plain torch's, but for what rounds the other way; attention is over those that the kernel stored."""
    before = make_mla_case(BATCHES[batch], sizes=sizes, dtype=dtype, block_size=16)
    case, twin, exact = (in_fp8(before.twin()) for _ in range(3))
    out = run(mla, case)
    cores = replace(PLAIN, write=mla.write, write_decode=partial(written_and_decoded, mla))
    wanted = latent_attention(twin.regime, cores, **twin.values)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
    assert torch.equal(case.named["latent_cache"], twin.named["latent_cache"])
    PLAIN.write(*(exact.named[n] for n in WRITES))
    found, plain = (
        mla_cache.decode(c.named["latent_cache"], rank=sizes.rank, rope=sizes.rope, dtype=dtype).float()
        for c in (case, exact)
    )
    torch.testing.assert_close(found, plain, rtol=1 / 7, atol=1e-6, equal_nan=True)  # a step at most
    assert ((found - plain).abs() > 2e-2 * plain.abs()).float().mean() < 1e-2


def written_and_decoded(mla: CpuMla, q_latent: Tensor, q_pe: Tensor, turned: bool, *args: Any) -> Tensor:
    assert turned
    return PLAIN.decode(q_latent, q_pe, mla.write(*args[:7]), args[5], *args[7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_of_fp8_is_read_right(mla: CpuMla, dtype: torch.dtype) -> None:
    """One sequence of one token, whose latent has all codes but NaN; then one with NaN."""
    layout = mla_cache.Fp8Entry(256, 2, dtype.itemsize)
    cache = torch.zeros(1, 16, layout.size, dtype=torch.uint8)
    cache[0, 0, :256] = torch.arange(256)
    cache[0, 0, [0x7F, 0xFF]] = 0
    cache[0, 0, layout.scales : layout.key] = torch.tensor([2.0**-5, 2.0**40]).view(torch.uint8)
    query, tables, lens = (
        torch.zeros(1, 1, 256, dtype=dtype),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1).long(),
    )
    wanted = mla_cache.decode(cache[0, :1], rank=256, rope=2, dtype=dtype)[:, :256]
    found = mla.decode(query, query[..., :2], None, cache, tables, lens, 1.0)
    assert torch.equal(found[0], wanted)
    for code in (0x7F, 0xFF):
        cache[0, 0, 77] = code
        assert mla.decode(query, query[..., :2], None, cache, tables, lens, 1.0)[0, 0, 77].isnan()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_zeros_subnormals_and_nan_are_stored_in_fp8_as_plain_torch_does(mla: CpuMla, dtype: torch.dtype) -> None:
    case = in_fp8(make_mla_case([(0, 50)], sizes=Sizes(rank=300), dtype=dtype))
    named = case.named
    named["norm_weight"] = torch.ones(300, dtype=dtype)
    compressed = named["compressed"]
    compressed[:, :300] = (torch.randn(50, 300) * 2 ** (torch.rand(50, 300) * 20 - 16)).to(dtype)
    compressed[3], compressed[4, 7], compressed[5, 299] = 0, float("nan"), float("nan")
    twin = case.twin()
    entry = mla.write(*(named[n] for n in WRITES))
    wanted = PLAIN.write(*(twin.named[n] for n in WRITES))
    torch.testing.assert_close(entry, wanted, rtol=1 / 7, atol=1e-6, equal_nan=True)
    assert ((entry - wanted).abs() > 1e-5 * wanted.abs())[:, :300].float().mean() < 1e-2
    assert torch.equal(entry[3, :300], torch.zeros(300, dtype=dtype))
    slots = named["slot_mapping"]
    found = mla_cache.take(named["latent_cache"], slots, rank=300, rope=4, dtype=dtype)
    assert torch.equal(found.nan_to_num(7), entry.nan_to_num(7))


def run_plain(case: MlaCase) -> Tensor:
    return latent_attention(case.regime, PLAIN, **case.values)
