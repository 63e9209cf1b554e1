"""The engine in its thread: streams, aborts, another model, draining, closing, and steps that fail."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager

import pytest
from torch import Tensor

from piecework.engine.async_engine import AsyncEngine
from piecework.engine.request import GenerationRequest
from piecework.errors import CapacityError, EngineError, RequestError
from tests.unit.engine.paged_model import PagedModel, alone, make_engine
from tests.unit.engine.test_engine import make_request, random_requests, wanted

SECONDS = 30.0


class GatedModel(PagedModel):
    """A model that takes a step only when it is let."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        self.begun.release()
        assert self.gate.acquire(timeout=SECONDS)
        return super().run(inputs)

    def let(self, num_steps: int) -> None:
        """Let steps pass, and return when the next one has begun."""
        for _ in range(num_steps):
            self.gate.release()
            assert self.begun.acquire(timeout=SECONDS)


@contextmanager
def running(model: PagedModel, *, num_blocks: int = 200) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(make_engine(model, num_blocks=num_blocks))
    try:
        yield engine
    finally:
        if isinstance(model, GatedModel):
            model.gate.release(1000)
        engine.close()
        assert not engine._thread.is_alive()


async def collect(engine: AsyncEngine, request: GenerationRequest) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    async for output in engine.stream(request):
        found.setdefault((output.request_id, output.index), []).append(output.sampled.token)
    return found


def test_many_streams_at_once() -> None:
    requests = random_requests(20, seed=3)

    async def everything(engine: AsyncEngine) -> dict[tuple[str, int], list[int]]:
        parts = await asyncio.gather(*(collect(engine, request) for request in requests))
        return {key: tokens for part in parts for key, tokens in part.items()}

    with running(PagedModel(max_tokens=24, max_seqs=8), num_blocks=24) as engine:
        assert asyncio.run(everything(engine)) == wanted(requests)
        assert engine.stats().preemptions > 0
        assert engine.stats().kv_blocks_used == 0
        assert engine.drain(SECONDS)


def test_requests_of_plain_threads() -> None:
    requests = random_requests(12, seed=4)
    with running(PagedModel(max_tokens=24, max_seqs=8), num_blocks=24) as engine:
        found: dict[tuple[str, int], list[int]] = {}
        for output in engine.run(requests):
            found.setdefault((output.request_id, output.index), []).append(output.sampled.token)
    assert found == wanted(requests)


def test_a_cancelled_stream_frees_its_blocks_before_the_next_step() -> None:
    model = GatedModel()

    async def scenario(engine: AsyncEngine) -> None:
        one = asyncio.create_task(collect(engine, make_request("one", list(range(3, 30)), 40, ignore_eos=True)))
        assert await asyncio.to_thread(model.begun.acquire, timeout=SECONDS)
        two = asyncio.create_task(collect(engine, make_request("two", [5], 3, ignore_eos=True)))
        await asyncio.sleep(0)
        await asyncio.to_thread(model.let, 1)
        assert engine.stats().running == 2
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        await asyncio.to_thread(model.let, 1)  # ends the step that ran when it was cancelled
        assert engine.stats().running == 1
        assert engine.stats().kv_blocks_used == 1
        model.gate.release(100)
        assert await two == alone(make_request("two", [5], 3, ignore_eos=True))

    with running(model) as engine:
        asyncio.run(scenario(engine))


def test_a_stream_that_is_closed_ends_its_request() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with aclosing(engine.stream(make_request("a", [5], 80, n=2, ignore_eos=True))) as outputs:
            async for _ in outputs:
                break
        async for _ in engine.stream(make_request("b", [6], 1)):
            pass
        assert engine.stats().running == 0

    with running(PagedModel()) as engine:
        asyncio.run(scenario(engine))


def test_one_continuation_can_be_ended_and_the_others_go_on() -> None:
    request = make_request("a", [5, 9], 30, n=3, ignore_eos=True)
    model = GatedModel()
    with running(model) as engine:
        outputs = engine.run([request])
        model.gate.release(2)
        found: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for output in outputs:
            found[output.index].append(output.sampled.token)
            if output.index == 2 and len(found[2]) == 2:
                engine.abort("a", 1)
                engine.abort("a", 1)
                model.gate.release(1000)
        expected = alone(request)
        assert found[0] == expected["a", 0]
        assert found[2] == expected["a", 2]
        assert 2 <= len(found[1]) <= 3


def test_a_request_is_over_when_the_last_of_its_continuations_is_ended() -> None:
    model = GatedModel()
    with running(model) as engine:
        outputs = engine.run([make_request("a", [5, 9], 30, n=2, ignore_eos=True)])
        model.gate.release(1)
        first = next(outputs)
        assert (first.finish_reason, first.ends_request) == (None, False)
        for index in (0, 1):
            engine.abort("a", index)
        model.gate.release(1000)
        assert len(list(outputs)) <= 3  # those of the steps that ran meanwhile
        assert engine.drain(SECONDS)


def test_what_can_not_run_is_refused_at_its_own_stream_only() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        good = asyncio.create_task(collect(engine, make_request("a", [5], 30, ignore_eos=True)))
        with pytest.raises(RequestError, match="token"):
            await collect(engine, make_request("b", [5000], 3))
        with pytest.raises(CapacityError):
            await collect(engine, make_request("c", [5] * 40, 3))
        assert await good == alone(make_request("a", [5], 30, ignore_eos=True))

    with running(PagedModel(), num_blocks=9) as engine:
        with pytest.raises(CapacityError):
            engine.check(make_request("c", [5] * 40, 3))
        asyncio.run(scenario(engine))


def test_an_id_in_use_is_refused_without_ending_the_one_that_has_it() -> None:
    model = GatedModel()
    with running(model) as engine:
        request = make_request("a", [5], 3, ignore_eos=True)
        first = engine.run([request])
        model.gate.release(1)
        tokens = [next(first).sampled.token]
        second = engine.run([make_request("a", [6], 3)])
        model.gate.release(1)
        with pytest.raises(RequestError, match="is running"):
            next(second)
        model.gate.release(100)
        assert tokens + [output.sampled.token for output in first] == alone(request)["a", 0]


def test_a_failing_step_is_told_to_everyone_and_ends_the_engine() -> None:
    model = GatedModel(max_seqs=1)

    async def scenario(engine: AsyncEngine) -> None:
        streams = [asyncio.create_task(collect(engine, make_request(i, [5], 30, ignore_eos=True))) for i in range(3)]
        await asyncio.to_thread(model.begun.acquire)
        model.fail = ValueError("no such luck")
        model.gate.release(1)
        for stream in streams:
            with pytest.raises(EngineError, match="ValueError: no such luck") as caught:
                await asyncio.wait_for(stream, SECONDS)
            assert caught.value.__cause__ is model.fail
        with pytest.raises(EngineError, match="no such luck"):
            await collect(engine, make_request("late", [5], 3))

    with running(model) as engine:
        asyncio.run(scenario(engine))
        assert engine.error is model.fail
        assert engine.drain(SECONDS)
        with pytest.raises(EngineError, match="no such luck"):
            list(engine.run([make_request("late", [5], 3)]))
        with pytest.raises(EngineError, match="no such luck"):
            engine.swap_runner(PagedModel())
        engine.abort("0")


def test_another_model_takes_over_between_two_steps() -> None:
    requests = random_requests(10, seed=8)
    model = GatedModel(max_tokens=24, max_seqs=8)
    with running(model, num_blocks=24) as engine:
        outputs = engine.run(requests)
        model.gate.release(5)
        found: dict[tuple[str, int], list[int]] = {}
        output = next(outputs)
        found.setdefault((output.request_id, output.index), []).append(output.sampled.token)
        new = PagedModel(max_tokens=24, max_seqs=8)
        swap = threading.Thread(target=engine.swap_runner, args=(new,))
        swap.start()
        model.gate.release(1000)
        for output in outputs:
            found.setdefault((output.request_id, output.index), []).append(output.sampled.token)
        swap.join()
        assert found == wanted(requests)
        assert model.closed
        assert new.batches


def test_a_model_that_can_not_take_over_ends_the_engine() -> None:
    class Large(PagedModel):
        def make_states(self, sizes: Mapping[str, int]) -> None:
            raise CapacityError(asked="KV caches", found="no memory")

    model = GatedModel()
    with running(model) as engine:
        outputs = engine.run([make_request("a", [5], 30, ignore_eos=True)])
        errors: list[BaseException] = []

        def swap() -> None:
            try:
                engine.swap_runner(Large())
            except CapacityError as error:
                errors.append(error)

        model.gate.release(1)
        next(outputs)
        swapping = threading.Thread(target=swap)
        swapping.start()
        model.gate.release(1000)
        with pytest.raises(EngineError, match="no memory"):
            list(outputs)
        swapping.join()
        assert errors == [engine.error]


def test_draining_lets_requests_end_and_takes_no_others() -> None:
    model = GatedModel()
    with running(model) as engine:
        outputs = engine.run([make_request("a", [5], 4, ignore_eos=True)])
        model.gate.release(1)
        next(outputs)
        assert not engine.drain(0.01)
        with pytest.raises(EngineError, match="takes no more requests"):
            list(engine.run([make_request("b", [5], 4)]))
        model.gate.release(100)
        assert engine.drain(SECONDS)
        assert len(list(outputs)) == 3


def test_closing_ends_streams_with_an_error() -> None:
    model = GatedModel()
    engine = AsyncEngine(make_engine(model))
    outputs = engine.run([make_request("a", [5], 40, ignore_eos=True)])
    model.gate.release(1)
    next(outputs)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._stopping:
        pass
    model.gate.release(100)
    with pytest.raises(EngineError, match="was closed"):
        list(outputs)
    closing.join(SECONDS)
    assert model.closed
    assert len(model.batches) <= 3
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        list(engine.run([make_request("b", [5], 4)]))
    with pytest.raises(EngineError, match="was closed"):
        engine.swap_runner(PagedModel())


def test_an_event_loop_that_is_gone_ends_its_requests() -> None:
    model = GatedModel()
    with running(model) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.stream(make_request("a", [5], 40, ignore_eos=True))
        task = loop.create_task(anext(stream))  # type: ignore[arg-type]
        model.gate.release(1)
        loop.run_until_complete(task)
        loop._asyncgens.discard(stream)  # type: ignore[attr-defined]  # as if the loop had been lost without a goodbye
        loop.close()
        model.gate.release(100)
        assert engine.drain(SECONDS)
        assert engine.stats().kv_blocks_used == 0
        del stream, task
        gc.collect()


def test_a_process_ends_while_the_engine_works() -> None:
    code = (
        "from tests.unit.engine.test_async_engine import *\n"
        "engine = AsyncEngine(make_engine(PagedModel()))\n"
        "next(engine.run([make_request('a', [5], 90, ignore_eos=True)]))\n"
        "outputs = engine.run([make_request('b', [5], 90, ignore_eos=True, n=50)])\n"
        "next(outputs)\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
