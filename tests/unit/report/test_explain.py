"""`piecework.explain` of hand-made models: which layers share their pieces, and the first difference of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import piecework
from piecework.bundle import Bundle, BundleContent, write_bundle
from piecework.bundle.format import EXPLANATION
from piecework.compiler.explain import captured_subject
from piecework.errors import BundleError, CaptureError, CorruptBundle, PieceworkError, UnsupportedModelError
from piecework.models.adapter import build_causal_lm
from piecework.report import explain_bundle
from piecework.report.explain import ExplainReport, explain_subject
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import write_config
from tests.unit.report.layered import Block, Gated, Model, Sum, Two, compiled, explained, model

HERE = "tests/unit/report/layered.py"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def groups(report: ExplainReport, *, stack: int = 0) -> dict[tuple[int, ...], tuple[str, ...]]:
    return {group.layers: group.pieces for group in report.stacks[stack].groups}


def first(report: ExplainReport, *, layer: int) -> str:
    """Return what a report says of the first difference of a layer's group."""
    (group,) = (g for g in report.stacks[0].groups if layer in g.layers)
    return group.differences[0].text


def line_of(text: str) -> int:
    """Return the number of the first line of the models' file that contains `text`."""
    lines = (Path(__file__).parent / "layered.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


def test_layers_of_one_structure() -> None:
    report = explained(model())
    assert (report.num_pieces, len(report.pieces)) == (7, 3)
    # the last layer's piece also holds the final norm
    assert groups(report) == {(0, 1, 2, 3, 4): ("B",), (5,): ("C",)}
    (last,) = report.stacks[0].groups[1].differences
    assert last.extra == ("final.weight", "final.bias")
    assert [(p.num_uses, p.layers, p.leads_into) for p in report.pieces] == [
        (1, {}, {"layers": 0}),
        (5, {"layers": (0, 1, 2, 3, 4)}, {}),
        (1, {"layers": (5,)}, {}),
    ]
    assert (report.names.lifted, report.names.baked) == (6, 0)
    (op,) = report.ops
    assert op.locations == (f"{HERE}:{line_of('self.out(torch.ops')}",)
    assert [(a.label, a.kind, a.num_values) for a in op.lifted] == [("argument 2 (name)", "constant", 6)]


def test_another_width() -> None:
    report = explained(model({3: {"width": 64}}))
    assert groups(report) == {(0, 1, 2, 4): ("B",), (3,): ("C",), (5,): ("D",)}
    assert first(report, layer=3) == (
        "shape [64, 16] against [32, 16] of constant w2 (layers.{3,2}.up.weight) used by piecework.linear at "
        f"{HERE}:{line_of('return x + self.down(self.act(self.up(x)))')}"
    )
    assert report.stacks[0].groups[1].reference == 2


def test_another_activation() -> None:
    report = explained(model({3: {"act": nn.functional.gelu}}))
    assert first(report, layer=3).startswith("call 4: aten.gelu against aten.silu at tests/unit/report/layered.py:")


def test_another_constant_in_the_next_layers_part() -> None:
    report = explained(model({3: {"eps": 1e-6}}))
    assert groups(report) == {(0, 1, 3, 4): ("B",), (2,): ("C",), (5,): ("D",)}
    (difference,) = report.stacks[0].groups[1].differences
    assert difference.text.startswith("constant 1e-06 against 1e-05 in argument 5 (eps) of aten.native_layer_norm at ")
    assert difference.layer == 3
    assert "in the beginning of layer 3: constant 1e-06" in report.to_text()


def test_another_order_of_operators() -> None:
    report = explained(Model([Block(0), Sum(1), Block(2), Block(3)]))
    assert first(report, layer=1).startswith(
        "shape [32, 16] against [16, 16] of constant w0 (layers.1.up.weight against layers.0.out.weight) used by "
    )


def test_two_kinds_of_layers() -> None:
    report = explained(Model([Block(0), Block(1), Gated(2), Block(3), Block(4), Gated(5), Block(6)]))
    assert groups(report) == {(0, 1, 3, 4): ("B",), (2, 5): ("C", "D"), (6,): ("E",)}
    assert first(report, layer=2).startswith("different number of operators: 8 against 9; the first that differs is ")
    assert report.names.lifted == 9


def test_two_stacks() -> None:
    module = Two([Block(i) for i in range(3)], [Block(i, width=48) for i in range(4)])
    report = explained(module, example=torch.zeros(4, 16))
    assert [stack.name for stack in report.stacks] == ["encoder", "decoder"]
    assert groups(report) == {(0, 1, 2): ("B",)}
    assert groups(report, stack=1) == {(0, 1, 2): ("C",), (3,): ("D",)}
    assert "layers 0-2 of encoder, leads into layer 0 of decoder" in report.to_text()


def test_no_opaque_op_between_the_layers() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
    report = explained(layers, example=torch.zeros(4, 16))
    assert report.stacks[0].groups == ()
    assert report.stacks[0].uncut == {"A": (0, 1, 2)}
    assert "layers 0-2 are in one piece, A: no opaque op stands between them" in report.to_text()


def test_a_module_without_layers() -> None:
    report = explained(nn.Linear(16, 16), example=torch.zeros(4, 16))
    assert report.stacks == ()
    assert "layers         none" in report.to_text()
    with pytest.raises(PieceworkError, match="no list of modules"):
        explained(nn.Linear(16, 16), example=torch.zeros(4, 16), layers=(0, 1))


def test_layers_that_share_nothing() -> None:
    report = explained(model({i: {"width": 16 * (i + 1)} for i in range(12)}, layers=12))
    text = report.to_text()
    assert "no two layers share all their pieces" in text
    assert "layers 8-11: in 4 more groups (--all)" in text
    assert "--all" not in report.to_text(everything=True)
    assert "layer 11 differs from layer 0" in report.to_text(everything=True)


def test_a_pair() -> None:
    report = explained(model({3: {"width": 64}}), layers=(1, 4))
    (pair,) = report.pairs
    assert (pair.stack, pair.layers) == ("layers", (1, 4))
    assert [piece.pieces for piece in pair.pieces] == [("B", "C"), ("B", "B")]
    assert pair.pieces[0].holders == ((0, 1), (3, 4))
    assert pair.pieces[0].difference.startswith("shape [32, 16] against [64, 16]")
    (op,) = pair.ops
    assert op.differing == (("argument 2 (name)", "'layers.1.mix'", "'layers.4.mix'"),)
    text = report.to_text()
    assert "piece 1: B against C (B reaches over layers 0-1; C reaches over layers 3-4)" in text
    assert "piece 2: B, shared" in text
    assert "unique pieces" not in text


def test_a_pair_of_unequal_length() -> None:
    text = explained(Model([Block(0), Gated(1), Block(2)]), layers=(0, 1)).to_text()
    assert "piece 3: D, of layer 1 only" in text
    assert "opaque op 2: pwexplain::mix, of layer 1 only" in text


@pytest.mark.parametrize("layers", [(0, 6), (99, 1), (2, 2)])
def test_layers_that_do_not_exist(layers: tuple[int, int]) -> None:
    with pytest.raises(PieceworkError) as caught:
        explained(model(), layers=layers)
    assert caught.value.found == "layers with the layers 0-5"
    assert caught.value.try_ == "name two of those layers"


def test_json(tmp_path: Path) -> None:
    for report in (explained(model({3: {"width": 64}})), explained(model(), layers=(0, 1))):
        value = json.loads(json.dumps(report.to_json()))
        assert value == report.to_json()
        assert value["num_pieces"] == 7
        assert value["pieces"][1]["letter"] == "B"
        assert value["stacks"][0]["groups"][0]["layers"][0] == 0
        assert value["names"] == {"lifted": 6, "baked": 0}


@pytest.mark.parametrize("name", ["b", "b.pwb"])
def test_a_bundle_says_the_same(name: str, tmp_path: Path) -> None:
    module = model({3: {"width": 64}})
    captured = explained(module)
    bundle = compiled(module, tmp_path / name)
    for target in (bundle, bundle.path, str(bundle.path)):
        report = piecework.explain(target)
        assert report.stacks == captured.stacks
        assert report.ops == captured.ops
        assert report.pieces == captured.pieces
        assert report.notes == ()


def test_what_a_bundle_holds_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = compiled(model(layers=3), tmp_path / "3"), compiled(model(layers=8), tmp_path / "8")
    content = (short.root / EXPLANATION).read_bytes()
    assert (long.root / EXPLANATION).read_bytes() == content, "its size doesn't depend on the number of layers"
    lines = json.loads(content)["locations"]
    assert set(lines) == {f"{HERE}:{number}" for number in (line_of("self.embed(ids)"), *_block_lines())}
    assert EXPLANATION in short.manifest.files
    assert not any(EXPLANATION in fact.name for fact in short.facts)

    # loading neither needs nor reads it
    monkeypatch.setattr(Bundle, "explanation", lambda self: pytest.fail("read"))
    assert piecework.load(short, weights=model(layers=3))(torch.zeros(2, dtype=torch.int64)).shape == (2, 16)


def _block_lines() -> list[int]:
    return [line_of(t) for t in ("self.out(torch.ops", "return x + self.down(self.act(self.up(x)))", "self.final(x)")]


def without_explanation(bundle: Bundle, out: Path, **changes: Any) -> Bundle:
    content: dict[str, Any] = {
        "plan": bundle.plan(),
        "artifacts": {name: bundle.artifact_path(name) for name in bundle.artifacts},
        "facts": bundle.facts,
        "record": bundle.record(),
        "identity": bundle.identity,
    }
    return write_bundle(out, BundleContent(**{**content, **changes}))


def test_a_bundle_without_explanation(tmp_path: Path) -> None:
    bundle = compiled(model({3: {"width": 64}, 1: {"act": lambda x: nn.functional.silu(x) * 2}}), tmp_path / "new")
    old = without_explanation(bundle, tmp_path / "old")
    assert old.explanation() is None
    report = piecework.explain(old)
    assert groups(report) == groups(piecework.explain(bundle))
    assert first(report, layer=3) == "shape [64, 16] against [32, 16] of layers.{3,2}.up.weight"
    assert first(report, layer=1) == "different number of operators: 10 against 9"
    assert report.names.lifted == 6
    assert "compile it again to have the first difference named" in report.to_text()
    assert not report.has_programs


def test_a_bundle_whose_explanation_is_damaged(tmp_path: Path) -> None:
    bundle = compiled(model(layers=3), tmp_path / "b")
    file = bundle.root / EXPLANATION
    file.write_bytes(file.read_bytes().replace(b"aten.silu", b"aten.relu"))
    with pytest.raises(CorruptBundle, match=r"explain\.json"):
        piecework.explain(tmp_path / "b")
    with pytest.raises(CorruptBundle, match=r"explain\.json"):
        piecework.load(tmp_path / "b", weights=model(layers=3))


@pytest.mark.parametrize(
    ("explanation", "found"),
    [
        ({}, "is malformed: KeyError 'version'"),
        ({"version": 2}, "is malformed: ValueError version 2"),
        ({"version": 1, "locations": [], "arguments": {}, "pieces": [{}], "ops": {}}, "is malformed: KeyError"),
        ({"version": 1, "locations": [], "arguments": {}, "pieces": [], "ops": {}}, "explains other pieces"),
    ],
)
def test_an_explanation_of_something_else(explanation: dict[str, Any], found: str, tmp_path: Path) -> None:
    bundle = compiled(model(layers=3), tmp_path / "b")
    other = without_explanation(bundle, tmp_path / "other", explanation=explanation)
    with pytest.raises(CorruptBundle, match=found):
        explain_bundle(other)


def test_bad_targets(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such file"):
        piecework.explain(tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match=r"neither manifest\.json, .* nor config\.json"):
        piecework.explain(tmp_path)
    with pytest.raises(CaptureError, match="without example arguments"):
        piecework.explain(model())
    with pytest.raises(CaptureError, match="with example arguments"):
        piecework.explain(tmp_path, (torch.zeros(1),))


def test_pieces_that_only_some_batches_need(tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "deepseek_v2"), max_tokens=64))
    subject = captured_subject(request, name="deepseek")
    report = explain_subject(subject)
    assert report.num_pieces == sum(piece.num_uses for piece in report.pieces) == 27
    forwards = {piece.forwards for piece in report.pieces if not piece.layers and not piece.leads_into}
    assert ("decode",) in forwards
    assert all(piece.num_uses for piece in report.pieces)
    assert any(line.endswith("  for decode only") for line in report.to_text().splitlines())


class InPlace(Block):
    """Changes its own intermediate results, so that the graph is traced a second time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.add_(self.norm(x).relu_() if self.act is nn.functional.gelu else self.norm(x).neg_())


def test_source_lines_of_operators_in_place() -> None:
    report = explained(Model([InPlace(i, act=nn.functional.gelu if i == 1 else nn.functional.silu) for i in range(4)]))
    file = f"tests/unit/report/{Path(__file__).name}"
    number = next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "y.add_(self" in line)
    group = next(g for g in report.stacks[0].groups if 1 in g.layers)
    assert "call 4: aten.gelu against aten.silu at tests/unit/report/layered.py:" in group.differences[0].text
    report = explained(Model([Block(0), InPlace(1), Block(2), Block(3)]))
    assert f" at {file}:{number} against tests/unit/report/layered.py:" in first(report, layer=1)
