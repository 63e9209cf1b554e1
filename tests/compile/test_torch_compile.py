"""`torch.compile(backend="piecework")` with native pieces: writes, views, sizes, weights and the store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.record import Recorder
from piecework.foundation.environment import child_variables
from piecework.integrations.torch_compile import backend
from piecework.ops.ir.opaque_op import opaque_op


@opaque_op("pwcompile::store", mutates=("cache",))
def store(x: Tensor, cache: Tensor, row: int) -> None:
    cache[row].copy_(x.sum(0))


@opaque_op("pwcompile::scale_", mutates=("x",))
def scale_(x: Tensor, by: float) -> None:
    x.mul_(by)


@opaque_op("pwcompile::pick")
def pick(x: Tensor, row: int) -> Tensor:
    return x[row].clone()


@pick.fake
def _(x: Tensor, row: int) -> Tensor:
    return x.new_empty(x.shape[1:])


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, new_home: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PIECEWORK_HOME", str(new_home(tmp_path / "home")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(module: Any, recorder: Recorder, *, dynamic: bool | None = True) -> Any:
    return torch.compile(module, backend=backend, options={"recorder": recorder}, dynamic=dynamic, fullgraph=True)


@pytest.mark.slow
def test_writes_and_views_across_cuts_are_what_eager_mode_gives() -> None:
    linear = nn.Linear(8, 8)

    def forward(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        h = torch.relu(linear(x))
        view = h[1:]  # leaves its piece as a view of another result
        store(h, cache, 1)
        scale_(view, 3.0)  # writes to h as well
        h = h + 1
        x.add_(1)  # an input
        row = pick(h, 2)
        cache[0].copy_(row * 2)
        return h * row, view, cache.t()

    recorder = Recorder()
    run = compiled(forward, recorder)
    for size in (4, 7):
        x, cache = torch.randn(size, 8), torch.zeros(3, 8)
        mine = (x.clone(), cache.clone())
        got, want = run(*mine), forward(x, cache)
        for a, b in zip([*got, *mine], [*want, x, cache], strict=True):
            torch.testing.assert_close(a, b)
    assert recorder.finish().counts["graphs"] == 1


@pytest.mark.slow
def test_sizes_are_inputs_and_results() -> None:
    def forward(x: Tensor) -> tuple[Tensor, int]:
        n = x.shape[0]
        y = (x * n).reshape(-1, 2)
        z = pick(y.repeat(2, 1), n // 2)
        return torch.cat([z, y.sum(0)]) / (n + 1), n * 2

    run = compiled(forward, Recorder())
    for size in (2, 6, 64):
        x = torch.randn(size, 4)
        (got, number), (want, wanted) = run(x), forward(x)
        torch.testing.assert_close(got, want)
        assert number == wanted


@pytest.mark.slow
def test_half_precision_and_a_piece_that_only_passes_on() -> None:
    norm = nn.RMSNorm(8, dtype=torch.bfloat16)

    def forward(x: Tensor) -> Tensor:
        return pick(pick(norm(x).unsqueeze(0), 0).unsqueeze(0), 0)

    x = torch.randn(3, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(forward, Recorder())(x), forward(x))


@pytest.mark.slow
def test_what_the_store_has_is_not_compiled_again_and_a_damaged_piece_is_set_aside(tmp_path: Path) -> None:
    linear = nn.Linear(8, 8)

    def forward(x: Tensor) -> Tensor:
        return pick(torch.nn.functional.gelu(linear(x)), 0) + 1

    x = torch.randn(3, 8)
    found = []
    for _ in range(3):
        torch._dynamo.reset()
        recorder = Recorder()
        torch.testing.assert_close(compiled(forward, recorder)(x), forward(x))
        found.append(recorder.finish())
        if len(found) == 2:
            for artifact in (tmp_path / "home" / "files").glob("*.so"):
                damaged = artifact.read_bytes()[:-100]
                artifact.unlink()  # the library is mapped: what is written into the file itself would be run
                artifact.write_bytes(damaged)
    assert found[0].counts["compiled"] == 2
    assert found[1].counts["compiled"] == 0
    assert found[1].counts["store_hits"] == 2
    assert found[2].counts["compiled"] == 2
    assert sum("set aside" in note for note in found[2].notes) == 2


class Gated(nn.Module):
    """Two linear layers of the same input, which become one, packed; and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(32), *(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def example(*, rows: int) -> Tensor:
    x = torch.randn(rows, 32)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    return x


def test_both_ways_have_one_artifact_and_weights_may_change_in_place() -> None:
    model = nn.Sequential(Gated(), Gated())
    piecework.compile(model, (example(rows=3),), dynamic={"rows": piecework.Dim(2, 64)})
    recorder = Recorder()
    run = torch.compile(model, backend=backend, options={"recorder": recorder})

    def check() -> None:
        for rows in (2, 7):
            x = example(rows=rows)
            torch.testing.assert_close(run(x), model(x))

    check()
    assert (recorder.finish().counts["compiled"], recorder.finish().counts["store_hits"]) == (0, 1)
    model.load_state_dict({k: torch.randn_like(v) * 0.2 for k, v in model.state_dict().items()})
    check()
    model[0].gate.weight.data += 0.1 * torch.randn(32, 32)  # as adapters are merged: torch counts no write
    check()
    model[1].down.weight[3, 3] += 5
    check()
    model[1].up.weight = nn.Parameter(torch.randn(32, 32))
    check()
    assert recorder.finish().counts["graphs"] == 1


@pytest.mark.slow
def test_siblings_that_are_compiled_by_themselves_have_their_own_weights() -> None:
    model, recorder = nn.Sequential(*(Gated() for _ in range(3))), Recorder()
    x = torch.randn(4, 32)
    wanted = model(x)
    for block in model:
        block.compile(backend=backend, options={"recorder": recorder}, dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(model(x), wanted)
    assert (recorder.finish().counts["graphs"], recorder.finish().counts["compiled"]) == (1, 1)
    model[1].gate.weight.mul_(2)
    changed = model(x)
    assert not torch.allclose(changed, wanted)
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(changed, model(x))


_WARM = """
import json, sys
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
import piecework
recorder = piecework.Recorder()
with torch.no_grad():
    torch.compile(model, backend="piecework", options={"recorder": recorder}, dynamic=False)(torch.randn(2, 8))
parts = ("compile_fx", "graph", "scheduler", "lowering", "decomposition")
found = [p for p in parts if f"torch._inductor.{p}" in sys.modules]
print(json.dumps([recorder.finish().counts["compiled"], found]))
"""


def test_a_warm_process_imports_no_compiler(tmp_path: Path) -> None:
    """`torch.compile` itself imports torch._inductor's package, config, utils and codecache, whatever the backend."""
    changes = {"PIECEWORK_HOME": str(tmp_path / "home")}
    for compiles in (1, 0):
        done = subprocess.run(
            [sys.executable, "-c", _WARM], env=child_variables(changes), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == [compiles, []]
