"""Futures of real calls, beyond the cases of the contract."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from typing import Any

import pytest

import flowfn as flow
from flowfn.testing import Meeting

WAIT_S = 60.0


def identity(x: Any) -> Any:
    return x


def test_spawn_returns_while_all_workers_are_busy(meeting: Meeting) -> None:
    meet = meeting.meet

    def f(n: int) -> int:
        meet().recv(1)
        return n

    function = flow.function(max_workers=2)(f)
    futures = [function.spawn(n) for n in range(200)]
    assert not any(future.done() for future in futures)
    for future in futures[4:]:
        assert future.cancel()
    for _ in range(4):
        meeting.next().let_go()
    assert [future.result(WAIT_S) for future in futures[:4]] == [0, 1, 2, 3]


def test_calls_start_in_the_order_they_were_made() -> None:
    order: list[str] = []
    futures = [flow.function(max_workers=1, env={"S": "o"})(identity).spawn(n) for n in range(100)]
    for future in futures:
        future.add_done_callback(lambda f: order.append(f.result()))
    concurrent.futures.wait(futures, WAIT_S)
    assert order == list(range(100))


def test_arguments_and_results_are_let_go() -> None:
    class Thing:
        pass

    thing = Thing()
    alive = weakref.ref(thing)
    future = flow.function(identity).spawn([thing])
    result = future.result(WAIT_S)
    del thing
    gc.collect()
    assert alive() is None, "the future keeps its arguments"
    there = weakref.ref(result[0])
    del result, future
    gc.collect()
    assert there() is None


def test_a_result_is_rebuilt_by_who_asks_for_it() -> None:
    """Not by a thread that others wait for."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "import threading\n"
        "class Where:\n"
        "    def __reduce__(self): return name, ()\n"
        "def name(): return threading.current_thread().name\n"
        "def f(): return Where()\n",
        namespace,
    )
    future = flow.function(namespace["f"]).spawn()
    concurrent.futures.wait([future], WAIT_S)
    assert future.result() == threading.current_thread().name


def test_many_futures_awaited_together() -> None:
    async def main() -> list[int]:
        function = flow.function(identity)
        return list(await asyncio.gather(*(function.spawn(n) for n in range(300))))

    assert asyncio.run(main()) == list(range(300))


def test_wait_for_and_as_completed_of_asyncio(meeting: Meeting) -> None:
    meet = meeting.meet

    def f() -> None:
        meet().recv(1)

    async def main() -> None:
        future = flow.function(max_workers=1)(f).spawn()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(future), 0.2)
        assert future.cancelled(), "giving up cancels the call"
        futures = [asyncio.wrap_future(flow.function(identity).spawn(n)) for n in range(5)]
        assert sorted([await each for each in asyncio.as_completed(futures)]) == list(range(5))

    asyncio.run(main())


def test_logs_grow_while_it_runs(meeting: Meeting) -> None:
    meet = meeting.meet

    def f() -> None:
        for n in range(3):
            print(f"step {n}", flush=True)
            meet().recv(1)

    future = flow.function(f).spawn()
    for n in range(3):
        met = meeting.next()
        while f"step {n}" not in future.logs():  # it is on its way: what it prints comes before it is let go
            gc.collect()
        assert f"step {n + 1}" not in future.logs()
        met.let_go()
    future.result(WAIT_S)


def test_cancelled_futures_are_quickly_forgotten_by_the_queue() -> None:
    def hold(path: str) -> None:
        with open(path) as file:
            file.read()

    function = flow.function(max_workers=1, env={"S": "c"})(hold)
    path = os.path.join(os.environ["FLOW_HOME"] + "-fifo")
    os.mkfifo(path)
    running = function.spawn(path)
    waiting = [function.spawn(path) for _ in range(50)]
    assert all(future.cancel() for future in waiting) and running.cancel()
    assert flow.function(max_workers=1, env={"S": "c"})(identity).remote(1) == 1


def test_a_program_that_ends_with_futures_pending_says_so() -> None:
    code = """
        import flowfn as flow, time
        f = flow.function(max_workers=1)(time.sleep)
        futures = [f.spawn(1000) for _ in range(3)]
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=WAIT_S)
    assert ran.returncode == 0 and "3 calls were not finished" in ran.stderr and "Traceback" not in ran.stderr


def test_callbacks_may_start_calls() -> None:
    done = threading.Event()
    seen: list[int] = []
    function = flow.function(max_workers=1)(lambda n: n + 1)

    def more(future: Any) -> None:
        seen.append(future.result())
        if len(seen) < 10:
            function.spawn(seen[-1]).add_done_callback(more)
        else:
            done.set()

    function.spawn(0).add_done_callback(more)
    assert done.wait(WAIT_S) and seen == list(range(1, 11))


def test_a_future_in_another_ones_arguments_is_refused() -> None:
    future = flow.function(identity).spawn(1)
    with pytest.raises(flow.SerializationError):
        flow.function(identity).remote(future)
