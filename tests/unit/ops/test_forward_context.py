"""Which context runs, and what it finds under a layer's name."""

from __future__ import annotations

import asyncio
import threading

import pytest

from piecework import LayerName, OpError
from piecework.ops.ir.forward_context import ForwardContext, layer_state, running_context

NAMES = [f"model.layers.{i}.self_attn" for i in range(12)]


@pytest.fixture
def context() -> ForwardContext:
    return ForwardContext({name: f"state {i}" for i, name in enumerate(NAMES)})


def test_a_layer_is_found_by_handle_name_and_index(context: ForwardContext) -> None:
    assert context.layer(LayerName(NAMES[3])) == "state 3"
    assert context.layer(NAMES[3]) == "state 3"
    assert ForwardContext({0: "a", 1: "b"}).layer(1) == "b"
    assert ForwardContext({LayerName("x"): "c"}).layer("x") == "c"


def test_nothing_runs_outside() -> None:
    with pytest.raises(OpError, match="no context running in this thread or task"):
        running_context()


def test_nested_contexts_restore(context: ForwardContext) -> None:
    other = ForwardContext({NAMES[0]: "another engine's"})
    with context.running("first"):
        assert (running_context().layer(NAMES[0]), running_context().batch) == ("state 0", "first")
        with other.running("second"):
            assert (running_context().layer(NAMES[0]), running_context().batch) == ("another engine's", "second")
        assert (running_context().layer(NAMES[0]), running_context().batch) == ("state 0", "first")
        with context.running("third") as running:
            assert running is running_context()
            assert running.batch == "third"
        assert context.batch == "first"
    with pytest.raises(OpError):
        running_context()


def test_an_exception_restores(context: ForwardContext) -> None:
    with pytest.raises(ZeroDivisionError), context.running("batch"):
        raise ZeroDivisionError
    with pytest.raises(OpError):
        running_context()


def test_the_batch_is_the_running_ones(context: ForwardContext) -> None:
    with pytest.raises(OpError, match="does not run"):
        _ = context.batch
    with context.running("batch"):
        assert context.batch == "batch"
        with pytest.raises(OpError, match="does not run"):
            _ = ForwardContext({}).batch
    with context.running(), pytest.raises(OpError, match="without one"):
        _ = context.batch


def test_threads_have_their_own() -> None:
    contexts = [ForwardContext({"layer": i}) for i in range(4)]
    barrier = threading.Barrier(len(contexts), timeout=20)
    found: dict[int, list[object]] = {}

    def run(index: int) -> None:
        with contexts[index].running(index):
            barrier.wait()
            found[index] = [running_context().layer("layer"), running_context().batch, contexts[index].batch]
            barrier.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(contexts))]
    with ForwardContext({"layer": "main"}).running("main"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert running_context().batch == "main"
    assert found == {i: [i, i, i] for i in range(len(contexts))}


def test_one_context_runs_two_batches_in_two_threads(context: ForwardContext) -> None:
    barrier = threading.Barrier(2, timeout=20)
    found = {}

    def run(batch: str) -> None:
        with context.running(batch):
            barrier.wait()
            found[batch] = context.batch
            barrier.wait()

    threads = [threading.Thread(target=run, args=(b,)) for b in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": "a", "b": "b"}


def test_a_new_thread_starts_without(context: ForwardContext) -> None:
    errors = []

    def run() -> None:
        try:
            running_context()
        except OpError as error:
            errors.append(error)

    with context.running("batch"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_tasks_have_their_own() -> None:
    async def step(index: int) -> list[object]:
        found = []
        with ForwardContext({"layer": index}).running(index):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append((running_context().layer("layer"), running_context().batch))
        return found

    async def main() -> list[list[object]]:
        return await asyncio.gather(*[step(i) for i in range(5)])

    assert asyncio.run(main()) == [[(i, i)] * 3 for i in range(5)]


def test_an_unknown_name_lists_near_ones(context: ForwardContext) -> None:
    with pytest.raises(OpError) as error:
        context.layer(LayerName("model.layers.3.self_atn"))
    assert "'model.layers.3.self_atn'" in error.value.asked
    assert "12 layers" in error.value.found
    assert NAMES[3] in error.value.try_


def test_an_unknown_index_lists_names_with_it(context: ForwardContext) -> None:
    with pytest.raises(OpError) as error:
        context.layer(7)
    assert NAMES[7] in error.value.try_


def test_a_name_like_no_other_lists_the_first(context: ForwardContext) -> None:
    with pytest.raises(OpError) as error:
        context.layer("zzz")
    assert NAMES[0] in error.value.try_
    with pytest.raises(OpError, match="0 layers"):
        ForwardContext({}).layer("zzz")


def test_a_layer_of_another_kind(context: ForwardContext) -> None:
    with context.running("batch"):
        assert layer_state(LayerName(NAMES[1]), str) == "state 1"
        with pytest.raises(OpError) as error:
            layer_state(LayerName(NAMES[1]), dict)
    assert error.value.asked == f"the dict of layer '{NAMES[1]}'"
    assert error.value.found == "a str under that name"
