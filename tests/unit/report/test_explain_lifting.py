"""Names and layers of hand-made plans."""

from __future__ import annotations

from typing import Any

import pytest

from piecework.bundle.plan import Instance, OpStep, PieceStep, Plan, Recipe, State, UniquePiece
from piecework.ops.ir.program import Call, Program, TensorSpec
from piecework.report.explain import explain_subject
from piecework.report.layers import find_stacks, layer_of_name
from piecework.report.lifting import NameCounts, count_names, lift_report
from piecework.report.listing import Listing
from piecework.report.spelling import spell_numbers
from piecework.report.subject import ExplainedPlan, Explanation, piece_letter

ROW = TensorSpec((8,), (1,), "float32", "cpu")


def program(call: Call) -> Program:
    return Program(symbols=(), inputs=(ROW,), constants=(ROW,), calls=(call,), outputs=({"n": 0},))


def plan(steps: list[Any], *, names: list[str], pieces: list[int], states: int = 0) -> Plan:
    """Return a plan whose instance i binds the tensor `names[i]` and is of the unique piece `pieces[i]`."""
    return Plan(
        sizes={},
        primary="",
        inputs=(),
        states=tuple(State(f"layers.{i}.cache", (1,), "float32", "cpu") for i in range(states)),
        recipes=tuple(Recipe(name, (8,), "float32") for name in names),
        pieces=tuple(
            UniquePiece(f"{n}" * 64, f"{n}" * 64, (), num_ops=1, num_constants=1) for n in sorted(set(pieces))
        ),
        instances=tuple(Instance(piece, (i,)) for i, piece in enumerate(pieces)),
        steps=tuple(steps),
        num_slots=1,
        output_slots=(0,),
        structure=None,
    )


def run(instance: int) -> PieceStep:
    return PieceStep(instance, (0,), (0,))


def op(*args: Any, name: str = "mylib::mix.default") -> OpStep:
    return OpStep(name, ({"slot": 0}, *args), {}, (0,))


def subject(made: Plan, *, calls: list[Call] | None = None) -> ExplainedPlan:
    listings = tuple(Listing(program(call)) for call in calls or ())
    known = Explanation(listings, op_arguments={"mylib::mix.default": ("x", "layer")}) if calls is not None else None
    return ExplainedPlan("sample", "by hand", made, known)


NAMES = [f"layers.{i}.w" for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "kind", "names"),
    [
        ([{"layer": f"layers.{i}"} for i in range(3)], "layer name", 3),
        ([{"layer": "same"}] * 3, "layer name", 3),
        ([{"const": f"layers.{i}"} for i in range(3)], "constant", 3),
        ([{"const": i} for i in range(3)], "constant", 3),
        ([{"const": 0.5 * i} for i in range(3)], "constant", 0),
        ([{"dtype": name} for name in ("float32", "bfloat16", "float16")], "constant", 0),
        ([{"list": [{"const": i}]} for i in range(3)], "", 0),
        ([{"state": i} for i in range(3)], "state", 0),
        ([{"recipe": i} for i in range(3)], "weight", 0),
        ([{"const": 1}] * 3, "", 0),
    ],
)
def test_what_differs_between_calls(arguments: list[dict[str, Any]], kind: str, names: int) -> None:
    steps = [step for i in range(3) for step in (run(i), op(arguments[i]))]
    made = subject(plan(steps, names=NAMES, pieces=[0, 0, 0], states=3), calls=[Call("aten.neg.default", (), {})])
    (report,) = lift_report(made)
    assert [(a.label, a.kind) for a in report.lifted] == ([("argument 2 (layer)", kind)] if kind else [])
    assert report.num_calls == 3
    assert count_names(made) == NameCounts(lifted=names, baked=0)


def test_names_that_are_baked_into_pieces() -> None:
    calls = [Call("mylib.mix.default", ({"i": 0}, f"layers.{i}"), {}) for i in range(3)]
    made = subject(plan([run(0), run(1), run(2)], names=NAMES, pieces=[0, 1, 2]), calls=calls)
    assert count_names(made) == NameCounts(lifted=0, baked=3)
    text = explain_subject(made).to_text()
    assert "names lifted   0 of 3, and 3 baked into pieces" in text
    assert "no two layers share all their pieces" in text
    assert "constant 'layers.1' against 'layers.0' in argument 2 of mylib.mix" in text


@pytest.mark.parametrize("call", [Call("mylib.mix.default", ({"i": 0}, "fast"), {}), Call("aten.add", (1, 2), {})])
def test_constants_that_are_no_names(call: Call) -> None:
    made = subject(plan([run(0), run(1), run(2)], names=NAMES, pieces=[0, 0, 0]), calls=[call])
    assert count_names(made) == NameCounts(0, 0)


def test_without_programs_only_the_plan_speaks() -> None:
    made = subject(plan([run(0), run(1), run(2)], names=NAMES, pieces=[0, 1, 0]))
    (stack,) = explain_subject(made).stacks
    assert [group.layers for group in stack.groups] == [(0, 2), (1,)]
    assert stack.groups[1].differences[0].text == "not in the number of operators, nor in the constants' shapes"


def test_a_list_of_one_is_no_stack() -> None:
    names = ["heads.0.layers.0.w", "heads.0.layers.1.w", "norm.w"]
    (stack,) = find_stacks(plan([run(0), run(1), run(2)], names=names, pieces=[0, 0, 1]))
    assert stack.name == "heads.0.layers"
    assert [layer.number for layer in stack.layers] == [0, 1]


def test_the_outermost_list_is_the_stack() -> None:
    names = [f"layers.{i}.experts.{j}.w" for i in range(2) for j in range(2)]
    (stack,) = find_stacks(plan([run(i) for i in range(4)], names=names, pieces=[0] * 4))
    assert stack.name == "layers"
    assert [layer.own for layer in stack.layers] == [(0, 1), (2, 3)]
    assert not stack.spans


def test_a_piece_without_names_belongs_to_the_layer_before_and_an_op_without_to_nobody() -> None:
    names = ["embed", "layers.0.w", "layers.1.w", "rope", "head"]
    made = plan([run(0), run(1), run(3), op(), run(2), run(4)], names=names, pieces=[0] * 5)
    (stack,) = find_stacks(made)
    # the op may end layer 0 or begin layer 1
    assert stack.holders == ((), (0,), (0,), (), (1,), ())


def test_the_last_layer_ends_after_its_opaque_op() -> None:
    steps = [run(0), op({"layer": "layers.0"}), run(1), op({"layer": "layers.1"}), run(2), run(3)]
    (stack,) = find_stacks(plan(steps, names=[*NAMES[:2], "norm", "head"], pieces=[0, 1, 2, 3]))
    assert stack.holders == ((0,), (0,), (0, 1), (1,), (1,), ())
    assert [layer.own for layer in stack.layers] == [(2,), (4,)]
    assert stack.entry == 0


def test_names_that_opaque_ops_take_make_no_stack() -> None:
    made = plan([run(0), op({"const": "blocks.0"}), run(1), op({"const": "blocks.1"})], names=NAMES[:2], pieces=[0, 0])
    assert [stack.name for stack in find_stacks(made)] == ["layers"]


@pytest.mark.parametrize(
    ("name", "stack", "layer"),
    [
        ("model.layers.3.up", "model.layers", 3),
        ("model.layers.3", "model.layers", 3),
        ("model.layers.norm", "model.layers", None),
        ("layers.3.up", "model.layers", None),
        ("3.up", "", 3),
        ("norm.3", "", None),
    ],
)
def test_layer_of_name(name: str, stack: str, layer: int | None) -> None:
    assert layer_of_name(name, stack) == layer


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 4, 6, 7], "0-2, 4, 6-7"), ([2, 1], "1-2")]
)
def test_spell_numbers(numbers: list[int], text: str) -> None:
    assert spell_numbers(numbers) == text


def test_piece_letters() -> None:
    assert [piece_letter(i) for i in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


def test_an_explanation_reads_back() -> None:
    listing = Listing(
        program(Call("aten.neg.default", ({"i": 0},), {})),
        locations=("a.py:1",),
        sizes={"s0": "rows"},
        arguments={"aten.neg.default": ["self"]},
        primary="s0",
    )
    made = Explanation((listing, listing), {"mylib::mix.default": ("x", "layer")}, {"mylib::mix.default": ("b.py:2",)})
    data = made.to_json()
    assert data["locations"] == ["a.py:1", "b.py:2"]
    assert Explanation.from_json(data) == made
