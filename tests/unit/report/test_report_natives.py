"""What inspect says of IR ops that opaque ops call inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle import Bundle, BundleContent
from piecework.bundle.plan import NativeCall, Plan, ShapeRange, UniquePiece
from piecework.cli.main import main
from piecework.errors import CorruptBundle
from piecework.ops.ir.call_form import CallForm, TensorForm
from piecework.report.inspect import describe
from piecework.report.ops import describe_ops

X = TensorForm(("s0", 24), (None, None), "float32", "cpu")
SILU = CallForm("piecework::silu_mul", (X, X), (("s0", 1, 768),))
ROUTE = CallForm("mine::route", (X, 3), (("s0", 1, 768),))
REJECTED = [["aten", "it has none"], ["triton", "no GPU"]]


@pytest.fixture
def bundle(write_sample: Callable[..., Bundle], sample_content: BundleContent, tmp_path: Path) -> Bundle:
    plan = Plan.from_json(sample_content.plan)
    piece = UniquePiece("ef" * 32, "fe" * 32, (ShapeRange(1, 768, next(iter(sample_content.artifacts))),), 2, 0)
    natives = (
        NativeCall(SILU, ("piecework::moe_experts", "mine::experts"), "native", piece),
        NativeCall(ROUTE, ("mine::experts",), "mine"),
    )
    site = {"op": "silu_mul", "arguments": "", "provider": "native", "rejected": REJECTED}
    explanation = {"natives": [{"sites": [site]}, {"sites": []}]}
    content = replace(plan, natives=natives).to_json()
    return write_sample(tmp_path / "b", plan=content, explanation=explanation)


def test_each_has_its_callers_its_provider_and_its_artifact(bundle: Bundle) -> None:
    silu, route = describe(bundle, verified=False).natives
    assert (silu.op, silu.callers, silu.provider) == ("silu_mul", ("piecework::moe_experts", "mine::experts"), "native")
    assert (silu.sizes, silu.rejected, silu.size_bytes) == ({"s0": (1, 768)}, dict(REJECTED), 700)
    assert silu.artifact in bundle.artifacts
    assert silu.num_kernels is None, "the sample's artifacts are no libraries"
    assert (route.op, route.artifact, route.provider, route.rejected) == ("mine::route", "", "mine", {})


def test_text_and_json(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("IR ops inside opaque ops")
    artifact = describe(bundle, verified=False).natives[0].artifact
    assert lines[start + 1 : start + 5] == [
        "  silu_mul(float32[s0, 24], float32[s0, 24]), s0 1 to 768",
        f"    in piecework::moe_experts, mine::experts: native, compiled, {artifact[:12]}…, 700 bytes",
        "  mine::route(float32[s0, 24], 3), s0 1 to 768",
        "    in mine::experts: mine, called",
    ]
    value = json.loads(json.dumps(describe(bundle, verified=False).to_json()))
    assert [native["provider"] for native in value["natives"]] == ["native", "mine"]
    text = describe_ops(bundle).to_text()
    assert "  inside piecework::moe_experts, mine::experts\n  native, compiled\n    not aten: it has none" in text
    assert "no calls of IR ops" not in text


@pytest.mark.parametrize("natives", [3, [{}], [{"sites": [{"rejected": [[1]]}]}]])
def test_what_is_no_list_of_them(
    natives: Any, bundle: Bundle, write_sample: Callable[..., Bundle], tmp_path: Path
) -> None:
    wrong = write_sample(tmp_path / "wrong", plan=bundle.plan(), explanation={"natives": natives})
    with pytest.raises(CorruptBundle, match="does not say what serves calls"):
        describe(wrong, verified=False)
