"""`piecework.eager_ops`: bodies are made on first use, shared by blocks and threads, kept in the store, and freed."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.compiler import eager_ops as module
from piecework.errors import OpError
from piecework.ops.activations import gelu_mul, silu_mul
from piecework.ops.ir.selection import current_selection
from piecework.ops.norms import add_rms_norm, rms_norm
from piecework.ops.quantize import quantize_dynamic_per_token
from piecework.ops.rotary import rotary
from tests.unit.compiler.native_modules import gated_int8


@pytest.fixture(scope="module")
def shared(home: Path) -> Iterator[piecework.EagerOps]:
    """A handle for all tests that don't count."""
    ops = piecework.eager_ops(store=home)
    yield ops
    ops.close()


def halves(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(*shape, 48, dtype=dtype).chunk(2, dim=-1)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride() or not a.numel()
        torch.testing.assert_close(a.float(), b.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_results_are_the_native_ones_at_all_sizes(shared: piecework.EagerOps) -> None:
    weight = nn.Parameter(torch.randn(24))
    with shared, torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for rows in (3, 0, 1, 17):
            gate, up = halves(rows)
            close(silu_mul(gate, up), silu_mul.native(gate, up))
            x = torch.randn(rows, 24)
            close(add_rms_norm(x, x + 1, weight=weight), add_rms_norm.native(x, x + 1, weight))
            close(gated_int8(gate, up)[1], gated_int8.native(gate, up)[1])
    kinds = [text.partition("(")[0] for text in shared.compiled]
    assert {"add_rms_norm", "piecework_test_natives::gated_int8", "silu_mul"} <= set(kinds)
    assert len(kinds) == len(set(kinds))
    assert shared.fallbacks == {}


@pytest.mark.slow
def test_axes_beside_the_last_may_all_differ(shared: piecework.EagerOps) -> None:
    known = len(shared.compiled)
    with shared, torch.inference_mode():
        for batch, rows in ((1, 1), (2, 5), (3, 0), (4, 4)):
            gate, up = halves(batch, rows)
            close(silu_mul(gate, up), silu_mul.native(gate, up))
        for rows in (5, 1, 9):
            q, k = (torch.randn(1, rows, heads, 8).transpose(1, 2) for heads in (4, 2))
            cos, sin = torch.randn(rows, 8), torch.randn(rows, 8)
            close(rotary(q, k, cos, sin), rotary.native(q, k, cos, sin))
    assert len(shared.compiled) == known + 2
    assert shared.fallbacks == {}


@pytest.mark.slow
def test_tensors_that_are_broadcast_and_dtypes_that_differ(shared: piecework.EagerOps) -> None:
    with shared, torch.no_grad():
        for rows in (5, 2):
            gate, up = torch.randn(rows, 8), torch.randn(1, 8)
            close(silu_mul(gate, up), silu_mul.native(gate, up))
            half = torch.randn(rows, 8, dtype=torch.bfloat16)
            torch.testing.assert_close(
                gelu_mul(half, half, "tanh"), gelu_mul.native(half, half, "tanh"), atol=3e-2, rtol=3e-2
            )
    assert shared.fallbacks == {}


@pytest.mark.slow
def test_blocks_nest_and_repeat_without_compiling_again(home: Path) -> None:
    ops = piecework.eager_ops(store=home)
    weight = torch.randn(24)
    for rows in (1, 4):
        with ops, torch.compiler.set_stance("fail_on_recompile"):
            rms_norm(torch.randn(rows, 24), weight)
            with piecework.providers("native"), ops, piecework.providers("native"):
                rms_norm(torch.randn(rows + 1, 24), weight)
            assert current_selection() is not None
        assert current_selection() is None
    assert len(ops.compiled) == 1
    counts = ops.record.counts
    assert counts["compiled"] + counts["store_hits"] == 1
    assert ops.fallbacks == {}
    again = piecework.eager_ops(store=home)
    with again:
        rms_norm(torch.randn(2, 24), weight)
    assert (again.record.counts["compiled"], again.record.counts["store_hits"]) == (0, 1)


@pytest.mark.slow
def test_a_nested_order_has_bodies_of_its_own(home: Path) -> None:
    ops = piecework.eager_ops(store=home)
    x, weight = torch.randn(3, 24), torch.randn(24)
    with ops:
        rms_norm(x, weight)
        with piecework.providers("aten,native"):
            close(rms_norm(x, weight), rms_norm.native(x, weight))
            assert len(ops.compiled) == 2
        with piecework.providers(["rms_norm[1:3]=aten,native", "native"]):
            rms_norm(x, weight)
            rms_norm(torch.randn(4, 24), weight)
    assert len(ops.compiled) == 2, "bodies by their provider"
    assert ops.record.counts["compiled"] + ops.record.counts["store_hits"] == 2


def test_threads_and_tasks_share_a_handle_and_keep_their_selections(shared: piecework.EagerOps) -> None:
    gate, up = halves(3)
    found: list[Any] = []

    def work() -> None:
        found.append(current_selection())
        with shared:
            found.append(silu_mul(gate, up))
        found.append(current_selection())

    threads = [threading.Thread(target=work) for _ in range(3)]
    with shared:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def task(ops: piecework.EagerOps) -> None:
        with ops:
            await asyncio.sleep(0)
            silu_mul(gate, up)
            await asyncio.sleep(0)
        assert current_selection() is None

    async def tasks() -> None:
        await asyncio.gather(*(task(shared) for _ in range(3)))

    asyncio.run(tasks())
    assert found.count(None) == 6
    for result in found:
        if result is not None:
            close(result, silu_mul.native(gate, up))


def test_inside_torch_compile_the_call_is_inlined(home: Path) -> None:
    ops = piecework.eager_ops(store=home)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda a, b: silu_mul(a, b) * 2, backend=backend, fullgraph=True)
    gate, up = halves(3)
    with ops:
        close(compiled(gate, up), silu_mul.native(gate, up) * 2)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(gate, up)
    (graph,) = graphs
    assert all("piecework" not in str(node.target) for node in graph.graph.nodes)
    assert ops.compiled == ()
    assert ops.record.counts == {}


def test_closing_frees(home: Path) -> None:
    gate, up = halves(3)
    for explicit in (True, False):
        ops = piecework.eager_ops(store=home)
        with ops:
            silu_mul(gate, up)
            assert ops._bodies is not None
            runner = weakref.ref(ops._bodies.bodies[0]._run.__self__)
            assert runner() is not None
            if explicit:
                ops.close()
                gc.collect()
                assert runner() is None
                close(silu_mul(gate, up), silu_mul.native(gate, up))
        if explicit:
            with pytest.raises(OpError, match="its handle is closed"), ops:
                pass
        del ops
        assert runner() is None, "nothing else holds it"


def test_what_cannot_be_compiled_runs_and_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = piecework.eager_ops(store=home)
    across = torch.randn(24, 3).t()
    with ops:
        close(rms_norm(across).contiguous(), rms_norm.native(across).contiguous())
        rms_norm(across)
        monkeypatch.setattr(module, "MOST_ROWS", 4)
        rms_norm(torch.randn(5, 24))
        with pytest.raises(RuntimeError):
            silu_mul(torch.randn(3, 8), torch.randn(3, 7))
    assert ops.compiled == ()
    assert ops.fallbacks["rms_norm(float32[*, 24], None, 1e-06, 0.0, True)"] == 3
    notes = ops.record.notes
    assert notes[0] == "rms_norm runs uncompiled: a tensor of rms_norm whose rows are not each in one piece"
    assert notes[1] == "rms_norm runs uncompiled: a tensor of rms_norm with more than 4 rows"
    assert "must match the size" in notes[2]


def test_without_compiling_it_selects_providers() -> None:
    ops = piecework.eager_ops(compile=False, providers="aten,native")
    with ops:
        selection = current_selection()
        assert selection is not None
        assert selection.order.text() == "aten,native"
        rms_norm(torch.randn(2, 8))
    assert ops.compiled == ()
    assert ops.record.counts == {}
    assert current_selection() is None


@pytest.mark.slow
def test_another_process_loads_and_compiles_nothing(home: Path) -> None:
    ops = piecework.eager_ops(store=home)
    with ops:
        quantize_dynamic_per_token(torch.randn(3, 24), torch.int8)
    code = """
import json, torch, piecework
from piecework.ops.quantize import quantize_dynamic_per_token
with piecework.eager_ops() as ops:
    x = torch.randn(7, 24)
    found, expected = quantize_dynamic_per_token(x, torch.int8), quantize_dynamic_per_token.native(x, torch.int8)
    torch.testing.assert_close(found[1], expected[1])
    print(json.dumps([dict(ops.record.counts), len(ops.compiled)]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=600)
    assert json.loads(done.stdout.splitlines()[-1]) == [{"store_hits": 1, "compiled": 0}, 1]
