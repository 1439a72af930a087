"""The number of threads, against simulated servers, by the requests a second that each does; and the size of writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flowfn_runtime.data.pace import MOST_SMALL_THREADS, Pace
from flowfn_runtime.data.writing import LARGE_BYTES, SMALL_BYTES, Writer


def threads_after(seconds: float, speed: Callable[[int], float], busy: Callable[[int], float], mean: float) -> int:
    """How many threads a transfer has by then. `busy`: the part of a processor that they take."""
    now = used = done = 0.0
    pace = Pace(mean, now=now, used=used)
    threads = pace.first
    while now < seconds:
        now += 0.005
        done += 0.005 * speed(threads)
        used += 0.005 * busy(threads)
        if pace.due(now):
            threads += pace.more(now=now, used=used, done=int(done), threads=threads, queued=10**6)
    return threads


@pytest.mark.parametrize("latency_s", [0.02, 0.1, 0.3])
def test_a_server_far_away_gets_many_threads(latency_s: float) -> None:
    assert threads_after(5, lambda n: n / latency_s, lambda n: n * 0.005, 10_000) == MOST_SMALL_THREADS


def test_a_busy_interpreter_gets_no_more() -> None:
    assert threads_after(5, lambda n: 4000.0, lambda n: 0.9, 10_000) == 1


def test_threads_that_do_not_help_stay_few() -> None:
    # The server is the limit: it does a thousand a second, whoever asks.
    assert threads_after(1, lambda n: 1000.0, lambda n: 0.2, 10_000) <= 4


def test_a_link_that_is_full_is_left_alone() -> None:
    # Eight connections fill it.
    assert 8 <= threads_after(2, lambda n: 5.0 * min(n, 8), lambda n: 0.2, 8 << 20) <= 16


def test_never_more_threads_than_work() -> None:
    pace = Pace(10_000, now=0.0, used=0.0)
    assert pace.more(now=1.0, used=0.0, done=10, threads=8, queued=3) == 3


def test_what_is_more_the_kernel_s_work_begins_with_more_threads() -> None:
    assert [Pace(mean, now=0.0, used=0.0).first for mean in (4096, 100 << 10, 16 << 20)] == [1, 1, 4]


def test_writes_get_small_where_memory_for_large_ones_is_dear() -> None:
    writer = Writer()
    for _ in range(100):
        writer.learn(1 << 20, 0.3e-3)
    writer.learn(1 << 20, 5e-3)  # once is nothing
    assert writer.at_once == LARGE_BYTES
    for _ in range(10):
        writer.learn(1 << 20, 3e-3)
    assert writer.at_once == SMALL_BYTES
