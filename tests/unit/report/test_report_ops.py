"""From a module that calls IR ops to a bundle that says which provider each call has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.cli.main import main
from piecework.errors import CorruptBundle, StaleBundle
from piecework.ops.activations import silu_mul
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.norms import rms_norm
from piecework.report.ops import describe_ops
from piecework.spec.compile_options import BackendName, CompileOptions
from tests.unit.report.layered import OP
from tests.unit.report.test_explain import without_explanation


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.weight, 1e-5)
        return silu_mul(self.gate(y), self.up(y))


def _compiled(out: Path, rules: str) -> piecework.Bundle:
    options = CompileOptions(backend=BackendName.EAGER, providers=ProviderOrder.parse(rules))
    return piecework.compile(
        _MODULE, (torch.randn(3, 16),), dynamic={"rows": piecework.Dim(1, 64)}, options=options, out=out
    )


torch.manual_seed(0)
_MODULE = Block().requires_grad_(False)


@pytest.mark.parametrize("rules", ["native", "aten,native", "rms_norm=nobody,aten,native"])
def test_results_are_the_same_with_any_order(tmp_path: Path, rules: str) -> None:
    model = piecework.load(_compiled(tmp_path / "b", rules), weights=_MODULE)
    for rows in (1, 2, 64):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(model(x), _MODULE(x))


def test_the_bundle_says_which_provider_each_call_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = _compiled(tmp_path / "b", "rms_norm=nobody,aten,native")
    report = describe_ops(bundle)
    assert [(call.piece, call.op, call.provider) for call in report.calls] == [
        ("A", "rms_norm", "aten"),
        ("A", "silu_mul", "native"),
    ]
    assert "no installed package" in report.calls[0].rejected["nobody"]
    assert main(["inspect", str(bundle.path), "--ops"]) == 0
    text = capsys.readouterr().out
    assert "providers      native;rms_norm=nobody,aten,native" in text
    assert "1 × rms_norm(float32[rows, 16], float32[16], 1e-05), piece A" in text
    assert f"  at tests/unit/report/{Path(__file__).name}:{line_of('y = rms_norm(')} in Block.forward" in text
    assert "    not native: aten comes before it" in text


class Stack(nn.Module):
    """A norm in the piece before the first opaque op, and in each of those between two and after the last."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.backs = nn.ModuleList(nn.Linear(24, 16, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block, back in zip(self.blocks, self.backs, strict=True):
            x = torch.ops.pwexplain.mix(back(block(x)), "name")
        return x


def test_calls_that_differ_in_their_layer_only_are_one(tmp_path: Path) -> None:
    stack = Stack(4).requires_grad_(False)
    options = CompileOptions(backend=BackendName.EAGER)
    dynamic = {"rows": piecework.Dim(1, 64)}
    bundle = piecework.compile(
        stack, (torch.randn(3, 16),), dynamic=dynamic, opaque=[OP], options=options, out=tmp_path / "b"
    )
    report = describe_ops(bundle)
    lines = report.to_text().splitlines()
    calls = [line for line in lines if " × " in line]
    assert calls == [
        "4 × rms_norm(float32[rows, 16], float32[16], 1e-05), piece A",
        "4 × silu_mul(float32[rows, 24], float32[rows, 24]), piece A",
    ]
    assert {call.source.rpartition(" in ")[2] for call in report.calls} == {"Block.forward"}


def test_a_bundle_whose_calls_have_no_source_lines(tmp_path: Path) -> None:
    bundle = _compiled(tmp_path / "b", "native")
    explanation = dict(bundle.explanation() or {})
    explanation["ir_ops"] = [[{k: v for k, v in s.items() if k != "source"} for s in p] for p in explanation["ir_ops"]]
    old = without_explanation(bundle, tmp_path / "old", explanation=explanation)
    assert [call.source for call in describe_ops(old).calls] == ["", ""]
    assert "  at " not in describe_ops(old).to_text()
    explanation["ir_ops"] = [[{"op": "rms_norm"}]]
    with pytest.raises(CorruptBundle, match="does not say what became of IR ops"):
        describe_ops(without_explanation(bundle, tmp_path / "wrong", explanation=explanation))


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.strip().startswith(text))


def test_another_selection_at_load_is_a_miss_that_says_so(tmp_path: Path) -> None:
    bundle = _compiled(tmp_path / "b", "aten,native")
    piecework.load(bundle, weights=_MODULE, providers="aten,native")
    with pytest.raises(StaleBundle, match="option providers: bundle aten,native, here native"):
        piecework.load(bundle, weights=_MODULE, providers=ProviderOrder())


def test_a_bundle_without_ir_ops_says_that(tmp_path: Path) -> None:
    options = CompileOptions(backend=BackendName.EAGER)
    bundle = piecework.compile(nn.ReLU(), (torch.randn(3),), options=options, out=tmp_path / "b")
    assert describe_ops(bundle).to_text().endswith("no calls of IR ops")
