"""The executor, as libraries use executors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest

import flowfn as flow
from flowfn.testing import Meeting

WAIT_S = 60.0


def script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=WAIT_S)


def test_options_are_those_of_functions() -> None:
    with flow.Executor(max_workers=1, env={"A": "b"}) as executor:
        assert executor.submit(os.getenv, "A").result(WAIT_S) == "b"
    with pytest.raises(flow.ValidationError, match="max_worker"):
        flow.Executor(max_worker=1)
    with pytest.raises(flow.ValidationError):
        flow.Executor(0)


def test_lambdas_closures_and_decorated_functions() -> None:
    base = 10
    with flow.Executor(1) as executor:
        assert executor.submit(lambda x: x + base, 1).result(WAIT_S) == 11
        assert executor.submit(flow.function(lambda x: x * base), 2).result(WAIT_S) == 20
        assert list(executor.map(flow.function(lambda x: x - base), [11, 12])) == [1, 2]


def test_map_raises_and_times_out(meeting: Meeting) -> None:
    meet = meeting.meet

    def f(n: int) -> int:
        if n == 2:
            raise ValueError(n)
        if n == 9:
            meet().recv(1)
        return n

    with flow.Executor(2) as executor:
        results = executor.map(f, range(5))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError):
            next(results)
        late = executor.map(f, [9], timeout=0.05)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(late)
        meeting.next().let_go()
    with pytest.raises(ValueError), flow.Executor(1) as executor:
        executor.map(f, [1], chunksize=0)


@pytest.mark.parametrize("chunksize", [1, 3, 1000])
def test_map_with_chunks(chunksize: int) -> None:
    with flow.Executor(2) as executor:
        assert list(executor.map(pow, range(100), [2] * 100, chunksize=chunksize)) == [n * n for n in range(100)]
        assert list(executor.map(abs, [], chunksize=chunksize)) == []


def test_leaving_waits(meeting: Meeting) -> None:
    meet = meeting.meet

    def f() -> int:
        meet().recv(1)
        return 1

    with flow.Executor(1) as executor:
        future = executor.submit(f)
        releaser = threading.Thread(target=lambda: meeting.next().let_go())
        releaser.start()
    assert future.done() and future.result() == 1
    releaser.join()


def test_shutdown_again_and_again() -> None:
    executor = flow.Executor(1)
    executor.submit(abs, -1)
    for _ in range(3):
        executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(abs, -1)
    with pytest.raises(RuntimeError):
        list(executor.map(abs, [1]))


def test_two_executors_do_not_share_workers_nor_their_end() -> None:
    one, other = flow.Executor(1), flow.Executor(1)
    first, second = one.submit(os.getpid).result(WAIT_S), other.submit(os.getpid).result(WAIT_S)
    assert first != second
    one.shutdown()
    assert other.submit(os.getpid).result(WAIT_S) == second
    other.shutdown()


def test_an_executor_without_a_call_costs_nothing_to_end() -> None:
    with flow.Executor(4):
        pass


def test_the_interpreter_ends_when_the_calls_are_done() -> None:
    ran = script(
        """
        import flowfn as flow, time
        executor = flow.Executor(2)
        future = executor.submit(time.sleep, 0.3)
        future.add_done_callback(lambda f: (time.sleep(0.3), print("done", f.exception())))
        """
    )
    assert ran.stdout == "done None\n" and ran.stderr == "" and ran.returncode == 0


def test_callbacks_that_shut_the_executor_down() -> None:
    ran = script(
        """
        import flowfn as flow, time
        executor = flow.Executor(2)
        for n in range(4):
            executor.submit(time.sleep, 0.2).add_done_callback(lambda f: (executor.shutdown(), print("down")))
        """
    )
    assert ran.stdout == "down\n" * 4 and ran.stderr == "" and ran.returncode == 0


def test_an_error_in_the_with_block_is_the_users() -> None:
    with pytest.raises(ZeroDivisionError), flow.Executor(1) as executor:
        executor.submit(abs, -1)
        1 / 0  # noqa: B018


def test_asyncio_uses_it_as_its_default() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        with flow.Executor(2) as executor:
            return list(await asyncio.gather(*(loop.run_in_executor(executor, os.getpid) for _ in range(6))))

    assert os.getpid() not in asyncio.run(main())


def test_as_completed_and_wait() -> None:
    with flow.Executor(3) as executor:
        futures = {executor.submit(abs, -n): n for n in range(30)}
        for future in concurrent.futures.as_completed(futures, WAIT_S):
            assert future.result() == futures[future]
        done, left = concurrent.futures.wait(futures, WAIT_S, concurrent.futures.FIRST_EXCEPTION)
        assert len(done) == 30 and not left


def test_threads_share_an_executor() -> None:
    results: list[int] = []
    with flow.Executor(2) as executor:
        threads = [
            threading.Thread(target=lambda n=n: results.append(executor.submit(abs, -n).result(WAIT_S)))
            for n in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == list(range(40))


def die(status: int) -> None:
    os._exit(status)


def test_a_worker_that_dies_breaks_one_call_only() -> None:
    with flow.Executor(1) as executor:
        lost = executor.submit(die, 3)
        assert isinstance(lost.exception(WAIT_S), flow.WorkerLost)
        assert executor.submit(abs, -2).result(WAIT_S) == 2


def test_dask_takes_it() -> None:
    dask: Any = pytest.importorskip("dask", reason="a peer of the benchmarks")
    with flow.Executor(2) as executor:
        total = dask.delayed(sum)([dask.delayed(pow)(n, 2) for n in range(10)])
        assert total.compute(scheduler=executor) == 285


def test_joblib_functions_and_other_odd_callables() -> None:
    import functools
    import operator

    with flow.Executor(1) as executor:
        assert executor.submit(functools.partial(int, base=2), "101").result(WAIT_S) == 5
        assert executor.submit(operator.itemgetter(1), [5, 6]).result(WAIT_S) == 6
        assert executor.submit("a-b".split, "-").result(WAIT_S) == ["a", "b"]
        assert executor.submit(dict, a=1).result(WAIT_S) == {"a": 1}


def test_submit_takes_any_keyword() -> None:
    def f(**kwargs: Any) -> Any:
        return sorted(kwargs)

    with flow.Executor(1) as executor:
        assert executor.submit(f, fn=1, self=2, timeout=3).result(WAIT_S) == ["fn", "self", "timeout"]
