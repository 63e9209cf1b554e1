"""Bundles that lie though all their digests hold: each kind of lie is CorruptBundle, before anything is opened."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.unit.models.tiny import write_config

import piecework
from benchmarks.common.forgery import forge, forge_artifact
from benchmarks.common.sample_bundles import Sample, language_model, stack
from piecework.bundle import Bundle, Fact
from piecework.bundle.plan import OpStep
from piecework.bundle.run.fake_ops import FakeOp
from piecework.bundle.run.loading import read_plan
from piecework.errors import BundleError, CorruptBundle, PieceworkError, RequestError
from piecework.foundation.digests import canonical_json, digest_json
from piecework.ops.attention import attention_fake
from piecework.spec.compile_options import BackendName

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def blocks(place: Path) -> Sample:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(place / "home"))
        return stack(place, BackendName.EAGER)


@pytest.fixture(scope="module")
def llama(place: Path) -> Sample:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(place / "home"))
        return language_model(place, write_config(place / "llama", "llama"), BackendName.EAGER)


def set_at(*path: Any) -> Change:
    """Return what sets the value at a path of keys and indices, which comes last."""
    *keys, last, value = path

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return change


def swap_pieces(plan: Any) -> None:
    """Exchange two artifacts by their names."""
    one, other = (piece["ranges"][0] for piece in plan["pieces"][:2])
    one["artifact"], other["artifact"] = other["artifact"], one["artifact"]


LIES_OF_A_STACK: dict[str, Change] = {
    "no field": lambda plan: plan.pop("steps"),
    "a field too many": set_at("more", 1),
    "a text for a number": set_at("num_slots", "7"),
    "a truth value for a number": set_at("steps", 0, 0, True),
    "a fraction": set_at("num_slots", 7.0),
    "a billion slots": set_at("num_slots", 10**9),
    "a slot too few": lambda plan: plan.update(num_slots=plan["num_slots"] - 1),
    "a slot that holds nothing yet": set_at("steps", 0, 1, [1]),
    "a slot that isn't there": set_at("steps", 0, 1, [99]),
    "a negative slot": set_at("steps", 0, 1, [-1]),
    "a step fewer": lambda plan: plan["steps"].pop(),
    "an instance that isn't there": set_at("steps", 0, 0, 9),
    "a constant fewer": lambda plan: plan["instances"][0][1].pop(),
    "constants of another shape": lambda plan: plan["instances"][0][1].reverse(),
    "a recipe of another shape": lambda plan: plan["recipes"][0].update(shape=[3]),
    "a recipe of another dtype": lambda plan: plan["recipes"][0].update(dtype="float64"),
    "a dtype that is a function": lambda plan: plan["recipes"][0].update(dtype="load"),
    "a packing that isn't any": lambda plan: plan["recipes"][0].update(pack="zip"),
    "a packing of plain weights": lambda plan: plan["recipes"][0].update(pack="mkldnn_linear"),
    "a source that is much larger": lambda plan: plan["recipes"][0].update(
        source=["stack", ["take", "x", plan["recipes"][0]["shape"][1:]], 1 << 60]
    ),
    "a run of a billion": lambda plan: plan["recipes"][0].update(name="a.#.b", run=[0, 10**9]),
    "another artifact": swap_pieces,
    "an artifact of another directory": set_at("pieces", 0, "ranges", 0, "artifact", "../../x.so"),
    "no artifact": set_at("pieces", 0, "ranges", []),
    "a range that is larger": lambda plan: (
        set_at("sizes", "rows", [1, 128])(plan),
        [piece["ranges"][0].update(max=128) for piece in plan["pieces"]],
    ),
    "a gap between ranges": set_at("pieces", 0, "ranges", 0, "min", 2),
    "an input of another dtype": set_at("inputs", 0, "dtype", "float64"),
    "an input of another rank": set_at("inputs", 0, "shape", ["rows", 8, 1]),
    "an input of another size": set_at("inputs", 0, "shape", ["rows", 9]),
    "an input of other strides": set_at("inputs", 0, "stride", [1, 64]),
    "an input of an unknown size": set_at("inputs", 0, "shape", ["columns", 8]),
    "an op that is an attribute": set_at("ops", 0, "load_library::__call__.default"),
    "an op that reads files": set_at("ops", 0, "aten::from_file.default"),
    "an op that resizes": set_at("ops", 0, "aten::resize_.default"),
    "an op of torch's compiler": set_at("ops", 0, "inductor::_alloc_from_pool.default"),
    "an op of TorchScript's": set_at("ops", 0, "aten::add.default"),
    "an op with other parameters": set_at("ops", 0, "aten::relu.default"),
    "an argument too many": lambda plan: plan["steps"][1][1].append({"const": 1}),
    "an argument too few": lambda plan: plan["steps"][1][1].pop(),
    "an argument of another type": set_at("steps", 1, 1, 1, {"const": "0"}),
    "an argument of two kinds": set_at("steps", 1, 1, 1, {"const": 0, "slot": 0}),
    "rows that the next piece doesn't take": set_at("steps", 1, 1, 2, {"size": "rows + 1"}),
    "rows that depend on nothing known": set_at("steps", 1, 1, 2, {"size": "columns"}),
    "rows that are Python": set_at("steps", 1, 1, 2, {"size": "__import__('os')"}),
    "rows in a thousand brackets": set_at("steps", 1, 1, 2, {"size": "(" * 1000 + "rows" + ")" * 1000}),
    "a structure with a leaf too many": set_at("structure", {"leaf": 7}),
    "a structure without end": lambda plan: plan.update(structure=json.loads('{"list":[' * 200 + "]}" * 200)),
    "a number of an unknown size": set_at("structure", {"tuple": [{"leaf": 0}, {"leaf": 1}, {"size": "columns"}]}),
    "a number that is Python": set_at("structure", {"tuple": [{"leaf": 0}, {"leaf": 1}, {"size": "exit()"}]}),
    "a number for an argument": lambda plan: plan["arguments"]["given"].append(["more", {"size": "rows"}]),
    "arguments of another module": set_at("arguments", "given", []),
}


@pytest.mark.parametrize("lie", LIES_OF_A_STACK)
def test_a_lying_plan_of_a_stack(lie: str, blocks: Sample, tmp_path: Path) -> None:
    plan = copy.deepcopy(dict(blocks.bundle.plan()))
    LIES_OF_A_STACK[lie](plan)
    forged = forge(blocks.bundle, tmp_path / "forged", plan=plan)
    with pytest.raises(BundleError) as caught:
        blocks.load(forged)
    # an op that isn't registered here may be in a package that isn't imported
    assert isinstance(caught.value, CorruptBundle) or lie.startswith("an op "), caught.value


class _Window(torch.nn.Module):
    """Another way below 16 rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() if x.shape[0] < 16 else x.cos()


@pytest.fixture(scope="module")
def window(place: Path) -> Bundle:
    eager = piecework.CompileOptions(backend=BackendName.EAGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(place / "home"))
        sizes = {"rows": piecework.Dim(1, 64)}
        return piecework.compile(_Window(), (torch.randn(3, 8),), dynamic=sizes, out=place / "window", options=eager)


LIES_OF_PARTS: dict[str, Change] = {
    "a part that is larger": set_at("variants", 0, "within", {"rows": [1, 16]}),
    "a part that leaves a gap": set_at("variants", 0, "within", {"rows": [1, 14]}),
    "a part that begins later": set_at("variants", 0, "within", {"rows": [2, 15]}),
    "a part of one row": set_at("variants", 0, "within", {"rows": [1, 1]}),
    "a part beyond the range": set_at("variants", 0, "within", {"rows": [0, 15]}),
    "a part upside down": set_at("variants", 0, "within", {"rows": [15, 1]}),
    "a part of an unknown size": set_at("variants", 0, "within", {"columns": [1, 15]}),
    "a part of rows that equal nothing": set_at("variants", 0, "equal", [["rows", 3]]),
    "no condition": lambda plan: plan["variants"][0].pop("within"),
    "no part": lambda plan: plan["variants"].clear(),
    "two of one name": lambda plan: plan["variants"].append(plan["variants"][0]),
}


@pytest.mark.parametrize("lie", LIES_OF_PARTS)
def test_a_lying_plan_of_a_range_in_parts(lie: str, window: Bundle, tmp_path: Path) -> None:
    plan = copy.deepcopy(dict(window.plan()))
    piecework.load(forge(window, tmp_path / "same", plan=plan), weights={})
    LIES_OF_PARTS[lie](plan)
    with pytest.raises(CorruptBundle):
        piecework.load(forge(window, tmp_path / "forged", plan=plan), weights={})


class _Counter(torch.nn.Module):
    """Counts rows in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(8))
        self.register_buffer("other", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += x.sum(0)
        return x + self.count + self.other.repeat(2)


@pytest.fixture(scope="module")
def counter(place: Path) -> Bundle:
    eager = piecework.CompileOptions(backend=BackendName.EAGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(place / "home"))
        sizes = {"rows": piecework.Dim(1, 64)}
        return piecework.compile(_Counter(), (torch.randn(3, 8),), dynamic=sizes, out=place / "count", options=eager)


LIES_OF_A_BUFFER: dict[str, Change] = {
    "no buffer": lambda plan: plan["inputs"][1].pop("recipe"),
    "a buffer for an argument": set_at("inputs", 0, "recipe", 0),
    "a buffer that nothing makes": set_at("inputs", 1, "recipe", 7),
    "another buffer": set_at("inputs", 1, "recipe", 1),
    "a buffer of another shape": set_at("inputs", 1, "shape", [4]),
    "a buffer of another type": set_at("inputs", 1, "dtype", "int64"),
    "a buffer first": lambda plan: plan["inputs"].reverse(),
}


@pytest.mark.parametrize("lie", LIES_OF_A_BUFFER)
def test_a_lying_plan_of_a_buffer(lie: str, counter: Bundle, tmp_path: Path) -> None:
    plan = copy.deepcopy(dict(counter.plan()))
    piecework.load(forge(counter, tmp_path / "same", plan=plan), weights=_Counter())
    LIES_OF_A_BUFFER[lie](plan)
    with pytest.raises(CorruptBundle):
        piecework.load(forge(counter, tmp_path / "forged", plan=plan), weights=_Counter())


LIES_OF_A_MODEL: dict[str, Change] = {
    "another state": lambda plan: plan["states"][0].update(shape=[2, "blocks", 16, 2, 8]),
    "a state of a size by 0": lambda plan: plan["states"][0].update(shape=[2, "blocks // 0", 16, 2, 16]),
    "a state of no size": lambda plan: plan["states"][0].update(shape=[2, "-1", 16, 2, 16]),
    "a state that isn't there": set_at("steps", 1, 1, 3, {"state": 7}),
    "a state for a slot": set_at("steps", 1, 1, 0, {"state": 0}),
    "a text for a scale": set_at("steps", 1, 1, 9, {"const": "0.25"}),
    "indices for queries": set_at("steps", 1, 1, 0, {"slot": 2}),
    "a table for lengths": set_at("steps", 1, 1, 6, {"slot": 3}),
    "two layers' constants": lambda plan: plan["instances"][1][1].reverse(),
}


@pytest.mark.parametrize("lie", LIES_OF_A_MODEL)
def test_a_lying_plan_of_a_language_model(lie: str, llama: Sample, tmp_path: Path) -> None:
    plan = copy.deepcopy(dict(llama.bundle.plan()))
    LIES_OF_A_MODEL[lie](plan)
    with pytest.raises(CorruptBundle):
        llama.load(forge(llama.bundle, tmp_path / "forged", plan=plan))


def test_what_was_not_changed_runs(blocks: Sample, llama: Sample, tmp_path: Path) -> None:
    """Else every lie above would be refused for nothing."""
    for number, sample in enumerate((blocks, llama)):
        again = sample.load(forge(sample.bundle, tmp_path / str(number)))
        assert all(map(torch.equal, sample.run(again), sample.run(sample.load())))


def program_with(blocks: Sample, change: Change) -> tuple[str, bytes]:
    """Return an artifact's name, and its content with a changed program under a fingerprint that holds."""
    name = blocks.bundle.plan()["pieces"][0]["ranges"][0]["artifact"]
    data = json.loads(blocks.bundle.artifact_path(name).read_bytes())
    change(data["program"])
    data["interface"]["program"] = digest_json(data["program"])
    return name, canonical_json(data)


@pytest.mark.parametrize(
    "change",
    [
        set_at("calls", 0, 0, "load_library.__call__.x"),
        set_at("calls", 0, 0, "aten.from_file.default"),
        set_at("calls", 0, 0, "aten.set_.source_Tensor"),
        set_at("calls", 0, 0, "profiler._record_function_enter.default"),
        set_at("calls", 0, 0, "os.system"),
        set_at("calls", 0, 1, [{"n": 0}]),
        set_at("calls", 0, 1, [{"i": 5}]),
        set_at("calls", 0, 1, [{"dtype": "load"}]),
        set_at("outputs", []),
        set_at("inputs", 0, 0, ["s0", 9]),
        set_at("inputs", 0, 2, "float64"),
    ],
)
def test_a_lying_program_of_the_eager_backend(change: Change, blocks: Sample, tmp_path: Path) -> None:
    name, data = program_with(blocks, change)
    path = forge_artifact(blocks.bundle, tmp_path / "forged", name, data)
    plan = json.loads((path / "plan.json").read_text())
    plan["pieces"][0]["program"] = json.loads(data)["interface"]["program"]
    again = forge(blocks.bundle, tmp_path / "again", plan=plan, artifacts=files_of(path))
    with pytest.raises(PieceworkError):
        blocks.load(again)


def files_of(path: Path) -> dict[str, Path]:
    return {file.name: file for file in (path / "artifacts").iterdir()}


def test_a_program_whose_calls_fail_for_all_values(blocks: Sample, tmp_path: Path) -> None:
    """Only running it tells, and then it is no foreign exception."""
    name, data = program_with(blocks, lambda program: program["calls"][-1][1].append({"n": 0}))
    path = forge_artifact(blocks.bundle, tmp_path / "forged", name, data)
    plan = json.loads((path / "plan.json").read_text())
    plan["pieces"][0]["program"] = json.loads(data)["interface"]["program"]
    model = blocks.load(forge(blocks.bundle, tmp_path / "again", plan=plan, artifacts=files_of(path)))
    with pytest.raises(CorruptBundle, match="not what it says"):
        blocks.run(model)


@pytest.mark.parametrize("dim", ["-1", "0 - s0", "4611686018427387904", "s0 + 1", "s0 // 0", "x.y"])
def test_a_program_that_says_that_it_gives_something_else(dim: str, blocks: Sample, tmp_path: Path) -> None:
    name = blocks.bundle.plan()["pieces"][0]["ranges"][0]["artifact"]
    data = json.loads(blocks.bundle.artifact_path(name).read_bytes())
    data["interface"]["results"][0][0][0] = dim
    forged = forge_artifact(blocks.bundle, tmp_path / "forged", name, json.dumps(data).encode())
    with pytest.raises(CorruptBundle):
        blocks.run(blocks.load(forged))


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"interface":{},"program":{}}', b"\xff"])
def test_an_artifact_that_is_none(data: bytes, blocks: Sample, tmp_path: Path) -> None:
    name = blocks.bundle.plan()["pieces"][0]["ranges"][0]["artifact"]
    with pytest.raises(CorruptBundle):
        blocks.load(forge_artifact(blocks.bundle, tmp_path / "forged", name, data))


def literal_of(blocks: Sample) -> str:
    return str(next(recipe["name"] for recipe in blocks.bundle.plan()["recipes"] if recipe.get("literal")))


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "constants",
    [
        lambda name: None,
        lambda name: b"",
        lambda name: save({"other": torch.zeros(8)}),
        lambda name: save({name: torch.zeros(9)}),
        lambda name: save({name: torch.zeros(8, dtype=torch.float64)}),
        lambda name: save({name: torch.zeros(8)})[:-4],
        lambda name: (1 << 60).to_bytes(8, "little"),
        lambda name: header("not json"),
        lambda name: header(json.dumps({name: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}})),
        lambda name: (
            header(
                json.dumps(
                    {
                        name: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
                        "b": {"dtype": "F32", "shape": [8], "data_offsets": [16, 48]},
                    }
                )
            )
            + bytes(48)
        ),
    ],
)
def test_lying_constants(constants: Callable[[str], bytes | None], blocks: Sample, tmp_path: Path) -> None:
    forged = forge(blocks.bundle, tmp_path / "forged", constants=constants(literal_of(blocks)))
    with pytest.raises(CorruptBundle, match=r"constants\.safetensors"):
        blocks.load(forged)


@pytest.mark.parametrize("name", ["/proc/kmsg", "torch/../../../../../../../proc/kmsg", "torch//dev/zero", "", "x/\0"])
def test_facts_about_files_outside_of_packages(name: str, blocks: Sample, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundle):
        forge(blocks.bundle, tmp_path / "forged", facts=(*blocks.bundle.facts, Fact("source", name, "ab" * 32)))


def test_an_order_of_providers_that_is_none(blocks: Sample, tmp_path: Path) -> None:
    facts = [f for f in blocks.bundle.facts if (f.kind, f.name) != ("option", "providers")]
    forged = forge(blocks.bundle, tmp_path / "forged", facts=(*facts, Fact("option", "providers", "=;=")))
    with pytest.raises(CorruptBundle):
        blocks.load(forged)


@pytest.mark.parametrize("name", ["this:s", "subprocess:Popen", "os:system", "collections:OrderedDict"])
def test_a_result_class_runs_no_code(name: str, blocks: Sample, tmp_path: Path) -> None:
    plan = copy.deepcopy(dict(blocks.bundle.plan()))
    plan["structure"] = {"class": name, "fields": [["a", {"leaf": 0}], ["b", {"leaf": 1}]]}
    model = blocks.load(forge(blocks.bundle, tmp_path / "forged", plan=plan))
    with pytest.raises(BundleError):
        blocks.run(model)


def test_what_fails_of_values_names_the_step(llama: Sample) -> None:
    model = llama.load()
    model.make_states({"blocks": 1})  # the sample's tokens go to block 1, which isn't there
    with pytest.raises(RequestError, match=r"run step 1 of the loaded model, piecework::attention"):
        model.run(LLAMA_PROMPT)


LLAMA_PROMPT = {
    "input_ids": torch.tensor([3]),
    "positions": torch.tensor([0]),
    "slot_mapping": torch.tensor([16]),
    "block_tables": torch.tensor([[1]]),
    "seq_lens": torch.tensor([1]),
    "query_start": torch.tensor([0, 1]),
    "logits_indices": torch.tensor([0]),
    "num_decode_tokens": 0,
}


def test_rows_that_are_not_there(blocks: Sample, tmp_path: Path) -> None:
    """How many rows there are may depend on sizes that nothing relates: only a call tells."""
    plan = copy.deepcopy(dict(blocks.bundle.plan()))
    plan["steps"][1][1][1] = {"const": 1 << 40}
    model = blocks.load(forge(blocks.bundle, tmp_path / "forged", plan=plan))
    with pytest.raises(RequestError, match=r"run step 1 of the loaded model, piecework::rows"):
        blocks.run(model)


def test_states_of_sizes_that_are_not_given(llama: Sample) -> None:
    with pytest.raises(RequestError, match="no size 'blocks'"):
        llama.load().make_states({})


def test_one_plan_is_looked_at_in_few_places(llama: Sample, blocks: Sample) -> None:
    """Steps with the same shapes are looked at once, however many there are."""
    plan = read_plan(llama.bundle)
    ops = [step for step in plan.steps if isinstance(step, OpStep)]
    calls: list[str] = []

    def fake(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append("call")
        return attention_fake(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("piecework.bundle.run.abstract_run.fake_op", lambda overload: FakeOp(overload, fake))
        llama.load()
    assert len(ops) == 3
    assert 2 <= len(calls) <= 4, "a call for each of the sizes that it is looked at"
