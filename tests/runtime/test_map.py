"""The contract of map, line by line, where it takes more than a case of the backends' contract to show it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import flowfn as flow
from flowfn.testing import Meeting

WAIT_S = 60.0


class Counter:
    """Numbers without end; others can wait until so many were taken."""

    def __init__(self, count: int | None = None) -> None:
        self.taken = 0
        self.most_ahead = 0
        self.consumed = 0
        self.changed = threading.Condition()
        self._count = count

    def __iter__(self) -> Iterator[int]:
        for number in itertools.count() if self._count is None else range(self._count):
            with self.changed:
                self.taken += 1
                self.most_ahead = max(self.most_ahead, self.taken - self.consumed)
                self.changed.notify_all()
            yield number

    def wait_until_taken(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.taken >= count, WAIT_S), f"{self.taken} taken and not {count}"


def identity(x: Any) -> Any:
    return x


# 1. inputs are pulled lazily; the window is full whatever the consumer's speed


@pytest.mark.parametrize("window", [1, 4, 50])
def test_a_slow_consumer_finds_the_window_full(window: int) -> None:
    """Between any two results the pump fills the window again, though the consumer does nothing for it.

    All but an eighth, that is: it does not get up for every single item.
    """
    source = Counter()
    mapped = flow.function(max_workers=2)(identity).map(source, window=window)
    for n in range(30):
        source.wait_until_taken(n + window - window // 8)
        assert next(mapped) == n
        source.consumed = n + 1
    assert source.most_ahead <= window + 1
    mapped.close()


def test_results_are_there_before_they_are_asked_for(meeting: Meeting) -> None:
    """All of the window is computed while the consumer looks at nothing."""
    meet = meeting.meet

    def f(n: int) -> int:
        meet(str(n)).close()
        return n

    mapped = flow.function(max_workers=2)(f).map(itertools.count(), window=10)
    assert sorted(int(meeting.next().said) for _ in range(10)) == list(range(10))
    assert [next(mapped) for _ in range(5)] == list(range(5))
    mapped.close()


def test_a_million_items_in_constant_memory() -> None:
    code = """
        import resource, sys
        import flowfn as flow

        @flow.function(max_workers=2)
        def f(n): return n + 1

        def source(count, seen):
            for n in range(count):
                seen[0] = n
                yield n

        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def consume(count):
            total, most, seen = 0, 0, [0]
            for n, result in enumerate(f.map(source(count, seen))):
                total += result
                most = max(most, seen[0] - n)
            return total, most

        consume(100_000)
        before = peak()
        total, most = consume(1_000_000)
        print(total, most, peak() - before)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    total, most, grown_kib = map(int, ran.stdout.split())
    assert total == 1_000_000 * 1_000_001 // 2
    assert most <= 40_000, "items under way"
    assert grown_kib < 20_000, "ten times as many items took more memory"


def test_big_inputs_make_the_window_small() -> None:
    np = pytest.importorskip("numpy")
    source = Counter()
    inputs = (np.full(1 << 20, n) for n in source)  # 8 MiB each
    mapped = flow.function(max_workers=2)(lambda array: int(array[0])).map(inputs)
    for n in range(100):
        assert next(mapped) == n
        source.consumed = n + 1
    mapped.close()
    assert source.most_ahead <= 70


def test_what_was_taken_is_let_go() -> None:
    class Thing:
        pass

    alive: list[weakref.ref[Thing]] = []

    def source() -> Iterator[Thing]:
        while True:
            thing = Thing()
            alive.append(weakref.ref(thing))
            yield thing

    mapped = flow.function(max_workers=1)(lambda thing: None).map(source(), window=8)
    for _ in range(200):
        next(mapped)
    gc.collect()
    assert sum(ref() is not None for ref in list(alive)) <= 40
    mapped.close()


# 2. order


def test_unordered_results_are_all_there() -> None:
    function = flow.function(max_workers=3)(identity)
    assert sorted(function.map(range(20_000), order_outputs=False)) == list(range(20_000))


def test_async_for_lets_others_run(meeting: Meeting) -> None:
    meet = meeting.meet

    def f(n: int) -> int:
        if n == 3:
            meet().recv(1)
        return n

    async def main() -> list[int]:
        async def release() -> None:
            met = await asyncio.get_running_loop().run_in_executor(None, meeting.next)
            met.let_go()

        other = asyncio.create_task(release())
        seen = [result async for result in flow.function(max_workers=1)(f).map(range(6))]
        await other
        return seen

    assert asyncio.run(main()) == list(range(6))


# 3. batches change nothing


@pytest.mark.parametrize("count", [1, 2, 17, 1_000, 100_000])
def test_batches_of_any_size(count: int) -> None:
    assert list(flow.function(max_workers=2)(identity).map(range(count))) == list(range(count))


def test_tiny_items_do_travel_together() -> None:
    """Else this takes 100,000 round trips; counted by the writes of the worker."""

    def writes(n: int) -> int:
        with open("/proc/self/io") as file:
            return int(dict(line.split(": ") for line in file.read().splitlines())["syscw"]) if n % 1000 == 0 else 0

    counts = [n for n in flow.function(max_workers=1)(writes).map(range(50_000)) if n]
    assert counts[-1] - counts[0] < 5_000


def test_a_result_waits_for_no_company(meeting: Meeting) -> None:
    """An item that takes long holds up its own result only, however many were batched with it."""
    meet = meeting.meet

    def f(n: int) -> int:
        if n == 5_000:
            meet().recv(1)
        return n

    mapped = flow.function(max_workers=1)(f).map(range(5_010))
    assert [next(mapped) for _ in range(5_000)] == list(range(5_000))
    meeting.next().let_go()
    assert list(mapped) == list(range(5_000, 5_010))


def test_long_items_are_spread_over_all_workers(meeting: Meeting) -> None:
    """Short items first, so that batches have grown; then long ones, which all workers share."""
    meet = meeting.meet

    def f(n: int) -> int:
        if n >= 2_000:
            connection = meet(str(os.getpid()))
            connection.recv(1)
        return n

    mapped = flow.function(max_workers=3)(f).map(range(2_006))
    assert [next(mapped) for _ in range(2_000)] == list(range(2_000))
    held = [meeting.next() for _ in range(3)]
    assert len({met.said for met in held}) == 3
    for met in held:
        met.let_go()
    for _ in range(3):
        meeting.next().let_go()
    assert list(mapped) == list(range(2_000, 2_006))


# 4. exceptions


@pytest.mark.parametrize("bad", [0, 1, 57, 999])
@pytest.mark.parametrize("kind", ["plain", "general"])
def test_the_first_exception_comes_in_its_place(bad: int, kind: str) -> None:
    def f(x: Any) -> int:
        n: int = x if isinstance(x, int) else x[0]
        if n >= bad:
            raise ValueError(n)
        return n

    inputs: list[Any] = list(range(1_000)) if kind == "plain" else [[n] for n in range(1_000)]
    seen = []
    with pytest.raises(ValueError) as caught:
        for result in flow.function(max_workers=3)(f).map(inputs):
            seen.append(result)
    assert seen == list(range(bad)) and caught.value.args == (bad,)


def test_what_is_queued_after_a_failure_does_not_run(meeting: Meeting) -> None:
    meet = meeting.meet

    def f(n: int) -> int:
        if n == 3:
            raise ValueError(n)
        meet(str(n)).close()
        return n

    with pytest.raises(ValueError):
        list(flow.function(max_workers=1)(f).map(range(100), window=50))
    flow.shutdown()
    ran = [int(meeting.next().said) for _ in range(3)]
    meeting._listener.settimeout(0)
    with pytest.raises(BlockingIOError):
        while True:
            ran.append(int(meeting.next().said))
    assert ran == [0, 1, 2]


def test_unordered_exceptions_end_the_map() -> None:
    def f(n: int) -> int:
        if n == 500:
            raise ValueError(n)
        return n

    seen = []
    with pytest.raises(ValueError):
        for result in flow.function(max_workers=2)(f).map(itertools.count(), order_outputs=False):
            seen.append(result)
    assert len(seen) == len(set(seen)) and 500 not in seen


def test_values_that_are_exceptions_are_values() -> None:
    results = list(flow.function(lambda n: ValueError(n)).map(range(3)))
    assert [result.args for result in results] == [(0,), (1,), (2,)]


def test_a_worker_that_can_not_be_had_ends_the_map() -> None:
    function = flow.function(gpu="b200")(identity)
    with pytest.raises(flow.ResourceUnavailable):
        list(function.map(range(10)))
    with pytest.raises(flow.ResourceUnavailable):
        list(function.map(range(10), return_exceptions=True))


def test_a_source_that_raises_later_keeps_what_was_before() -> None:
    def source() -> Iterator[int]:
        yield from range(500)
        raise LookupError

    for options in ({}, {"return_exceptions": True}, {"order_outputs": False}):
        seen = []
        with pytest.raises(LookupError):
            for result in flow.function(max_workers=2)(identity).map(source(), **options):
                seen.append(result)
        assert sorted(seen) == list(range(500)), options


def test_a_source_that_is_a_map_itself() -> None:
    function = flow.function(max_workers=2)(lambda x: x + 1)
    assert list(function.map(function.map(function.map(range(300))))) == list(range(3, 303))


# 5. the end


def test_closing_again_and_reading_on() -> None:
    mapped = flow.function(identity).map(range(100))
    assert next(mapped) == 0
    mapped.close()
    mapped.close()
    assert list(mapped) == []
    with pytest.raises(StopIteration):
        next(mapped)


def test_closing_from_another_thread(meeting: Meeting) -> None:
    meet = meeting.meet

    def f(n: int) -> None:
        meet().recv(1)

    mapped = flow.function(max_workers=1)(f).map(range(10))
    met = meeting.next()
    closer = threading.Thread(target=mapped.close)
    closer.start()
    assert list(mapped) == []
    closer.join()
    met.wait_for_end()


def test_a_generator_that_waits_is_left_alone() -> None:
    """Leaving the loop does not wait for a source that gives nothing."""
    waiting, go_on = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        waiting.set()
        go_on.wait(WAIT_S)

    mapped = flow.function(identity).map(source())
    assert next(mapped) == 1
    assert waiting.wait(WAIT_S)
    mapped.close()
    assert list(mapped) == []
    go_on.set()


def test_many_short_maps() -> None:
    function = flow.function(max_workers=2)(identity)
    for count in range(60):
        assert list(function.map(range(count))) == list(range(count))
    assert threading.active_count() < 60


# 6. keyword arguments


def test_keywords_are_one_object_in_each_worker() -> None:
    def f(n: int, table: Any) -> tuple[int, int]:
        return os.getpid(), id(table)

    seen = set(flow.function(max_workers=3)(f).map(range(2_000), kwargs={"table": list(range(100_000))}))
    assert len(seen) == len({pid for pid, _ in seen})


def test_keywords_of_another_map_are_others() -> None:
    function = flow.function(max_workers=1)(lambda n, k=0: n + k)
    assert list(function.map([1], kwargs={"k": 10})) == [11]
    assert list(function.map([1], kwargs={"k": 20})) == [21]
    assert list(function.map([1])) == [1]


def test_keywords_are_not_kept_when_the_map_is_over() -> None:
    def rss(n: int, data: bytes = b"") -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    function = flow.function(max_workers=1)(rss)
    (before,) = function.map([1])
    for _ in range(6):
        assert list(function.map([1], kwargs={"data": os.urandom(50_000_000)}))
    gc.collect()
    function.remote(1)
    (after,) = function.map([1])
    assert after - before < 150_000_000


def test_keywords_that_can_not_be_pickled() -> None:
    with pytest.raises(flow.SerializationError, match="lock"):
        list(flow.function(lambda n, lock: n).map([1], kwargs={"lock": threading.Lock()}))
