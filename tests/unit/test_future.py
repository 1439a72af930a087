"""Futures alone: their states, without anything that runs. tests/contract has them run."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import pytest

from flowfn.body import Version
from flowfn.call import Call, Outcome
from flowfn.future import Future
from flowfn.spec import FunctionSpec
from flowfn_runtime import pickling
from flowfn_runtime.errors import CallCancelled, SerializationError

WAIT_S = 30.0


def make() -> Future[Any]:
    return Future(Call(FunctionSpec(), "f", Version(pickling.dumps(None)), pickling.dumps(((), {}))))


def value(result: Any) -> Outcome:
    return Outcome(data=pickling.dumps(result))


def test_from_pending_to_done() -> None:
    future = make()
    assert future.status == "pending" and not future.done() and not future.running()
    assert future._start() and future.running()
    future._finish(value(7))
    assert future.done() and future.result() == 7 and future.exception() is None and future.status == "completed"
    assert future.result() is future.result(), "it is unpickled once"


def test_from_pending_to_failed() -> None:
    future = make()
    assert future._start()
    future._finish(Outcome(error=KeyError("k")))
    assert future.status == "failed" and isinstance(future.exception(), KeyError)
    with pytest.raises(KeyError):
        future.result()


def test_a_value_that_can_not_be_read_is_a_failure() -> None:
    future = make()
    future._start()
    future._finish(Outcome(data=pickling.Payload(b"not a pickle", [], [])))
    assert isinstance(future.exception(), SerializationError) and future.status == "failed"
    with pytest.raises(SerializationError):
        future.result()


def test_the_outcome_wakes_all_who_wait() -> None:
    future = make()
    future._start()
    seen: list[Any] = []
    threads = [threading.Thread(target=lambda: seen.append(future.result(WAIT_S))) for _ in range(5)]
    for thread in threads:
        thread.start()
    future._finish(value("x"))
    for thread in threads:
        thread.join()
    assert seen == ["x"] * 5


def test_cancelled_before_it_began() -> None:
    future = make()
    heard: list[Any] = []
    future.add_done_callback(heard.append)
    assert future.cancel() and future.cancelled() and heard == [future]
    assert future.cancel(), "as often as one likes"
    assert not future._start() and heard == [future]
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    assert future.status == "cancelled"


def test_cancelled_while_it_ran_whatever_comes_later() -> None:
    future = make()
    future._start()
    assert future.cancel() and future._call.cancelled
    future._finish(value(1))
    assert future.cancelled()
    future._finish(Outcome(error=CallCancelled("cancelled")))
    assert future.cancelled()


def test_a_shutdown_reads_as_cancelled() -> None:
    future = make()
    future._start()
    future._finish(Outcome(error=CallCancelled("the pool was shut down")))
    assert future.cancelled()


def test_cancelling_what_is_done_changes_nothing() -> None:
    future = make()
    future._start()
    future._finish(value(1))
    assert not future.cancel() and future.result() == 1


def test_waiters_hear_of_a_cancellation_at_once() -> None:
    future, other = make(), make()
    waiting = threading.Event()
    seen: list[Any] = []

    def wait() -> None:
        waiting.set()
        done, _ = concurrent.futures.wait([future, other], WAIT_S, return_when=concurrent.futures.FIRST_COMPLETED)
        seen.append(done)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(WAIT_S)
    future.cancel()
    thread.join()
    assert seen == [{future}]


def test_callbacks_may_raise(caplog: pytest.LogCaptureFixture) -> None:
    future = make()
    future.add_done_callback(lambda _: 1 / 0)
    heard: list[Any] = []
    future.add_done_callback(heard.append)
    future._start()
    future._finish(value(1))
    assert heard == [future] and "ZeroDivisionError" in caplog.text


def test_each_call_has_an_id_of_its_own() -> None:
    assert len({make().call_id for _ in range(100)}) == 100
