from __future__ import annotations

import queue
import threading

import pytest

from flowfn.clock import Clock

WAIT_S = 30.0


def test_actions_come_in_the_order_of_their_time() -> None:
    clock, seen = Clock(), queue.SimpleQueue[str]()
    clock.later(0.1, lambda: seen.put("last"))
    clock.later(0.05, lambda: seen.put("second"))
    clock.later(0.0, lambda: seen.put("first"))
    assert [seen.get(timeout=WAIT_S) for _ in range(3)] == ["first", "second", "last"]


def test_an_earlier_one_wakes_the_clock() -> None:
    clock, seen = Clock(), queue.SimpleQueue[str]()
    late = clock.later(3600, lambda: seen.put("late"))
    clock.later(0, lambda: seen.put("early"))
    assert seen.get(timeout=WAIT_S) == "early"
    late.cancel()


def test_what_was_taken_back_does_not_happen() -> None:
    clock, seen = Clock(), queue.SimpleQueue[str]()
    timer = clock.later(0.05, lambda: seen.put("cancelled"))
    timer.cancel()
    clock.later(0.1, lambda: seen.put("kept"))
    assert seen.get(timeout=WAIT_S) == "kept" and seen.empty()


def test_an_action_may_set_another_and_cancel_itself() -> None:
    clock, done = Clock(), threading.Event()

    def again(left: int) -> None:
        if left:
            timer = clock.later(0, lambda: again(left - 1))
            assert timer is not None
        else:
            done.set()

    again(20)
    assert done.wait(WAIT_S)


def test_one_that_raises_does_not_stop_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    clock, done = Clock(), threading.Event()

    def fail() -> None:
        raise ValueError("of an action")

    clock.later(0, fail)
    clock.later(0.01, done.set)
    assert done.wait(WAIT_S), "all time limits hang on this thread"
    assert "of an action" in capfd.readouterr().err


def test_from_many_threads() -> None:
    clock, seen = Clock(), queue.SimpleQueue[int]()
    threads = [
        threading.Thread(target=lambda n=n: clock.later(0.001 * (n % 7), lambda: seen.put(n))) for n in range(50)
    ]
    for thread in threads:
        thread.start()
    assert sorted(seen.get(timeout=WAIT_S) for _ in threads) == list(range(50))
    for thread in threads:
        thread.join()
