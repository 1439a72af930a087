from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import flowfn as flow
from flowfn.testing import Meeting

WAIT_S = 60.0


@flow.function(max_workers=1)
def count(n: int) -> Iterator[int]:
    yield from range(n)


def test_here_it_is_the_plain_generator() -> None:
    assert list(count(3)) == [0, 1, 2] and list(count.local(2)) == [0, 1]


def test_nothing_yielded() -> None:
    assert list(count.remote(0)) == []


def test_the_worker_is_free_after_the_last_value() -> None:
    for _ in range(20):
        assert list(count.remote(5)) == [0, 1, 2, 3, 4]


def test_a_future_of_a_generator_is_an_iterator() -> None:
    assert list(count.spawn(4).result(WAIT_S)) == [0, 1, 2, 3]


def test_big_values_one_after_another() -> None:
    np = pytest.importorskip("numpy")

    def arrays(n: int) -> Iterator[Any]:
        import numpy as np

        for i in range(n):
            yield np.full(500_000, i)

    kept = []
    for i, array in enumerate(flow.function(max_workers=1)(arrays).remote(40)):
        assert array[0] == i and array[-1] == i
        if i % 10 == 0:
            kept.append(array)
    assert [int(array[7]) for array in kept] == [0, 10, 20, 30]
    assert np is not None


def test_many_streams_at_a_time() -> None:
    function = count.options(max_workers=4)
    streams = [function.remote(n) for n in (1000, 500, 2000, 30)]
    assert [sum(1 for _ in stream) for stream in streams] == [1000, 500, 2000, 30]


def test_a_stream_read_by_another_thread() -> None:
    stream = count.remote(200)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.extend(stream))
    thread.start()
    thread.join(WAIT_S)
    assert seen == list(range(200))


def test_a_stream_that_is_dropped_frees_its_worker(meeting: Meeting) -> None:
    meet = meeting.meet

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            meet("over").close()

    function = flow.function(max_workers=1)(endless)
    for _ in range(3):
        stream = function.remote()
        assert next(stream) == 1
        del stream
        gc.collect()
        assert meeting.next().said == "over"


def test_closing_while_the_next_value_takes_long(meeting: Meeting) -> None:
    """Then its worker is ended: nobody waits for what nobody wants."""
    meet = meeting.meet

    def slow() -> Iterator[int]:
        yield 1
        meet().recv(1)
        yield 2

    stream: Any = flow.function(max_workers=1)(slow).remote()
    assert next(stream) == 1
    met = meeting.next()
    stream.close()
    met.wait_for_end()
    assert list(stream) == []


def test_a_value_that_can_not_be_pickled() -> None:
    def values() -> Iterator[Any]:
        import threading

        yield 1
        yield threading.Lock()

    stream = flow.function(max_workers=1)(values).remote()
    assert next(stream) == 1
    with pytest.raises(flow.SerializationError, match="lock"):
        next(stream)
    assert list(count.remote(2)) == [0, 1]


def test_a_value_that_can_not_be_rebuilt_here() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "class Bomb:\n"
        "    def __reduce__(self): return explode, ()\n"
        "def explode(): raise ValueError('boom')\n"
        "def values():\n"
        "    yield 1\n"
        "    yield Bomb()\n"
        "    yield 3\n",
        namespace,
    )
    stream = flow.function(max_workers=1)(namespace["values"]).remote()
    assert next(stream) == 1
    with pytest.raises(flow.SerializationError, match="boom"):
        next(stream)
    stream.close()


def test_it_is_tried_again_only_while_nothing_was_yielded() -> None:
    def flaky(when: str) -> Iterator[str]:
        os.environ[when] = os.environ.get(when, "") + "x"
        if when == "early" and len(os.environ[when]) < 3:
            raise ValueError(when)
        yield os.environ[when]
        if when == "late":
            raise ValueError(when)

    function = flow.function(max_workers=1, retries=flow.Retries(5, initial_delay=0))(flaky)
    stream = function.remote("late")
    assert next(stream) == "x"
    with pytest.raises(ValueError, match="late"):
        next(stream)
    assert next(function.remote("late")) == "xx", "it ran once a call"


def test_output_between_values_is_the_calls() -> None:
    def chatty() -> Iterator[int]:
        for n in range(3):
            print(f"before {n}")
            yield n

    future = flow.function(chatty).spawn()
    assert list(future.result(WAIT_S)) == [0, 1, 2]
    assert future.logs().splitlines() == ["before 0", "before 1", "before 2"]


def test_async_for_over_a_plain_generator() -> None:
    async def main() -> list[int]:
        stream: Any = await count.spawn(30)
        return [value async for value in stream]

    assert asyncio.run(main()) == list(range(30))


def test_an_asynchronous_generator_is_closed(meeting: Meeting) -> None:
    meet = meeting.meet

    async def endless() -> Any:
        import asyncio

        try:
            n = 0
            while True:
                await asyncio.sleep(0)
                yield n
                n += 1
        finally:
            await asyncio.sleep(0)
            meet("closed").close()

    function = flow.function(max_workers=1)(endless)
    stream: Any = function.remote()
    assert [next(stream) for _ in range(20)] == list(range(20))
    stream.close()
    assert meeting.next().said == "closed"


def test_generators_that_delegate_and_return() -> None:
    def inner(n: int) -> Any:
        yield n
        return n * 10

    def outer() -> Any:
        first = yield from inner(1)
        yield first

    assert list(flow.function(outer).remote()) == [1, 10]


def test_a_function_that_returns_a_generator_streams_as_well() -> None:
    assert list(flow.function(lambda n: (i * i for i in range(n))).remote(4)) == [0, 1, 4, 9]
    assert list(flow.function(lambda n: iter(range(n))).remote(3)) == [0, 1, 2]
