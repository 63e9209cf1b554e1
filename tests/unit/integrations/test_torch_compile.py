"""`torch.compile(backend="piecework")`, pieces run operator by operator: what is cut, shared, lifted and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework.bundle.record import Recorder
from piecework.errors import BackwardError, CompileError
from piecework.integrations.torch_compile import backend
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.opaque_op import opaque_op
from tests.unit.integrations import named_ops


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(module: Any, recorder: Recorder | None = None, *, dynamic: bool | None = None, **options: Any) -> Any:
    chosen = {"backend": "eager", "store": False, **options}
    if recorder is not None:
        chosen["recorder"] = recorder
    return torch.compile(module, backend=backend, options=chosen, dynamic=dynamic)


def counts(recorder: Recorder) -> Any:
    return recorder.finish().counts


NAMES = {
    "LayerName": lambda i: LayerName("n" * i),
    "str": lambda i: "n" * i,
    "int": lambda i: i,
}


class Block(nn.Module):
    def __init__(self, kind: str, index: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layer = NAMES[kind](index)
        self.update, self.attend = named_ops.update[kind], named_ops.attend[kind]

    def forward(self, x: Tensor) -> Tensor:
        h = self.update(torch.relu(self.first(x)), self.layer)
        return x + self.second(self.attend(h, self.layer))


class Stack(nn.Module):
    def __init__(self, kind: str, *, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(kind, i) for i in range(num_blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("num_blocks", [1, 2, 6])
def test_a_stack_has_as_many_different_pieces_as_it_is_deep_at_most_three(kind: str, num_blocks: int) -> None:
    model, recorder = Stack(kind, num_blocks=num_blocks), Recorder()
    run = compiled(model, recorder, dynamic=True)
    for size in (3, 5):
        x = torch.randn(size, 8)
        torch.testing.assert_close(run(x), model(x))
    # from the input to the first update, between an attention and the next update, from the last one to the output
    assert counts(recorder)["pieces"] == num_blocks + 1
    assert counts(recorder)["compiled"] == min(num_blocks + 1, 3)
    assert counts(recorder)["graphs"] == 1


def test_blocks_that_are_compiled_by_themselves_share_one_graph_by_layer_name() -> None:
    model, recorder = Stack("LayerName", num_blocks=5), Recorder()
    x = torch.randn(3, 8)
    wanted = model(x)
    for block in model.blocks:
        block.compile(backend=backend, options={"backend": "eager", "recorder": recorder}, fullgraph=True)
    torch.testing.assert_close(model(x), wanted)
    assert counts(recorder)["graphs"] == 1
    assert counts(recorder)["compiled"] == 2


@pytest.mark.parametrize("kind", ["str", "int"])
def test_blocks_with_plain_names_are_traced_again_and_share_their_pieces(kind: str) -> None:
    model, recorder = Stack(kind, num_blocks=5), Recorder()
    x = torch.randn(3, 8)
    wanted = model(x)
    for block in model.blocks:
        block.compile(
            backend=backend, options={"backend": "eager", "recorder": recorder}, fullgraph=True, dynamic=False
        )
    torch.testing.assert_close(model(x), wanted)
    assert counts(recorder)["graphs"] == 5
    assert (counts(recorder)["compiled"], counts(recorder)["store_hits"]) == (2, 4 * 2)


def test_one_handle_in_two_places_is_told_apart_from_two_handles() -> None:
    class Shared(nn.Module):
        def __init__(self, own: LayerName, other: LayerName) -> None:
            super().__init__()
            self.own, self.other = own, other

        def forward(self, x: Tensor) -> Tensor:
            update = named_ops.update["LayerName"]
            return update(update(x, self.own) * 2, self.other)

    a, b = LayerName("n"), LayerName("nnn")
    blocks = [Shared(a, a), Shared(b, a), Shared(b, b), Shared(a, b)]
    x = torch.randn(3)
    wanted = [block(x) for block in blocks]
    for block in blocks:
        block.compile(backend=backend, options={"backend": "eager"}, fullgraph=True)
    for block, want in zip(blocks, wanted, strict=True):
        torch.testing.assert_close(block(x), want)


def test_a_fake_that_gives_another_shape_for_another_number_makes_another_piece() -> None:
    class Widen(nn.Module):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return named_ops.attend["str"](named_ops.repeat(x, self.by), "n") + 1

    model = nn.Sequential(Widen(2), Widen(2), Widen(3))
    recorder = Recorder()
    x = torch.randn(2)
    torch.testing.assert_close(compiled(model, recorder, dynamic=False)(x), model(x))
    # what follows 4, 8 and 24 values: the shapes differ everywhere
    assert counts(recorder)["compiled"] == counts(recorder)["pieces"] == 3


def test_sizes_reach_an_operator_that_is_cut_and_the_result() -> None:
    @torch.compiler.disable
    def nothing() -> None: ...

    def forward(x: Tensor) -> tuple[Tensor, int, Tensor]:
        y = named_ops.narrow(x * 2, x.shape[0] // 2)
        return y + 1, x.shape[0] * 3, x.view(-1, x.shape[0] * x.shape[1])

    recorder = Recorder()
    run = compiled(forward, recorder, dynamic=True)
    for size in (4, 6, 9):
        x = torch.randn(size, 3)
        for got, want in zip(run(x), forward(x), strict=True):
            torch.testing.assert_close(got, want)
    assert counts(recorder)["graphs"] == 1


def test_in_place_code_and_operators_that_write_are_seen_by_what_follows() -> None:
    def forward(x: Tensor, cache: Tensor) -> Tensor:
        x = x.clone()
        x[0] = 5
        x.mul_(2)
        named_ops.write(x, cache)
        view = cache[1:]
        view.add_(1)
        return named_ops.attend["str"](cache * 1, "n") + x

    x, cache = torch.randn(3), torch.zeros(3)
    mine = cache.clone()
    got, want = compiled(forward)(x, mine), forward(x, cache)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine, cache)


def test_writing_to_memory_that_inputs_share_gives_what_eager_gives() -> None:
    def forward(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return a * b

    base, other = torch.arange(6.0), torch.arange(6.0)
    got = compiled(forward)(base, base[:])
    torch.testing.assert_close(got, forward(other, other[:]))
    torch.testing.assert_close(base, other)


def test_a_tensor_of_the_function_and_one_of_a_closure() -> None:
    scale = torch.tensor([2.0, 3.0])

    def forward(x: Tensor) -> Tensor:
        return named_ops.attend["str"](x * scale, "nn") + torch.tensor([1.0, 2.0])

    x = torch.randn(2)
    torch.testing.assert_close(compiled(forward)(x), forward(x))


def test_autocast_around_a_cut_gives_what_eager_gives() -> None:
    linear = nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(named_ops.attend["str"](linear(x), "n"))
        return linear(y.float())

    x = torch.randn(2, 4)
    got, want = compiled(forward)(x), forward(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_constants_lists_and_empty_results() -> None:
    def forward(x: Tensor) -> tuple[Any, ...]:
        parts = named_ops.halves(x)
        return parts[1], 3, None, torch.cat(list(parts)), x

    x = torch.randn(4)
    got, want = compiled(forward)(x), forward(x)
    assert got[1:3] == want[1:3]
    for i in (0, 3, 4):
        torch.testing.assert_close(got[i], want[i])


class TestWhatMustNotBeCutOrShared:
    """Found by trying to break it."""

    def test_gradients_inside_a_model(self) -> None:
        def forward(x: Tensor) -> Tensor:
            return named_ops.attend["str"](torch.func.grad(lambda y: (y**3).sum())(x), "n")

        recorder, x = Recorder(), torch.arange(3.0)
        torch.testing.assert_close(compiled(forward, recorder)(x), forward(x))
        assert "whole: it takes gradients" in recorder.finish().notes[0]

    def test_a_value_that_is_read_before_a_write(self) -> None:
        def forward(x: Tensor) -> Tensor:
            n = x[0].item()
            x.add_(1)
            return named_ops.attend["str"](x * n, "n")

        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            torch.testing.assert_close(compiled(forward)(torch.tensor([1, 2, 3])), forward(torch.tensor([1, 2, 3])))

    @pytest.mark.parametrize("cut", [True, False])
    def test_an_operator_that_returns_a_number_runs_once(self, cut: bool) -> None:
        def forward(x: Tensor, state: Tensor) -> Tensor:
            n = named_ops.count_up(state)
            return x * n + n

        state = torch.zeros(1, dtype=torch.int64)
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            compiled(forward, cut=["pwtest::count_up"] if cut else [])(torch.ones(2), state)
        assert state.item() == 1

    def test_shapes_that_change_in_place(self) -> None:
        def forward(x: Tensor) -> Tensor:
            y = named_ops.attend["str"](x, "n")
            y.squeeze_(0)
            return y * 2

        x = torch.randn(1, 2, 3)
        assert compiled(forward)(x).shape == forward(x).shape == (2, 3)

    def test_conjugates_across_a_cut(self) -> None:
        def forward(x: Tensor) -> Tensor:
            y = x.conj().imag
            return named_ops.attend["str"](y, "n") + y

        x = torch.randn(3, dtype=torch.complex64)
        torch.testing.assert_close(compiled(forward)(x), forward(x))

    def test_a_hidden_write_to_shared_memory(self) -> None:
        def forward(a: Tensor, b: Tensor) -> Tensor:
            torch.nn.functional.relu(a, True)
            return a * b

        mine, theirs = torch.arange(-3.0, 3.0), torch.arange(-3.0, 3.0)
        torch.testing.assert_close(compiled(forward)(mine, mine[:]), forward(theirs, theirs[:]))
        torch.testing.assert_close(mine, theirs)

    def test_lists_and_slices_of_what_an_opaque_operator_takes_and_gives(self) -> None:
        def forward(x: Tensor) -> Tensor:
            y = named_ops.total([x, x * 2])
            return y[1:] + y[..., :1] + y[None][0, 1:]

        x = torch.randn(4)
        torch.testing.assert_close(compiled(forward)(x), forward(x))

    def test_keyword_only_names(self) -> None:
        def forward(x: Tensor) -> Tensor:
            return named_ops.keyword(named_ops.keyword(x, layer="a"), layer="bbb")

        x = torch.randn(4)
        torch.testing.assert_close(compiled(forward)(x), forward(x))

    def test_a_whole_number_for_a_float_is_a_float(self) -> None:
        x = torch.arange(3)
        got = compiled(lambda x: named_ops.scaled(x, 2) + 0)(x)
        torch.testing.assert_close(got, named_ops.scaled(x, 2) + 0)
        assert got.dtype == torch.float32

    def test_numbers_that_change_from_call_to_call(self) -> None:
        run = compiled(lambda x, n: named_ops.attend["str"](x + n, "n"), dynamic=None)
        for n in (3, 4, -5, 2**40):
            torch.testing.assert_close(run(torch.ones(2), n), (torch.ones(2) + n) * 2)

    @pytest.mark.slow
    def test_without_a_store_it_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "file" / "home"))
        recorder = Recorder()
        run = torch.compile(nn.Linear(2, 2), backend=backend, options={"recorder": recorder})
        assert run(torch.ones(1, 2)).shape == (1, 2)
        assert any("store" in note for note in recorder.finish().notes)


class TestBackward:
    def test_results_may_be_changed_in_place_and_detached(self) -> None:
        linear = nn.Linear(3, 3)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                fixed = linear(x)
            return linear(x), fixed

        with torch.enable_grad():
            recorded, fixed = compiled(forward)(torch.randn(2, 3))
            assert (recorded.requires_grad, fixed.requires_grad) == (True, False)
            recorded.mul_(2)
            fixed.numpy()

    def test_is_refused_with_our_error(self) -> None:
        linear = nn.Linear(3, 3)
        with torch.enable_grad():
            out = compiled(linear)(torch.randn(2, 3))
            torch.testing.assert_close(out, compiled(linear)(torch.zeros(2, 3)) * 0 + out)
            assert out.requires_grad
            with pytest.raises(BackwardError, match="inference only"):
                out.sum().backward()
        assert linear.weight.grad is None

    def test_nothing_is_recorded_where_no_gradient_is_asked_for(self) -> None:
        linear = nn.Linear(3, 3)
        assert not compiled(linear)(torch.randn(2, 3)).requires_grad
        with torch.inference_mode():
            assert compiled(linear)(torch.randn(2, 3)).is_inference()

    def test_whole_numbers_come_out_as_they_are(self) -> None:
        linear = nn.Linear(3, 3)
        with torch.enable_grad():
            assert compiled(lambda x: linear(x).argmax(-1))(torch.randn(2, 3)).dtype == torch.int64


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"bakend": "eager"}, "did you mean 'backend'"),
            ({"backend": "fast"}, "one of aoti, eager"),
            ({"cut": "mylib::op"}, "no list of operators"),
            ({"cut": ["op"]}, "no list of operators"),
            ({"store": 1}, "True or False"),
            ({"recorder": 3}, "no piecework.Recorder"),
        ],
    )
    def test_wrong_ones_are_refused_at_the_first_call(self, options: dict[str, Any], says: str) -> None:
        run = torch.compile(nn.Linear(2, 2), backend=backend, options=options)
        for _ in range(2):
            with pytest.raises(CompileError, match=says):
                run(torch.randn(1, 2))

    def test_modes_are_refused(self) -> None:
        run = torch.compile(nn.Linear(2, 2), backend=backend, mode="max-autotune")
        with pytest.raises(CompileError, match="no modes"):
            run(torch.randn(1, 2))

    def test_further_operators_are_cut(self) -> None:
        recorder = Recorder()
        run = compiled(lambda x: named_ops.update["str"](x * 2, "n") + 1, recorder, cut=["pwtest::update_str"])
        run(torch.randn(2))
        assert counts(recorder)["pieces"] == 2


class TestAsUsersOfTorchCompileExpect:
    def test_another_rank_recompiles_and_another_size_does_not(self) -> None:
        recorder = Recorder()
        run = compiled(lambda x: x * 2, recorder, dynamic=True)
        for shape in [(3,), (4,), (2, 2), (3, 5)]:
            torch.testing.assert_close(run(torch.ones(shape)), torch.full(shape, 2.0))
        assert counts(recorder)["graphs"] == 2

    def test_a_graph_break_makes_two_graphs(self) -> None:
        recorder = Recorder()

        def forward(x: Tensor) -> Tensor:
            x = x * 2
            torch._dynamo.graph_break()
            return x + 1

        torch.testing.assert_close(compiled(forward, recorder)(torch.ones(2)), torch.full((2,), 3.0))
        assert counts(recorder)["graphs"] == 2

    def test_fullgraph_refuses_a_graph_break(self) -> None:
        def forward(x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(forward, backend=backend, fullgraph=True)(torch.ones(2))

    def test_stances(self) -> None:
        recorder = Recorder()
        run = compiled(lambda x: x * 2, recorder, dynamic=False)
        run(torch.ones(2))
        with torch.compiler.set_stance("fail_on_recompile"):
            run(torch.ones(2))
            with pytest.raises(RuntimeError, match="fail_on_recompile"):
                run(torch.ones(3))
        with torch.compiler.set_stance("eager_on_recompile"):
            torch.testing.assert_close(run(torch.ones(3)), torch.full((3,), 2.0))
        with torch.compiler.set_stance("force_eager"):
            run(torch.ones(2, 2))
        assert counts(recorder)["graphs"] == 1

    def test_a_layer_name_made_in_the_forward_breaks_the_graph_and_is_right(self) -> None:
        class Late(nn.Module):
            def __init__(self, name: str) -> None:
                super().__init__()
                self.name = name

            def forward(self, x: Tensor) -> Tensor:
                return named_ops.attend["LayerName"](x, LayerName(self.name)) + 1

        blocks = [Late("n" * i) for i in range(3)]
        x = torch.randn(2)
        for block in blocks:
            torch.testing.assert_close(compiled(block)(x), block(x))
            with pytest.raises(torch._dynamo.exc.Unsupported, match=r"before calling torch\.compile"):
                torch.compile(block, backend=backend, fullgraph=True)(x)


def test_torch_finds_the_backend_by_its_name() -> None:
    from importlib.metadata import entry_points

    found = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "piecework"]
    if not found:
        pytest.skip("the package is not installed")
    assert found[0].load() is backend


def test_an_operator_declared_twice_is_one() -> None:
    assert opaque_op("pwtest::attend_str")(named_ops.attend["str"].function) is named_ops.attend["str"]
