"""Cases: `map` and its kin."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import flowfn as flow

from .base import WAIT_S, Contract, needs


class Source:
    """A generator of numbers that says how far it was taken, and when it was closed."""

    def __init__(self, count: int | None = None) -> None:
        self.taken = 0
        self.ended = threading.Event()
        self._count = count

    def __iter__(self) -> Iterator[int]:
        try:
            for number in itertools.count() if self._count is None else range(self._count):
                self.taken += 1
                yield number
        finally:
            self.ended.set()


class Maps(Contract):
    def test_results_come_in_input_order(self) -> None:
        assert list(self.function(lambda x: x * x).map(range(3_000))) == [x * x for x in range(3_000)]

    def test_or_as_they_are_ready(self, meeting: Any) -> None:
        meet = meeting.meet

        def f(n: int) -> int:
            if n == 0:
                meet().recv(1)
            return n

        results = self.function(f, max_workers=2).map(range(50), order_outputs=False)
        met = meeting.next()
        seen = [next(results) for _ in range(49)]
        assert 0 not in seen
        met.let_go()
        assert [*seen, *results][-1] == 0 and sorted(seen) == list(range(1, 50))

    def test_every_result_comes_as_soon_as_it_may(self, meeting: Any) -> None:
        """The first result is there while the second call runs, whatever is batched."""
        meet = meeting.meet

        def f(n: int) -> int:
            if n % 2:
                meet(str(n)).recv(1)
            return n

        results = self.function(f, max_workers=1).map(range(8))
        for n in range(0, 8, 2):
            assert next(results) == n
            meeting.next().let_go()
            assert next(results) == n + 1

    def test_nothing_to_do(self) -> None:
        assert list(self.function(abs).map([])) == []
        assert list(self.function(abs).starmap([])) == []

    def test_several_iterables_and_keywords(self) -> None:
        def f(a: int, b: int, *, c: int = 0) -> tuple[int, int, int]:
            return a, b, c

        function = self.function(f)
        assert list(function.map([1, 2, 3], [4, 5])) == [(1, 4, 0), (2, 5, 0)]
        assert list(function.map([1, 2], [3, 4], kwargs={"c": 9})) == [(1, 3, 9), (2, 4, 9)]
        assert list(function.starmap([(1, 2), [3, 4]], kwargs={"c": 7})) == [(1, 2, 7), (3, 4, 7)]
        assert list(function.starmap(iter([(1, 2)]))) == [(1, 2, 0)]

    def test_tuples_are_one_argument(self) -> None:
        assert list(self.function(lambda pair: pair).map([(1, 2), (3, [4])])) == [(1, 2), (3, [4])]

    def test_values_of_all_sorts(self) -> None:
        np = pytest.importorskip("numpy")

        def f(value: Any) -> Any:
            return [value]

        values: list[Any] = [None, 1, "x", b"y" * 100_000, [1], np.arange(50_000), {"a": (1,)}, lambda: 8, 2.5] * 3
        for given, (got,) in zip(values, self.function(f).map(values), strict=True):
            if callable(given):
                assert got() == 8
            elif isinstance(given, np.ndarray):
                assert np.array_equal(given, got)
            else:
                assert got == given and type(got) is type(given)

    def test_items_share_nothing(self) -> None:
        def f(value: list[int]) -> list[int]:
            value.append(1)
            return value

        one = [0]
        assert list(self.function(f).map([one] * 5)) == [[0, 1]] * 5 and one == [0]

    def test_inputs_are_pulled_lazily(self) -> None:
        source = Source()
        results = self.function(abs).map(source, window=8)
        for n in range(100):
            assert next(results) == n
            assert source.taken <= n + 1 + 8
        results.close()
        assert source.ended.wait(WAIT_S), "leaving early did not end the generator"

    def test_the_window_holds_without_a_consumer(self, meeting: Any) -> None:
        """Results that nobody takes fill the window and no more."""
        meet = meeting.meet

        def f(n: int) -> int:
            if n == 5:
                meet().recv(1)
            return n

        source = Source()
        results = self.function(f, max_workers=1).map(source, window=6)
        met = meeting.next()  # the last item of the window runs, and nothing was taken
        assert source.taken == 6
        met.let_go()
        assert [next(results) for _ in range(10)] == list(range(10))
        results.close()

    def test_leaving_the_loop_stops_the_pump(self) -> None:
        source = Source()
        for result in self.function(abs).map(source):
            if result == 20:
                break
        assert source.ended.wait(WAIT_S)
        taken = source.taken
        assert list(self.function(abs).map([1])) == [1]  # the workers are free again
        assert source.taken == taken

    def test_dropping_the_iterator_stops_the_pump(self) -> None:
        source = Source()
        results = self.function(abs).map(source)
        assert next(results) == 0
        del results
        assert source.ended.wait(WAIT_S)
        unstarted = Source()
        self.function(abs).map(unstarted)
        assert unstarted.ended.wait(WAIT_S) or unstarted.taken == 0

    def test_the_first_exception_is_raised_where_its_result_would_be(self) -> None:
        def f(n: int) -> int:
            if n in (7, 9):
                raise ValueError(n)
            return n

        results = self.function(f).map(range(100))
        seen = []
        with pytest.raises(ValueError) as caught:
            for result in results:
                seen.append(result)
        assert seen == list(range(7)) and caught.value.args == (7,)
        assert list(results) == []

    def test_an_exception_cancels_what_is_queued(self) -> None:
        def f(n: int) -> int:
            if n == 3:
                raise ValueError("stop here")
            return n

        source = Source()
        with pytest.raises(ValueError, match="stop here"):
            for _ in self.function(f, max_workers=1).map(source, window=10):
                pass
        assert source.ended.wait(WAIT_S) and source.taken <= 14

    def test_exceptions_as_results(self) -> None:
        def f(n: int) -> int:
            if n % 3 == 0:
                raise ValueError(n)
            return n

        results: list[Any] = list(self.function(f).map(range(200), return_exceptions=True))
        assert len(results) == 200
        for n, result in enumerate(results):
            assert (type(result) is ValueError and result.args == (n,)) if n % 3 == 0 else result == n

    def test_an_input_that_can_not_be_pickled(self) -> None:
        inputs: list[Any] = [1, 2, threading.Lock(), 4, 5]
        results: list[Any] = list(self.function(lambda x: x).map(inputs, return_exceptions=True))
        assert results[:2] == [1, 2] and results[3:] == [4, 5]
        assert isinstance(results[2], flow.SerializationError)
        with pytest.raises(flow.SerializationError, match="lock"):
            list(self.function(lambda x: x).map(inputs))

    def test_one_result_that_can_not_be_pickled(self) -> None:
        def f(n: int) -> Any:
            import threading

            return threading.Lock() if n == 2 else n

        results: list[Any] = list(self.function(f).map(range(5), return_exceptions=True))
        assert results[:2] == [0, 1] and results[3:] == [3, 4]
        assert isinstance(results[2], flow.SerializationError)

    def test_a_source_that_raises(self) -> None:
        def source() -> Iterator[int]:
            yield from range(5)
            raise LookupError("no more of these")

        results = self.function(abs).map(source())
        seen = []
        with pytest.raises(LookupError, match="no more"):
            for result in results:
                seen.append(result)
        assert seen == list(range(5))

    @pytest.mark.parametrize("kind", ["plain", "general"])
    def test_keywords_travel_once(self, kind: str) -> None:
        def f(n: int, table: Any) -> int:
            import sys

            count: int = vars(sys).get("flowfn_contract_rebuilt", 0)
            return count

        class Table:
            pickled = 0

            def __getstate__(self) -> Any:
                type(self).pickled += 1
                return {"data": list(range(50_000))}

            def __setstate__(self, state: Any) -> None:
                import sys

                vars(sys)["flowfn_contract_rebuilt"] = vars(sys).get("flowfn_contract_rebuilt", 0) + 1

        function = self.function(f, max_workers=1, env={"KEYWORDS": kind})
        inputs: list[Any] = list(range(300)) if kind == "plain" else [[n] for n in range(300)]
        assert set(function.map(inputs, kwargs={"table": Table()})) == {1}
        assert Table.pickled == 1

    def test_for_each(self) -> None:
        def f(n: int) -> None:
            if n == 5:
                raise ValueError(n)

        function = self.function(f)
        assert function.for_each(range(5)) is None
        with pytest.raises(ValueError):
            function.for_each(range(10))
        function.for_each(range(10), ignore_exceptions=True)

    def test_async_for(self) -> None:
        source = Source()

        async def main() -> list[int]:
            seen = []
            async for result in self.function(abs).map(source):
                seen.append(result)
                if result == 9:
                    break
            return seen

        assert asyncio.run(main()) == list(range(10))
        assert source.ended.wait(WAIT_S)

    def test_two_maps_at_a_time(self) -> None:
        function = self.function(lambda x: x + 1)
        pairs = list(zip(function.map(range(500)), function.map(range(500, 1000)), strict=True))
        assert pairs == [(n + 1, n + 501) for n in range(500)]

    def test_calls_pass_by_a_long_map(self) -> None:
        function = self.function(lambda x: x, max_workers=1)
        source = Source()
        results = function.map(source)
        assert next(results) == 0
        assert function.remote("in between") == "in between"
        results.close()

    def test_maps_in_many_threads(self) -> None:
        function = self.function(lambda x: -x)
        sums: list[int] = []
        threads = [threading.Thread(target=lambda: sums.append(sum(function.map(range(400))))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sums == [-sum(range(400))] * 6

    @needs("network")
    def test_closing_ends_what_runs(self, meeting: Any) -> None:
        meet = meeting.meet

        def f(n: int) -> None:
            meet(str(n)).recv(1)

        results = self.function(f, max_workers=1).map(range(100))
        met = meeting.next()
        results.close()
        met.wait_for_end()
        assert list(results) == []
        assert self.function(abs, max_workers=1).remote(-1) == 1

    @pytest.mark.parametrize("window", [0, -1, 1.5, True, "8"])
    def test_a_window_that_is_none(self, window: Any) -> None:
        with pytest.raises(flow.ValidationError, match="window"):
            self.function(abs).map([1], window=window)
