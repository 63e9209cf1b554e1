"""What calls the kernels of multi-head latent attention, without a library; nothing is compiled here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.compiler.kernel_builds import KernelJob, kernel_jobs
from piecework.compiler.split import OpaqueCall
from piecework.errors import BundleError
from piecework.foundation.target import make_target
from piecework.foundation.torch_private import find_overload
from piecework.ops.mla.core import LatentCores, latent_attention
from piecework.ops.mla.operators import PLAIN, row_view
from piecework.providers.cpu_mla.kernel import CpuMla
from piecework.providers.cpu_mla.prefill import Rounds
from piecework.providers.cpu_mla.rounds import share_out
from piecework.providers.libraries import CPU_MLA, open_kernel
from piecework.spec.compile_options import CompileOptions
from tests.unit.ops.mla_cases import BATCHES, make_mla_case


def test_a_library_of_another_version() -> None:
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    with pytest.raises(BundleError, match="piecework_mla_write"):
        open_kernel(CPU_MLA.name, library)


def test_every_operator_has_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(CpuMla, "__init__", lambda self, library: opened.append(library))
    made = open_kernel(CPU_MLA.name, Path("kernel.so"))
    assert opened == [Path("kernel.so")]
    assert set(made) == CPU_MLA.operators


def test_is_built_for_every_operator_and_the_types_it_is_called_with() -> None:
    def call(name: str, dtype: torch.dtype) -> OpaqueCall:
        first = SimpleNamespace(meta={"val": torch.empty(1, dtype=dtype, device="meta")})
        return OpaqueCall(SimpleNamespace(target=find_overload(name), args=(first,)), ())

    target = make_target("x86_64", system="linux", flags=frozenset({"avx2", "fma"}))
    for name in CPU_MLA.operators:
        calls = [call(name, torch.bfloat16), call(name, torch.float32)]
        jobs = kernel_jobs(calls, options=CompileOptions(), target=target, device="cpu")
        assert jobs == (KernelJob(CPU_MLA, ("float32", "bfloat16")),), name


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("gathered", [0, 1])
def test_what_a_library_does_not_support_plain_torch_does(batch: str, gathered: int) -> None:
    idle = CpuMla.__new__(CpuMla)
    idle._write = idle._decode = idle._write_decode = lambda call: 1
    idle._rounds = Rounds(gather=lambda call: gathered, attend=lambda call: 1)
    case, twin = (make_mla_case(BATCHES[batch]) for _ in range(2))
    cores = LatentCores(idle.write, idle.decode, idle.write_decode, idle.prefill, row_view)
    out = latent_attention(case.regime, cores, **case.values)
    expected = latent_attention(case.regime, PLAIN, **twin.values)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(case.named["latent_cache"].nan_to_num(), twin.named["latent_cache"].nan_to_num())


@given(
    contexts=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), max_size=6),
    most=st.sampled_from([1, 100, 256, 700, 5000]),
)
@settings(deadline=None)
def test_rounds_hold_all_context_once_and_in_order(contexts: list[tuple[int, int]], most: int) -> None:
    context = {seq: old for seq, (old, _) in enumerate(contexts)}
    new = [num for _, num in contexts]
    rounds = share_out(context, new, most=most)
    assert all(sum(chunk.count for chunk in chunks) <= most for chunks in rounds)
    states: set[int] = set()
    for seq, old in context.items():
        mine = [chunk for chunks in rounds for chunk in chunks if chunk.seq == seq]
        assert len({id(chunks) for chunks in rounds if any(p.seq == seq for p in chunks)}) == len(mine)
        assert [p.begin for p in mine] == [sum(p.count for p in mine[:i]) for i in range(len(mine))]
        assert sum(p.count for p in mine) == old
        assert [p.resumed for p in mine] == [i > 0 for i in range(len(mine))]
        assert [p.paused for p in mine] == [i < len(mine) - 1 for i in range(len(mine))]
        assert len({p.state for p in mine}) == 1
        if len(mine) > 1:
            rows = set(range(mine[0].state, mine[0].state + new[seq]))
            assert mine[0].state % 64 == 0
            assert not rows & states
            states |= rows
