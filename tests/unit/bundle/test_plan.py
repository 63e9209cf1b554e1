"""Plans as JSON, expressions over sizes, and slots that never lose a live value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.capture.graphs import NAMED, TWO, Encoder, NamedBlock, Stack, request
from tests.unit.models.tiny import write_config

from piecework.bundle.packings import LINEAR_COLUMNS
from piecework.bundle.plan import (
    Instance,
    OpStep,
    PieceStep,
    Plan,
    PlanInput,
    PlanVariant,
    Recipe,
    ShapeRange,
    State,
    UniquePiece,
)
from piecework.bundle.recipes import Concat, Take
from piecework.bundle.sizes import size_expression
from piecework.bundle.where import Where
from piecework.capture.capture import capture
from piecework.capture.request import CaptureRequest
from piecework.compiler.deduplicate import Forward, deduplicate
from piecework.compiler.packing import packing_of
from piecework.compiler.passes.packing import Packing
from piecework.compiler.planning import make_plan
from piecework.compiler.split import Piece, split
from piecework.errors import CorruptBundle
from piecework.foundation.target import read_target
from piecework.models.adapter import build_causal_lm
from piecework.spec.compile_options import CompileOptions
from piecework.spec.model_spec import ModelSpec

letters = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3)
names = st.lists(
    st.sampled_from(["layers", "0", "1", "2", "11", "w", "a#b", "01", "experts"]), min_size=1, max_size=5
).map(".".join)
dims = st.one_of(st.integers(0, 99), st.sampled_from(["tokens", "blocks"]))
shapes = st.lists(dims, max_size=3).map(tuple)
recipes = st.builds(
    Recipe,
    name=names,
    shape=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    literal=st.booleans(),
    pack=st.sampled_from(["", "mkldnn_linear", "head_columns"]),
)
composed = st.builds(
    lambda a, b, n: Recipe(f"{a} + {b}", (2 * n, 3), "float32", source=Concat((Take(a, (n, 3)), Take(b, (n, 3))))),
    names,
    names,
    st.integers(0, 5),
)
arguments = st.one_of(
    st.builds(lambda i: {"slot": i}, st.integers(0, 9)),
    st.builds(lambda v: {"const": v}, st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), letters)),
    st.builds(lambda i: {"state": i}, st.integers(0, 3)),
    st.just({"size": "tokens + 1"}),
)
slots = st.lists(st.integers(0, 9), max_size=3).map(tuple)
steps = st.lists(
    st.one_of(
        st.builds(PieceStep, instance=st.integers(0, 9), inputs=slots, outputs=slots),
        st.builds(
            OpStep,
            op=st.sampled_from(["a::b.default", "c::d.x"]),
            args=st.lists(arguments, max_size=3).map(tuple),
            kwargs=st.dictionaries(st.sampled_from(["k", "l"]), arguments),
            outputs=slots,
        ),
    ),
    max_size=5,
).map(tuple)
plans = st.builds(
    Plan,
    sizes=st.just({"tokens": (1, 64), "blocks": (0, 9)}),
    primary=st.sampled_from(["tokens", ""]),
    inputs=st.lists(
        st.one_of(
            st.builds(PlanInput, name=names, shape=shapes, dtype=st.just("int64"), device=st.just("cpu")),
            st.builds(PlanInput, name=names, shape=st.just((2, 3)), stride=st.just((1, 2)), dtype=st.just("int64")),
            st.builds(PlanInput, name=names, size=st.just("tokens")),
        ),
        max_size=3,
    ).map(tuple),
    states=st.lists(
        st.builds(State, name=names, shape=shapes, dtype=st.just("float32"), device=st.just("cpu")), max_size=4
    ).map(tuple),
    recipes=st.lists(st.one_of(recipes, composed), max_size=8).map(tuple),
    pieces=st.lists(
        st.builds(
            UniquePiece,
            fingerprint=st.just("ab" * 32),
            program=st.just("cd" * 32),
            ranges=st.lists(st.builds(ShapeRange, min=st.just(1), max=st.integers(1, 9), artifact=st.just("x.so"))).map(
                tuple
            ),
            num_ops=st.integers(0, 5),
            num_constants=st.integers(0, 5),
            merged=st.sampled_from([(), ((0, 1), (2,))]),
        ),
        max_size=2,
    ).map(tuple),
    instances=st.lists(st.builds(Instance, piece=st.integers(0, 3), constants=slots), max_size=3).map(tuple),
    steps=steps,
    num_slots=st.integers(0, 10),
    output_slots=slots,
    structure=st.just({"tuple": [{"leaf": 0}]}),
    kernels=st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["x.so", "y.so"])),
    variants=st.lists(
        st.builds(
            PlanVariant,
            name=st.sampled_from(["decode", "prefill"]),
            where=st.sampled_from(
                [Where(within=(("tokens", 0, 0),)), Where((("tokens", "blocks"),), (("blocks", 1, 9),)), Where()]
            ),
            steps=steps,
            num_slots=st.integers(0, 10),
            output_slots=slots,
        ),
        max_size=2,
    ).map(tuple),
)


@given(plans)
def test_a_plan_comes_back_from_json_as_it_was(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "change", [{"steps": 3}, {"recipes": [{}]}, {"inputs": [{"no": 1}]}, {"sizes": {"a": [1]}}, {"kernels": 3}]
)
def test_what_is_no_plan_is_corrupt(change: dict[str, object]) -> None:
    good = plan_of(request(Encoder(2), ("rows",), dtype="int64")).to_json()
    with pytest.raises(CorruptBundle):
        Plan.from_json({**good, **change})
    for field in good:
        with pytest.raises(CorruptBundle):
            Plan.from_json({k: v for k, v in good.items() if k != field})


def test_a_run_of_absurd_length_is_refused() -> None:
    good = plan_of(request(Encoder(2), ("rows",), dtype="int64")).to_json()
    run = {"name": "a.#.b", "shape": [], "dtype": "float32", "run": [0, 10**9]}
    with pytest.raises(CorruptBundle):
        Plan.from_json({**good, "recipes": [run]})


def plan_of(wanted: CaptureRequest) -> Plan:
    captured = capture(wanted)
    steps = split(captured)
    packing = packing_of(CompileOptions(), target=read_target(), device="cpu")
    pieces = deduplicate([Forward(captured, steps)], packing=packing)
    return make_plan([Forward(captured, steps)], pieces, artifacts=[[] for _ in pieces.unique])


@pytest.mark.parametrize("own", [True, False])
def test_an_opaque_op_takes_the_packed_weight_that_pieces_read(own: bool, tmp_path: Path) -> None:
    """Else a projection of latents were in memory twice: for new tokens, and for those in the cache."""
    model_dir = write_config(tmp_path, "deepseek_v2", qk_nope_head_dim=16, v_head_dim=16)
    wanted = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64))
    captured = capture(wanted)
    steps = split(captured)
    packing = Packing(own=frozenset({"float32"} if own else {}))
    pieces = deduplicate([Forward(captured, steps)], packing=packing)
    plan = make_plan([Forward(captured, steps)], pieces, artifacts=[[] for _ in pieces.unique])
    prompts = [s for s in plan.steps if isinstance(s, OpStep) and s.op.startswith("piecework::mla_prefill")]
    assert prompts
    for step in prompts:
        (number,) = [a["recipe"] for a in step.args if "recipe" in a]
        assert plan.recipes[number].name.endswith("kv_b_proj.weight")
        assert plan.recipes[number].pack == (LINEAR_COLUMNS if own else "")
        assert step.kwargs == ({"packed": {"const": True}} if own else {})
    expanding = [r for r in plan.recipes if r.name.endswith("kv_b_proj.weight")]
    assert len(expanding) == len(prompts)


@pytest.mark.slow
def test_eighty_layers_are_written_as_compactly_as_four(tmp_path: Path) -> None:
    sizes = {}
    for layers in (4, 80):
        plan = plan_of(
            build_causal_lm(ModelSpec.of(write_config(tmp_path, "llama", num_hidden_layers=layers), max_tokens=64))
        )
        data = plan.to_json()
        assert Plan.from_json(json.loads(json.dumps(data))) == plan
        sizes[layers] = len(data["recipes"]), len(data["states"]), len(data["pieces"])
        assert len(plan.states) == layers
        assert len(plan.recipes) == 9 * layers + 4
        assert plan.num_slots < 20
    assert sizes[4] == sizes[80]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("a", 5),
        ("a + 1", 6),
        ("2*a", 10),
        ("a//2", 2),
        ("(a + b)*2 - 1", 15),
        ("-a + b", -2),
        ("a - b - 1", 1),
        ("4*a**2 - 1", 99),
        ("Max(1, a)*b", 15),
        ("Min(a, b, 2) + Mod(a, b)", 4),
    ],
)
def test_expressions_over_sizes(text: str, value: int) -> None:
    assert size_expression(text)({"a": 5, "b": 3}) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a +",
        "(a",
        "a)",
        "a b",
        "a**b",
        "a**12",
        "a.b",
        "f(a)",
        "a/2",
        "a % 2",
        "1.5",
        "__import__('os')",
        "a;b",
        "2a",
        "Max(a)",
        "Mod a",
        "(" * 40 + "a" + ")" * 40,
        "-" * 40 + "a",
        "a + " * 400 + "a",
    ],
)
def test_anything_else_is_no_expression(text: str) -> None:
    with pytest.raises(ValueError, match="no expression"):
        size_expression(text)


def assert_slots_hold_what_is_read(wanted: CaptureRequest) -> None:
    """Run the plan with the graph's nodes as values: every step must find its own operands in its slots."""
    captured = capture(wanted)
    steps = split(captured)
    pieces = deduplicate([Forward(captured, steps)])
    plan = make_plan([Forward(captured, steps)], pieces, artifacts=[[] for _ in pieces.unique])
    slots: list[object] = [None] * plan.num_slots
    for number, given_input in enumerate(i for i in captured.inputs if i.kind.value == "argument"):
        slots[number] = given_input.node
    for step, planned in zip(steps, plan.steps, strict=True):
        if isinstance(step, Piece):
            assert isinstance(planned, PieceStep)
            assert [slots[i] for i in planned.inputs] == list(step.inputs)
            made = list(step.outputs)
        else:
            assert isinstance(planned, OpStep)
            for argument, node in zip(planned.args, step.node.args, strict=True):
                if "slot" in argument:
                    assert slots[argument["slot"]] is node
            by_index = {n.args[1]: n for n in step.results}
            made = [by_index.get(i) for i in range(len(planned.outputs))] if step.results else [step.node]
        for slot, node in zip(planned.outputs, made, strict=True):
            if slot >= 0:
                slots[slot] = node
    output = next(n for n in captured.graph.nodes if n.op == "output")
    assert [slots[i] for i in plan.output_slots] == list(output.args[0])


def test_slots_of_a_language_model(tmp_path: Path) -> None:
    assert_slots_hold_what_is_read(build_causal_lm(ModelSpec.of(write_config(tmp_path, "qwen3"), max_tokens=64)))


def test_slots_of_values_that_live_across_many_steps() -> None:
    import torch

    class Skips(Stack):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
            kept = []
            for block in self.blocks:
                a, b = torch.ops.pwtest.two(block(x), 1, 0.5)
                kept.append(a + x)
                x = b if len(kept) % 2 else b + kept[0]
            return x, kept[0], kept[-1] * kept[1]

    module = Skips([NamedBlock("n") for _ in range(4)])
    assert_slots_hold_what_is_read(request(module, opaque=NAMED | TWO))
