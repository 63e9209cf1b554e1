"""What piecework relies on in torch's private API: objects as arguments, sizes, traces, schemas."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.fake_class_registry import maybe_to_fake_obj

from piecework.foundation import torch_private
from piecework.ops.ir.layer import IS_OBJECT, LayerName

needs_objects = pytest.mark.skipif(not IS_OBJECT, reason="this torch takes no objects as arguments of operators")


@pytest.fixture(scope="module")
def library() -> Any:
    made = torch.library.Library("pwprivate", "FRAGMENT")
    made.define(
        "many(Tensor x, Tensor(a!) cache, str name, SymInt n=3, int[] sizes=[1, 2], str? note='a, b', *, "
        "float eps=0.5, Tensor? t=None) -> (Tensor, Tensor)"
    )
    return made


class TestOperators:
    def test_parameters_are_read_from_the_schema(self, library: Any) -> None:
        found = torch_private.operator_arguments(torch.ops.pwprivate.many.default)
        assert [(a.name, a.text) for a in found] == [
            ("x", "Tensor x"),
            ("cache", "Tensor(a!) cache"),
            ("name", "str name"),
            ("n", "SymInt n"),
            ("sizes", "int[] sizes"),
            ("note", "str? note"),
            ("eps", "float eps"),
            ("t", "Tensor? t"),
        ]
        assert [a.default for a in found if a.has_default] == [3, [1, 2], "a, b", 0.5, None]

    def test_one_overload_is_found_and_several_are_not(self, library: Any) -> None:
        assert torch_private.single_overload(torch.ops.pwprivate.many) is torch.ops.pwprivate.many.default
        assert torch_private.single_overload(torch.ops.aten.add.Tensor) is torch.ops.aten.add.Tensor
        assert torch_private.single_overload(torch.ops.aten.add) is None
        assert torch_private.single_overload(torch.add) is None

    def test_an_operator_is_found_by_what_it_is_written_as(self, library: Any) -> None:
        overload = torch.ops.pwprivate.many.default
        assert torch_private.parse_operator(str(overload)) is overload

    def test_memory_that_is_shared_has_one_key(self) -> None:
        x = torch.zeros(4)
        assert torch_private.storage_key(x) == torch_private.storage_key(x[1:])
        assert torch_private.storage_key(x) != torch_private.storage_key(torch.zeros(4))


@needs_objects
class TestObjects:
    def test_a_class_of_the_same_name_is_the_one_that_was_registered_first(self) -> None:
        def make() -> type:
            return type("Handle", (torch_private.ReferenceBase,), {"__module__": "pwprivate"})

        first = torch_private.register_reference_type(make())
        assert torch_private.register_reference_type(make()) is first

    def test_stand_ins_of_a_trace_are_known_and_lead_back(self) -> None:
        name = LayerName("a")
        mode = torch._subclasses.FakeTensorMode()
        stand_in = maybe_to_fake_obj(mode, name)
        assert torch_private.is_traced_object(stand_in)
        assert not torch_private.is_traced_object(name)
        assert torch_private.real_object(stand_in) == name
        assert torch_private.is_python_object(stand_in)
        assert torch_private.is_python_object(name)
        for other in ("a", 3, torch.zeros(1), None):
            assert not torch_private.is_python_object(other)
            assert torch_private.real_object(other) is other


class TestSizes:
    def test_a_range_that_holds_leaves_no_guard_and_one_that_does_not_says_which(self) -> None:
        session = torch_private.SymbolicSession()
        size = session.size("n", low=1, high=64, hint=8)
        assert bool(size <= 64)
        assert session.narrowing_guards() == []
        assert not bool(size > 32)
        (guard,) = session.narrowing_guards()
        assert "n" in guard.expr
        assert "32" in guard.expr

    def test_a_range_of_one_value_is_that_value(self) -> None:
        assert torch_private.SymbolicSession().size("n", low=3, high=3, hint=3) == 3

    def test_expressions_over_sizes(self) -> None:
        session = torch_private.SymbolicSession()
        session.size("s0", low=1, high=64, hint=8)
        assert str(session.expression("2*s0 + 1", hints={"s0": 8}).node.expr).count("2*")
        assert session.expression("12", hints={}) == 12

    def test_broadcasting_does_not_ask_whether_a_size_is_one(self) -> None:
        session = torch_private.SymbolicSession()
        size = session.size("n", low=1, high=64, hint=8)
        with torch_private.size_oblivious(), session.fake_mode:
            x = torch.empty(size, 4)
            (x + torch.empty(4)).contiguous()
        assert session.narrowing_guards() == []

    def test_bounds_and_conditions_of_a_frame(self) -> None:
        found: list[Any] = []

        def backend(module: Any, inputs: Any) -> Any:
            sizes = [i for i in inputs if isinstance(i, torch.SymInt)]
            ((low, high, hint),) = torch_private.size_bounds(sizes[0]).values()
            found.extend([low, high, hint])
            found.append(torch_private.holds("Ne(s0, 9)", {"s0": sizes[0]}))
            return module

        torch._dynamo.reset()
        run = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
        run(torch.ones(5))
        assert (found[0], found[2], found[3]) == (2, 5, True)
        assert found[1] > 2**40
        run(torch.ones(7))
        assert len(found) == 4  # the condition holds for 7 as well
        run(torch.ones(9))
        assert len(found) == 8  # and not for 9: the frame was guarded by it
        torch._dynamo.reset()


class TestTraces:
    def test_tensors_and_their_nodes(self) -> None:
        seen: dict[str, Any] = {}

        def forward(x: Tensor) -> Tensor:
            tracer = torch_private.current_tracer()
            assert tracer is not None
            seen["input"] = tracer.node_of(x).op
            y = x * 2
            seen["result"] = str(tracer.node_of(y).target)
            with tracer.paused():
                z = x + 1
            seen["paused"] = tracer.node_of(z)
            tracer.attach(z, tracer.node_of(y))
            return z * 3

        graph = torch_private.trace(forward, [torch.ones(2)]).graph
        assert seen == {"input": "placeholder", "result": "aten.mul.Tensor", "paused": None}
        first, second = (n for n in graph.nodes if str(n.target) == "aten.mul.Tensor")
        assert second.args[0] is first
        assert torch_private.current_tracer() is None

    def test_in_place_code_is_made_functional(self) -> None:
        def forward(x: Tensor) -> Tensor:
            y = x.clone()
            y.add_(1)
            return y

        graph = torch_private.trace(torch_private.functionalized(forward), [torch.ones(2)]).graph
        assert "aten.add_.Tensor" not in {str(n.target) for n in graph.nodes}

    def test_a_step_that_depends_on_values_is_known_by_its_error(self) -> None:
        session = torch_private.SymbolicSession()
        with session.fake_mode:
            x = torch.ones(3)
            with pytest.raises(torch_private.data_dependent_errors()):
                bool(x.sum() > 0)


def test_a_linear_weight_is_packed_and_gives_the_same() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    weight, x = torch.randn(16, 8), torch.randn(3, 8)
    packed = torch_private.pack_linear_weight(weight)
    assert packed.layout == torch._mkldnn  # type: ignore[attr-defined]
    got = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight))


def test_the_interface_that_wrappers_repeat_is_there() -> None:
    assert "AOTInductorModelContainerCreate" in torch_private.aoti_interface_source()


def test_a_profiler_of_all_threads_may_be_stopped_by_another(tmp_path: Path) -> None:
    profiler = torch_private.thread_wide_profiler()

    def work() -> None:
        profiler.start()
        with torch.profiler.record_function("what the thread does"):
            torch.ones(3).sum()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with torch.profiler.record_function("what this one does"):
        torch.ones(3).sum()
    profiler.stop()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"what the thread does", "what this one does"} <= names
