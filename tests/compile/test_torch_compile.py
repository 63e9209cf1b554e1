"""`torch.compile(backend="piecework")` with native pieces: writes, views, sizes, weights and the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework.bundle.record import Recorder
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
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(module: Any, recorder: Recorder, *, dynamic: bool | None = True) -> Any:
    return torch.compile(module, backend=backend, options={"recorder": recorder}, dynamic=dynamic, fullgraph=True)


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


def test_half_precision_and_a_piece_that_only_passes_on() -> None:
    norm = nn.RMSNorm(8, dtype=torch.bfloat16)

    def forward(x: Tensor) -> Tensor:
        return pick(pick(norm(x).unsqueeze(0), 0).unsqueeze(0), 0)

    x = torch.randn(3, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(forward, Recorder())(x), forward(x))


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
                artifact.write_bytes(artifact.read_bytes()[:-100])
    assert found[0].counts["compiled"] == 2
    assert found[1].counts["compiled"] == 0
    assert found[1].counts["store_hits"] == 2
    assert found[2].counts["compiled"] == 2
    assert sum("set aside" in note for note in found[2].notes) == 2


def test_weights_are_the_module_s_own_and_may_change() -> None:
    linear = nn.Linear(4, 4)
    run = compiled(lambda x: linear(x) * 2, Recorder())
    x = torch.randn(2, 4)
    torch.testing.assert_close(run(x), linear(x) * 2)
    linear.weight.mul_(3)
    torch.testing.assert_close(run(x), linear(x) * 2)
