from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

import flowfn as flow
from flowfn.testing import Meeting

WAIT_S = 60.0


@flow.function
async def add(x: int, y: int = 1) -> int:
    await asyncio.sleep(0)
    return x + y


def test_here_it_is_a_coroutine() -> None:
    assert asyncio.run(add(1, y=2)) == 3
    coroutine = add.local(1)
    assert asyncio.iscoroutine(coroutine)
    coroutine.close()


def test_elsewhere_it_is_awaited() -> None:
    assert add.remote(1) == 2 and add.spawn(2).result(WAIT_S) == 3
    assert list(add.map(range(100))) == list(range(1, 101))
    assert list(add.starmap([(1, 2), (3, 4)])) == [3, 7]
    add.for_each(range(3))


def test_exceptions() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("awaited")

    with pytest.raises(KeyError, match="awaited"):
        flow.function(fails).remote()


def test_background_tasks_live_on_between_calls() -> None:
    """The loop is the worker's, so a connection pool of one call serves the next."""

    async def start() -> str:
        import sys

        async def background() -> str:
            await asyncio.sleep(0)
            return "done meanwhile"

        vars(sys)["flowfn_task"] = asyncio.get_running_loop().create_task(background())
        return "started"

    async def finish() -> Any:
        import sys

        return await vars(sys)["flowfn_task"]

    options: dict[str, Any] = {"max_workers": 1, "env": {"S": "loop"}}
    assert flow.function(**options)(start).remote() == "started"
    assert flow.function(**options)(finish).remote() == "done meanwhile"


def test_plain_functions_may_run_loops_of_their_own() -> None:
    async def coroutine() -> int:
        return 1

    def runs() -> int:
        return asyncio.run(coroutine())

    options: dict[str, Any] = {"max_workers": 1, "env": {"S": "own"}}
    assert flow.function(**options)(coroutine).remote() == 1
    assert flow.function(**options)(runs).remote() == 1
    assert flow.function(**options)(coroutine).remote() == 1


def test_a_plain_function_that_returns_a_coroutine() -> None:
    async def coroutine(x: int) -> int:
        return x * 2

    assert flow.function(lambda x: coroutine(x)).remote(4) == 8
    assert list(flow.function(lambda x: coroutine(x)).map([1, 2])) == [2, 4]


def test_awaitables_that_are_no_coroutines() -> None:
    class Later:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return 5

    async def through() -> Any:
        return await Later()

    assert flow.function(through).remote() == 5


def test_context_variables_do_not_leak_between_calls() -> None:
    async def count(name: str) -> int:
        import sys

        variable = vars(sys).setdefault("flowfn_variable", contextvars.ContextVar("v", default=0))
        variable.set(variable.get() + 1)
        return int(variable.get())

    function = flow.function(max_workers=1, env={"S": "context"})(count)
    assert [function.remote("a") for _ in range(3)] == [1, 1, 1]


def test_cancelling_ends_the_function(meeting: Meeting) -> None:
    meet = meeting.meet

    async def waits() -> None:
        connection = meet("waiting")
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_recv(connection, 1)

    async def main() -> None:
        future = flow.function(waits).spawn()
        met = await asyncio.get_running_loop().run_in_executor(None, meeting.next)
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future
        await asyncio.get_running_loop().run_in_executor(None, met.wait_for_end)

    asyncio.run(main())


def test_a_time_limit_for_what_only_waits(meeting: Meeting) -> None:
    async def waits() -> None:
        await asyncio.sleep(3600)

    with pytest.raises(flow.FunctionTimeout):
        flow.function(timeout=0.3)(waits).remote()


def test_output_of_coroutines() -> None:
    async def prints() -> None:
        print("one")
        await asyncio.sleep(0)
        print("two")

    future = flow.function(prints).spawn()
    future.result(WAIT_S)
    assert future.logs() == "one\ntwo\n"


def test_methods_and_classes() -> None:
    class Client:
        def __init__(self, base: int) -> None:
            self.base = base

        @flow.function
        async def fetch(self, n: int) -> int:
            return self.base + n

    client = Client(10)
    assert client.fetch.remote(1) == 11
    assert asyncio.run(client.fetch(2)) == 12
    assert list(client.fetch.map([1, 2])) == [11, 12]


def test_remote_in_a_coroutine_works_and_warns() -> None:
    async def main() -> int:
        with pytest.warns(RuntimeWarning, match=r"await add\.spawn\(\.\.\.\)") as caught:
            result = add.remote(1)
        assert caught[0].filename == __file__
        return int(result)

    assert asyncio.run(main()) == 2
