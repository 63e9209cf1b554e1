"""The native attention kernel against the per-token reference, built for this machine and for lesser ones."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from piecework.compiler.backends.toolchain import find_toolchain
from piecework.errors import OpError
from piecework.ops.attention import attention_native
from piecework.providers.cpu_attention.kernel import CpuAttention
from piecework.providers.libraries import CPU_ATTENTION
from tests.choice import one_in
from tests.compile.native_kernels import MACHINES, build
from tests.unit.ops.attention_cases import BATCHES, TOLERANCES, Case, drawn_cases, make_case, reference

NAN = float("nan")


@pytest.fixture(scope="module", params=MACHINES)
def attention(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuAttention:
    directory = tmp_path_factory.mktemp("kernel")
    return CpuAttention(build(CPU_ATTENTION.main, CPU_ATTENTION.dtypes, request.param, directory))


@pytest.fixture(autouse=True)
def no_plain_torch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail where a call that the kernel should do is left to plain torch."""

    def refuse(*_args: object) -> None:
        pytest.fail("plain torch was called")

    if "falls_back" not in request.node.name:
        monkeypatch.setattr("piecework.providers.cpu_attention.kernel.attend_with", refuse)


def check(attention: CpuAttention, case: Case, **options: Any) -> Tensor:
    expected = reference(case, **options)
    out = attention(*case.args, **options)
    tolerance = TOLERANCES[case.args[0].dtype]
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize(
    ("dtype", "window", "softcap", "heads", "kv_heads", "batch"),
    one_in(8, TOLERANCES, [(0, 0.0), (3, 0.0), (4, 1.5), (100, 0.0)], [(4, 4), (4, 2), (3, 1), (12, 1)], BATCHES),
)
def test_equals_the_reference(
    attention: CpuAttention,
    batch: str,
    heads: int,
    kv_heads: int,
    window: int,
    softcap: float,
    dtype: torch.dtype,
) -> None:
    case = make_case(BATCHES[batch], heads=heads, kv_heads=kv_heads, stale=NAN, window=window, dtype=dtype)
    check(attention, case, scale=0.3, sliding_window=window, softcap=softcap)


@pytest.mark.parametrize(("batch", "dtype"), one_in(3, BATCHES, TOLERANCES))
def test_sinks(attention: CpuAttention, batch: str, dtype: torch.dtype) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, stale=NAN, dtype=dtype)
    check(attention, case, scale=0.3, sinks=torch.tensor([-3.0, 0.0, 1.0, 40.0]).to(dtype))


@pytest.mark.parametrize(("batch", "dtype"), one_in(3, BATCHES, TOLERANCES))
def test_chunks(attention: CpuAttention, batch: str, dtype: torch.dtype) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, stale=NAN, chunk=6, dtype=dtype)
    check(attention, case, scale=0.3, chunk=6)


@pytest.mark.parametrize(("batch", "dtype", "kv_heads"), one_in(6, BATCHES, TOLERANCES, [4, 2]))
def test_biases(attention: CpuAttention, batch: str, dtype: torch.dtype, kv_heads: int) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=kv_heads, stale=NAN, dtype=dtype)
    check(attention, case, scale=0.3, key_bias=torch.randn(4, 110) * 4)


def test_a_sequence_longer_than_its_biases_is_refused(attention: CpuAttention) -> None:
    case = make_case([(0, 9)], heads=4, kv_heads=2)
    with pytest.raises(OpError, match="sequence lengths"):
        attention(*case.args, scale=0.3, key_bias=torch.randn(4, 8))


@pytest.mark.slow
@given(drawn=drawn_cases())
@settings(max_examples=40, deadline=None)
def test_equals_the_reference_whatever_the_batch(attention: CpuAttention, drawn: tuple[Case, dict[str, Any]]) -> None:
    case, options = drawn
    check(attention, case, **options)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_sequences_are_split_among_threads(attention: CpuAttention, threads: int) -> None:
    case = make_case([(2000, 1), (3, 1), (999, 1), (300, 90)], heads=6, kv_heads=2, stale=NAN, block_size=16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(attention, case, scale=0.3, sinks=torch.randn(6))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [400, 9000])
def test_large_scores_neither_overflow_nor_vanish(attention: CpuAttention, tokens: int) -> None:
    case = make_case([(tokens, 1), (0, 70)], heads=2, kv_heads=1, stale=NAN, block_size=16)
    for tensor in case.args[:2]:
        tensor.mul_(30)
    case.args[3][0].mul_(30)
    for keys, _ in case.histories:
        keys.mul_(30)
    check(attention, case, scale=1.0)
    check(attention, case, scale=-1.0)


def test_one_sequences_nan_stays_its_own(attention: CpuAttention) -> None:
    case = make_case([(20, 1), (20, 1), (0, 9), (0, 9)], heads=4, kv_heads=2)
    case.args[1][1] = NAN  # the key of the second sequence
    case.args[2][2 + 4] = NAN  # a value in the third
    out = attention(*case.args, scale=0.3)
    starts = case.args[7].tolist()
    nan = [bool(out[a:b].isnan().any()) for a, b in itertools.pairwise(starts)]
    assert nan == [False, True, True, False]


def test_writes_every_new_token_to_its_slot_and_nothing_else(attention: CpuAttention) -> None:
    case, twin = (make_case(BATCHES["mixed"], heads=4, kv_heads=2) for _ in range(2))
    attention(*case.args, scale=0.3)
    attention_native(*twin.args, scale=0.3)
    assert torch.equal(case.args[3], twin.args[3])
    written = case.args[3].clone()
    query, _, _, cache, _, *rest = case.args
    expected = attention_native(*twin.args, scale=0.3)
    torch.testing.assert_close(attention.attend(query, cache, *rest, 0.3), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache, written)


def _with(case: Case, position: int, value: object) -> tuple[Any, ...]:
    return (*case.args[:position], value, *case.args[position + 1 :])


WRONG = {
    "a slot outside of the cache": (4, lambda c: c.args[4] + 1000),
    "a slot outside of the cache: negative": (4, lambda c: c.args[4] - 1000),
    "a block outside of the cache": (5, lambda c: c.args[5] + 1000),
    "a block outside of the cache: negative": (5, lambda c: -c.args[5]),
    "sequence lengths": (6, lambda c: c.args[6] * 100),
    "sequence lengths: none": (6, lambda c: c.args[6] * 0),
    "sequence lengths: starts": (7, lambda c: c.args[7].flip(0)),
}


@pytest.mark.parametrize("found", WRONG)
def test_numbers_that_lead_outside_are_refused(attention: CpuAttention, found: str) -> None:
    case = make_case(BATCHES["mixed"], heads=4, kv_heads=2)
    before = case.args[3].clone()
    position, change = WRONG[found]
    with pytest.raises(OpError, match=found.partition(":")[0]):
        attention(*_with(case, position, change(case)), scale=0.3)
    assert torch.equal(case.args[3], before)


FALLBACKS: dict[str, Callable[[Case], tuple[Any, ...]]] = {
    "a query whose last dimension is not dense": lambda c: _with(
        c, 0, torch.empty(*c.args[0].shape, 2)[..., 0].copy_(c.args[0])
    ),
    "a cache that is not dense": lambda c: _with(c, 3, torch.cat([c.args[3]] * 2, dim=-1)[..., :8]),
    "block tables that are not dense": lambda c: _with(
        c, 5, torch.cat([c.args[5]] * 2, dim=1)[:, : c.args[5].shape[1]]
    ),
    "values that are not dense": lambda c: _with(c, 2, c.args[2].transpose(1, 2).contiguous().transpose(1, 2)),
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_falls_back_to_plain_torch(attention: CpuAttention, what: str) -> None:
    case, twin = (make_case(BATCHES["mixed"], heads=4, kv_heads=2) for _ in range(2))
    args = FALLBACKS[what](case)
    expected = attention_native(*twin.args, scale=0.3)
    torch.testing.assert_close(attention(*args, scale=0.3), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(args[3], twin.args[3])


@pytest.mark.parametrize("head_dim", [1, 3, 300])
def test_falls_back_for_head_dims_that_it_lacks(attention: CpuAttention, head_dim: int) -> None:
    case, twin = (make_case(BATCHES["mixed"], heads=4, kv_heads=2, head_dim=head_dim) for _ in range(2))
    assert torch.equal(attention(*case.args, scale=0.3), attention_native(*twin.args, scale=0.3))


def test_threads_of_python_may_call_it_at_once(attention: CpuAttention) -> None:
    cases = [make_case(BATCHES["uneven"], heads=4, kv_heads=2, seed=seed) for seed in range(4)]
    failures: list[Exception] = []

    def run(case: Case) -> None:
        try:
            for _ in range(20):
                check(attention, case, scale=0.3)
        except (AssertionError, OpError) as error:  # for the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.slow
def test_a_library_without_the_type_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernel.so"
    toolchain = find_toolchain(tmp_path, compiler=None)
    toolchain.compile_kernel(CPU_ATTENTION.main, macros=("PIECEWORK_BFLOAT16",), target=library)
    monkeypatch.undo()
    case, twin = (make_case(BATCHES["mixed"], heads=4, kv_heads=2) for _ in range(2))
    assert torch.equal(CpuAttention(library)(*case.args, scale=0.3), attention_native(*twin.args, scale=0.3))
