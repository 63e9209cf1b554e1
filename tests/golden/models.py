"""The models whose pieces are kept in text: two that differ in their norms, one with latents and experts, a user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import piecework
from piecework import LayerName, LayerNameType, opaque_op
from piecework.bundle.bundle import Bundle, open_bundle
from piecework.cli.main import main
from tests.unit.models.tiny import write_config


def _language_model(family: str, directory: Path, **changes: object) -> Bundle:
    model_dir = write_config(directory / "model", family, **changes)
    asked = ["--backend", "eager", "--weights", "none", "--dtype", "float32", "--max-tokens", "64"]
    assert main(["compile", str(model_dir), *asked, "--out", str(directory / "bundle"), "--json"]) == 0
    return open_bundle(directory / "bundle")


@opaque_op("pwgolden::shift")
def shift(x: Tensor, layer: LayerNameType, by: float = 0.5) -> Tensor:
    """Add `by` to [T, 8]; a stand-in for what looks up something by the layer's name."""
    return x + by


@shift.fake
def _(x: Tensor, layer: LayerNameType, by: float = 0.5) -> Tensor:
    return torch.empty_like(x)


class _Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.name = LayerName(f"blocks.{index}")
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(shift(x, self.name, by=0.25))))


def _users_module(directory: Path) -> Bundle:
    module = nn.Sequential(*(_Block(index) for index in range(4))).eval().requires_grad_(requires_grad=False)
    sizes = {"tokens": piecework.Dim(1, 64)}
    options = piecework.CompileOptions(backend=piecework.BackendName.EAGER)
    return piecework.compile(module, (torch.randn(5, 8),), dynamic=sizes, options=options, out=directory / "bundle")


MODELS: Mapping[str, Callable[[Path], Bundle]] = {
    "llama": lambda directory: _language_model("llama", directory),
    "qwen3": lambda directory: _language_model("qwen3", directory),
    "deepseek_v2": lambda directory: _language_model("deepseek_v2", directory, num_hidden_layers=2),
    "users_module": _users_module,
}
"""By the names of their files: what compiles each into a folder, operator by operator."""
