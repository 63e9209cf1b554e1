"""`torch.compile(backend="piecework")` on a GPU: names lifted, pieces shared and found in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.integrations import named_ops
from torch import Tensor, nn

from piecework.bundle.record import Recorder
from piecework.integrations.torch_compile import backend
from piecework.ops.ir.layer import LayerName

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


class Block(nn.Module):
    def __init__(self, kind: str, layer: Any) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(64, 128), nn.Linear(128, 64), nn.RMSNorm(64)
        self.layer, self.kind = layer, kind

    def forward(self, x: Tensor) -> Tensor:
        h = named_ops.update[self.kind](torch.nn.functional.silu(self.first(self.norm(x))), self.layer)
        return x + self.second(named_ops.attend[self.kind](h, self.layer)) * 0.01


@pytest.mark.parametrize("kind", ["LayerName", "str", "int"])
def test_pieces_are_shared_and_stored(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    make = {"LayerName": lambda i: LayerName("n" * i), "str": lambda i: "n" * i, "int": lambda i: i}[kind]
    model = nn.Sequential(*(Block(kind, make(i)) for i in range(6))).cuda()
    with torch.no_grad():
        for expected in ("compiled", "store_hits"):
            torch._dynamo.reset()
            recorder = Recorder()
            run = torch.compile(model, backend=backend, options={"recorder": recorder}, dynamic=True, fullgraph=True)
            for size in (3, 17):
                x = torch.randn(size, 64, device="cuda")
                torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)
            assert recorder.finish().counts[expected] == 3
