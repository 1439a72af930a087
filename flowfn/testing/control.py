"""Cases: futures, cancelling, time limits."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest

import flowfn as flow

from .base import WAIT_S, Contract, needs


class Futures(Contract):
    def test_it_is_a_future_of_the_standard_library(self) -> None:
        function = self.function(lambda x: x + 1)
        futures = [function.spawn(n) for n in range(8)]
        assert all(isinstance(future, concurrent.futures.Future) for future in futures)
        done, left = concurrent.futures.wait(futures, timeout=WAIT_S)
        assert len(done) == 8 and not left
        assert sorted(f.result() for f in concurrent.futures.as_completed(futures)) == list(range(1, 9))
        called: list[Any] = []
        futures[0].add_done_callback(called.append)
        assert called == [futures[0]]

    def test_what_it_says_of_itself(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> int:
            meet().recv(1)
            return 4

        function = self.function(f, max_workers=1)
        first, second = function.spawn(), function.spawn()
        met = meeting.next()
        assert first.status == "running" and first.running() and not first.done()
        assert second.status == "pending" and not second.running()
        assert first.call_id != second.call_id
        with pytest.raises(concurrent.futures.TimeoutError):
            first.result(timeout=0.01)
        met.let_go()
        assert first.result(timeout=WAIT_S) == 4 and first.status == "completed"
        meeting.next().let_go()
        assert second.result(timeout=WAIT_S) == 4

    def test_it_can_be_awaited(self) -> None:
        function = self.function(lambda x: x * 2)

        async def main() -> Any:
            one = await function.spawn(1)
            rest = await asyncio.gather(*(function.spawn(n) for n in range(5)))
            wrapped = await asyncio.wait_for(asyncio.wrap_future(function.spawn(9)), WAIT_S)
            return one, rest, wrapped

        assert asyncio.run(main()) == (2, [0, 2, 4, 6, 8], 18)

    def test_an_exception_is_awaited_too(self) -> None:
        def fails() -> None:
            raise KeyError("awaited")

        async def main() -> None:
            with pytest.raises(KeyError, match="awaited"):
                await self.function(fails).spawn()

        asyncio.run(main())


class Cancelling(Contract):
    @needs("cancel")
    def test_a_call_that_runs(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> None:
            meet().recv(1)

        function = self.function(f, max_workers=1)
        future = function.spawn()
        met = meeting.next()
        assert future.cancel() and future.cancelled() and future.status == "cancelled"
        met.wait_for_end()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(timeout=WAIT_S)
        assert self.function(abs, max_workers=1).remote(-2) == 2

    @needs("cancel")
    def test_all_that_it_started_ends_with_it(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> None:
            import os

            if os.fork() == 0:
                os.setsid()  # as daemons do
                if os.fork() == 0:
                    meet("grandchild").recv(1)
                os._exit(0)
            meet("function").recv(1)

        future = self.function(f).spawn()
        both = [meeting.next(), meeting.next()]
        assert {met.said for met in both} == {"function", "grandchild"}
        assert future.cancel()
        for met in both:
            met.wait_for_end()

    def test_a_call_that_waits(self, meeting: Any) -> None:
        meet = meeting.meet

        def f(n: int) -> int:
            meet(str(n)).recv(1)
            return n

        function = self.function(f, max_workers=1)
        first, second, third = function.spawn(1), function.spawn(2), function.spawn(3)
        met = meeting.next()
        assert second.cancel() and second.status == "cancelled"
        met.let_go()
        assert first.result(timeout=WAIT_S) == 1
        met = meeting.next()
        assert met.said == "3", "the cancelled call ran"
        met.let_go()
        assert third.result(timeout=WAIT_S) == 3

    def test_a_call_that_is_done(self) -> None:
        future = self.function(abs).spawn(-1)
        assert future.result(timeout=WAIT_S) == 1
        assert not future.cancel() and future.status == "completed" and future.result() == 1

    def test_callbacks_and_waiters_hear_of_it(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> None:
            meet().recv(1)

        function = self.function(f, max_workers=1)
        first, second = function.spawn(), function.spawn()
        meeting.next()
        heard: list[Any] = []
        for future in (first, second):
            future.add_done_callback(heard.append)
        assert second.cancel()
        done, _ = concurrent.futures.wait([second], timeout=WAIT_S)
        assert done == {second} and heard == [second]
        assert first.cancel() and heard == [second, first]
        assert set(concurrent.futures.as_completed([first, second], timeout=WAIT_S)) == {first, second}

    @needs("cancel")
    def test_from_asyncio(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> None:
            meet().recv(1)

        async def main() -> None:
            async def wait() -> None:
                await self.function(f).spawn()

            task = asyncio.create_task(wait())
            met = await asyncio.get_running_loop().run_in_executor(None, meeting.next)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.get_running_loop().run_in_executor(None, met.wait_for_end)

        asyncio.run(main())

    def test_shutdown_ends_everything(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> None:
            meet().recv(1)

        function = self.function(f, max_workers=1)
        running, waiting = function.spawn(), function.spawn()
        met = meeting.next()
        flow.shutdown()
        met.wait_for_end()
        for future in (running, waiting):
            with pytest.raises((concurrent.futures.CancelledError, flow.CallCancelled)):
                future.result(timeout=WAIT_S)
        assert self.function(abs).remote(-3) == 3, "after a shutdown new calls start new workers"


class Timeouts(Contract):
    @needs("timeout", timeout={"timeout": 1})
    def test_a_call_that_takes_too_long(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> None:
            import subprocess
            import sys

            child = (
                "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
                "s.sendall(b'child\\n'); s.recv(1)"
            )
            connection = meet("function")
            host, port = connection.getpeername()
            subprocess.Popen([sys.executable, "-c", child, host, str(port)])
            connection.recv(1)

        with pytest.raises(flow.FunctionTimeout, match="timeout of 1 s") as caught:
            self.function(f, timeout=1, name="sleepy").remote()
        assert isinstance(caught.value, TimeoutError) and "sleepy" in str(caught.value)
        meeting.next().wait_for_end()
        # Its child had connected before the time was up, or never will.
        meeting._listener.settimeout(0)
        try:
            child = meeting.next()
        except BlockingIOError:
            pass
        else:
            child.wait_for_end()

    @needs("timeout")
    def test_one_that_keeps_the_interpreter_busy(self) -> None:
        def f() -> None:
            while True:
                pass

        function = self.function(f, timeout=0.5, max_workers=1)
        with pytest.raises(flow.FunctionTimeout):
            function.remote()
        with pytest.raises(flow.FunctionTimeout):
            function.spawn().result(timeout=WAIT_S)

    @needs("timeout")
    def test_calls_within_the_limit(self) -> None:
        function = self.function(lambda x: x, timeout="1m")
        assert function.remote(1) == 1
        assert list(function.map(range(100))) == list(range(100))

    @needs("timeout")
    def test_it_counts_from_where_the_function_begins(self, meeting: Any) -> None:
        """Waiting for a worker is not running."""
        meet = meeting.meet

        def f(n: int) -> int:
            if n == 0:
                meet().recv(1)
            return n

        function = self.function(f, timeout=1, max_workers=1, retries=flow.Retries(1, initial_delay=0))
        first, second = function.spawn(0), function.spawn(1)
        for _ in range(2):
            meeting.next()
        assert isinstance(first.exception(timeout=WAIT_S), flow.FunctionTimeout)
        assert second.result(timeout=WAIT_S) == 1

    @needs("timeout")
    def test_in_a_map_it_means_the_same(self, meeting: Any) -> None:
        meet = meeting.meet

        def f(n: int) -> int:
            if n == 7:
                meet().recv(1)
            return n

        function = self.function(f, timeout=1, max_workers=1)
        results: list[Any] = list(function.map(range(20), return_exceptions=True))
        assert isinstance(results.pop(7), flow.FunctionTimeout)
        assert results == [n for n in range(20) if n != 7]
        seen = []
        with pytest.raises(flow.FunctionTimeout):
            for result in function.map(range(20)):
                seen.append(result)
        assert seen == list(range(7))

    @needs("timeout")
    def test_of_a_generator(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> Any:
            yield 1
            meet().recv(1)
            yield 2

        stream = self.function(f, timeout=1).remote()
        assert next(stream) == 1
        with pytest.raises(flow.FunctionTimeout):
            next(stream)
