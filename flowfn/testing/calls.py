"""Cases: where calls run, what they are given and give back, and what may be called."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import enum
import fractions
import pathlib
import re
import threading
import uuid
import warnings
from typing import Any

import pytest

import flowfn as flow

from .base import Contract, from_main, make_where_am_i, needs

VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "int": 7,
    "huge-int": 1 << 4000,
    "float": 0.1,
    "infinity": float("-inf"),
    "complex": 1 - 2j,
    "text": "snowman ☃, emoji 🐍, nul \0, newline \n",
    "surrogate": "\ud800",
    "empty-text": "",
    "bytes": bytes(range(256)),
    "big-bytes": b"ab" * 100_000,
    "bytearray": bytearray(b"xyz"),
    "list": [1, [2, [3, [4, []]]], None],
    "tuple": (1, ("a", ()), b""),
    "dict": {1: "a", "b": {None: [1.5]}, (1, 2): {3}},
    "set": {1, 2, 3},
    "frozenset": frozenset({1, "a"}),
    "range": range(3, 300, 7),
    "slice": slice(1, None, -1),
    "ellipsis": ...,
    "datetime": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
    "decimal": decimal.Decimal("0.10"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=7),
    "path": pathlib.PurePosixPath("/a/b"),
    "pattern": re.compile("a+", re.I),
    "enum": enum.Enum("Colour", "RED GREEN"),
    "type": int,
    "builtin": len,
    "exception-type": ZeroDivisionError,
    "big-list": list(range(100_000)),
    "nested-bytes": {"a": [b"x" * 70_000, (b"y" * 70_000,)], "b": b"z"},
    "many-buffers": [bytearray(1000)] * 3 + [bytearray(b"q") * 1000 for _ in range(200)],
}


class Identity(Contract):
    def test_the_call_runs_somewhere_else(self) -> None:
        where = make_where_am_i()
        there = self.function(where).remote()
        assert tuple(there) != where()

    def test_a_plain_call_runs_here(self) -> None:
        where = make_where_am_i()
        function = self.function(where)
        assert function() == function.local() == where()

    def test_one_worker_takes_one_call_after_another(self) -> None:
        function = self.function(make_where_am_i(), max_workers=1)
        assert function.remote() == function.remote()

    def test_other_options_are_other_workers(self) -> None:
        function = self.function(make_where_am_i(), max_workers=1)
        other = function.options(env={"ANOTHER": "shape"})
        assert function.remote() != other.remote()


class Values(Contract):
    @pytest.mark.parametrize("name", VALUES)
    def test_a_value_goes_there_and_back(self, name: str) -> None:
        def describe(value: Any, *, named: Any) -> tuple[Any, str, bool]:
            return value, type(value).__qualname__, value == named

        value = VALUES[name]
        back, kind, same = self.function(describe).remote(value, named=value)
        assert back == value and type(back) is type(value)
        assert same and kind == type(value).__qualname__

    def test_arguments_arrive_as_they_were_passed(self) -> None:
        def f(a: int, /, b: int, *rest: int, c: int = 3, **more: int) -> Any:
            return a, b, rest, c, more

        function = self.function(f)
        assert function.remote(1, 2) == (1, 2, (), 3, {})
        assert function.remote(1, 2, 3, 4, c=5, d=6) == (1, 2, (3, 4), 5, {"d": 6})
        with pytest.raises(TypeError, match="missing"):
            function.remote(1)

    def test_what_is_shared_within_the_arguments_stays_shared(self) -> None:
        def f(pair: list[list[int]], loop: list[Any]) -> bool:
            return pair[0] is pair[1] and loop[0] is loop

        one = [1]
        loop: list[Any] = []
        loop.append(loop)
        assert self.function(f).remote([one, one], loop)

    @pytest.mark.parametrize("count", [0, 1, 100, 5_000, 50_000, 3_000_000])
    def test_arrays(self, count: int) -> None:
        np = pytest.importorskip("numpy")

        def double(array: Any) -> Any:
            array *= 2  # it is the function's own, whatever its size
            return array

        array = np.arange(count, dtype="float32")
        back = self.function(double).remote(array)
        assert back.dtype == array.dtype and np.array_equal(back, array * 2)
        assert np.array_equal(array, np.arange(count, dtype="float32")), "the client's array was changed"
        back += 1  # and the result is the client's

    def test_arrays_of_all_sorts(self) -> None:
        np = pytest.importorskip("numpy")

        def same(arrays: Any) -> Any:
            return arrays

        base = np.arange(60_000).reshape(200, 300)
        arrays = {
            "fortran": np.asfortranarray(base),
            "strided": base[::3, ::-2],
            "transposed": base.T,
            "scalar": np.array(3.5),
            "dates": np.array(["2024-01-01", "NaT"], dtype="datetime64[s]"),
            "records": np.array([(1, "a")], dtype=[("n", "i4"), ("s", "U3")]),
            "objects": np.array([None, "x", [1]], dtype=object),
            "text": np.array(["a", "bcd"]),
            "bool": np.zeros(1000, dtype=bool),
            "empty": np.empty((0, 5)),
            "big-endian": np.arange(1000, dtype=">i8"),
            "many": [np.full(200, i) for i in range(500)],
        }
        back = self.function(same).remote(arrays)
        for name, array in arrays.items():
            for got, given in zip(back[name], array, strict=True) if name == "many" else [(back[name], array)]:
                assert got.dtype == given.dtype and got.shape == given.shape, name
                assert got.tolist() == given.tolist(), name

    def test_results_stay_whole_while_others_follow(self) -> None:
        """Memory that is used again must not be used while somebody has it."""
        np = pytest.importorskip("numpy")

        def full(value: int) -> Any:
            import numpy as np

            return np.full(100_000, value)

        function = self.function(full, max_workers=1)
        kept = [function.remote(value) for value in range(12)]
        parts = [array[10:20] for array in kept[:6]]
        del kept[:6]
        kept += [function.remote(value) for value in range(12, 24)]
        assert [part.tolist() for part in parts] == [[value] * 10 for value in range(6)]
        assert all(np.all(array == value) for value, array in enumerate(kept, 6))

    def test_what_the_worker_keeps_is_its_own(self) -> None:
        """An argument that comes back may go back in the memory it came in, unless the worker still has it."""
        np = pytest.importorskip("numpy")

        def step(array: Any, keep: bool) -> Any:
            import sys

            known = sys.__dict__.setdefault("kept_by_the_case", [])
            for one in known:
                one += 1
            if keep:
                known.append(array)
            array[0] = len(known)
            return array, [one[1] for one in known]

        function = self.function(step, max_workers=1)
        given = np.zeros(100_000)
        results = [function.remote(given, keep) for keep in (True, False, True, False, False)]
        for number, ((array, _), count) in enumerate(zip(results, (1, 1, 2, 2, 2), strict=True)):
            array[2] += number
            assert array[:3].tolist() == [count, 0, number] and not array[3:].any(), number
        assert [seen for _, seen in results] == [[0], [1], [2, 0], [3, 1], [4, 2]]
        assert not given.any()

    @pytest.mark.parametrize("kind", ["bytes", "array"])
    def test_64_mib_there_and_back(self, kind: str) -> None:
        import hashlib
        import random

        def digest(data: Any) -> Any:
            import hashlib

            return hashlib.sha1(memoryview(data).cast("B")).hexdigest(), data

        block = random.Random(7).randbytes(1 << 20)
        data: Any = block * 64
        if kind == "array":
            data = pytest.importorskip("numpy").frombuffer(data, dtype="int64")
        function = self.function(digest)
        for _ in range(2):
            there, back = function.remote(data)
            here = hashlib.sha1(memoryview(data).cast("B")).hexdigest()
            assert there == here == hashlib.sha1(memoryview(back).cast("B")).hexdigest()

    def test_more_buffers_than_a_small_number_holds(self) -> None:
        def count(blobs: list[Any]) -> Any:
            return len(blobs), blobs

        np = pytest.importorskip("numpy")
        blobs = [np.full(600, i % 100, dtype="u1") for i in range(70_000)]
        number, back = self.function(count).remote(blobs)
        assert number == len(back) == 70_000 and back[-1][0] == blobs[-1][0]

    def test_classes_and_functions_of_main_go_by_value(self) -> None:
        here = from_main(
            "LIMIT = 3\n"
            "def helper(x): return x * LIMIT\n"
            "class Point:\n"
            "    def __init__(self, x): self.x = x\n"
            "    def scaled(self): return Point(helper(self.x))\n"
            "def run(point): return point.scaled(), Point, helper\n"
        )
        members = dict(vars(here["Point"]))
        point, cls, helper = self.function(here["run"]).remote(here["Point"](2))
        assert point.x == 6 and helper(5) == 15
        assert type(point) is cls is here["Point"], "a class that came back is another one"
        assert {name: vars(here["Point"])[name] for name in members} == members, (
            "what came back has overwritten the class"
        )
        here["LIMIT"] = 5
        assert point.scaled().x == 30

    def test_a_global_that_is_set_anew_is_seen(self) -> None:
        here = from_main("def helper(): return 1\nLIMITS = [1]\ndef run(): return helper(), LIMITS\n")
        function = self.function(here["run"], max_workers=1)
        assert function.remote() == (1, [1])
        exec("def helper(): return 2", here)
        assert function.remote() == (2, [1])
        here["LIMITS"].append(2)
        assert function.remote() == (2, [1, 2])


class Kinds(Contract):
    """What may be called."""

    def test_lambdas(self) -> None:
        assert self.function(lambda x, y=2: x + y).remote(1) == 3

    def test_closures(self) -> None:
        def outer(base: int) -> Any:
            def inner(x: int) -> int:
                return base + x

            return inner

        assert self.function(outer(10)).remote(1) == 11
        assert self.function(outer(20)).remote(1) == 21

    def test_recursive_closures(self) -> None:
        def factorial(n: int) -> int:
            return 1 if n < 2 else n * factorial(n - 1)

        assert self.function(factorial).remote(10) == 3628800

    def test_callable_objects_and_partials(self) -> None:
        import functools

        class Adder:
            def __init__(self, base: int) -> None:
                self.base = base

            def __call__(self, x: int) -> int:
                return self.base + x

        assert self.function(Adder(5)).remote(1) == 6
        assert self.function(functools.partial(pow, 2)).remote(5) == 32
        assert self.function([3, 1, 2].index).remote(1) == 1

    def test_methods(self) -> None:
        contract = self

        class Model:
            scale = 2

            def __init__(self, bias: int) -> None:
                self.bias = bias

            def predict(self, x: int) -> int:
                return self.scale * x + self.bias

            remote_predict = contract.function(predict)

            @staticmethod
            def still(x: int) -> int:
                return x

        model = Model(1)
        assert model.remote_predict(3) == 7
        assert model.remote_predict.remote(3) == 7
        assert list(model.remote_predict.map([1, 2])) == [3, 5]
        assert model.remote_predict.options(max_workers=1).remote(4) == 9
        assert self.function(model.predict).remote(5) == 11
        assert self.function(Model.still).remote(5) == 5

    def test_functions_that_call_decorated_ones(self) -> None:
        def double(x: int) -> int:
            return 2 * x

        decorated = self.function(double)

        def twice(x: int) -> Any:
            return decorated(decorated.local(x))

        assert self.function(twice).remote(3) == 12

    def test_decorated_functions_as_arguments_and_results(self) -> None:
        def apply(f: Any, x: int) -> Any:
            return f(x), f

        square = self.function(lambda x: x * x)
        value, back = self.function(apply).remote(square, 4)
        assert value == 16 and back(5) == 25

    def test_async_functions(self) -> None:
        async def slow_sum(*numbers: int) -> int:
            import asyncio

            await asyncio.sleep(0)
            parts = await asyncio.gather(*(asyncio.sleep(0, n) for n in numbers))
            return sum(parts)

        function = self.function(slow_sum)
        assert function.remote(1, 2, 3) == 6
        assert list(function.map([1, 2, 3])) == [1, 2, 3]
        assert asyncio.run(_awaiting(function.spawn(4))) == 4

    def test_async_functions_keep_their_loop(self) -> None:
        async def loop_id() -> int:
            import asyncio

            return id(asyncio.get_running_loop())

        function = self.function(loop_id, max_workers=1)
        assert function.remote() == function.remote()

    @needs("main-thread")
    def test_functions_run_in_the_main_thread(self) -> None:
        def thread() -> bool:
            import signal
            import threading

            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            return threading.current_thread() is threading.main_thread()

        assert self.function(thread).remote()

    def test_calls_inside_calls(self) -> None:
        """A function may start processes of its own, as libraries do."""

        def pool_inside() -> list[int]:
            import multiprocessing

            with multiprocessing.get_context("fork").Pool(2) as pool:
                return pool.map(abs, [-1, -2, -3])

        assert self.function(pool_inside).remote() == [1, 2, 3]

    def test_in_a_running_loop_remote_names_the_awaitable_form(self) -> None:
        function = self.function(lambda: 5, name="blocking")

        async def main() -> Any:
            with pytest.warns(RuntimeWarning, match=r"await blocking\.spawn"):
                value: int = function.remote()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return value + await function.spawn()

        assert asyncio.run(main()) == 10

    def test_threads_may_call_from_everywhere(self) -> None:
        function = self.function(lambda x: x + 1)
        results: dict[int, list[int]] = {}

        def work(number: int) -> None:
            results[number] = [function.remote(number * 100 + i) for i in range(10)]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {n: [n * 100 + i + 1 for i in range(10)] for n in range(12)}


class Generators(Contract):
    def test_values_stream_as_they_are_made(self, meeting: Any) -> None:
        meet = meeting.meet

        def steps(n: int) -> Any:
            yield "first"
            meet().recv(1)
            yield from range(n)

        stream = self.function(steps).remote(3)
        assert next(stream) == "first"  # while the function waits to be let go
        meeting.next().let_go()
        assert list(stream) == [0, 1, 2]

    def test_the_function_is_never_far_ahead(self) -> None:
        def count(n: int) -> Any:
            for i in range(n):
                print(f"made {i}")
                yield i

        future = self.function(count).spawn(2_000)
        stream = future.result()
        for taken in range(1, 101):
            assert next(stream) == taken - 1
            assert future.logs().count("made") <= taken + 64
        stream.close()
        assert future.logs().count("made") < 400

    def test_many_values_in_order(self) -> None:
        def count(n: int) -> Any:
            yield from range(n)

        assert list(self.function(count).remote(5_000)) == list(range(5_000))

    def test_closing_ends_the_function(self, meeting: Any) -> None:
        meet = meeting.meet

        def endless() -> Any:
            try:
                number = 0
                while True:
                    yield number
                    number += 1
            finally:
                meet("finally").close()

        function = self.function(endless, max_workers=1)
        stream = function.remote()
        assert next(stream) == 0
        stream.close()
        assert meeting.next().said == "finally"
        assert list(stream) == []
        for value in function.remote():  # its worker is free again, and leaving the loop ends this one
            if value == 100:
                break
        assert meeting.next().said == "finally"

    def test_an_exception_comes_after_what_was_yielded(self) -> None:
        def fails() -> Any:
            yield 1
            raise KeyError("two")

        stream = self.function(fails).remote()
        assert next(stream) == 1
        with pytest.raises(KeyError, match="two"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)

    def test_asynchronous_generators(self) -> None:
        async def count(n: int) -> Any:
            import asyncio

            for i in range(n):
                await asyncio.sleep(0)
                yield i

        function = self.function(count)
        assert list(function.remote(50)) == list(range(50))

        async def main() -> list[int]:
            stream: Any = await function.spawn(3)
            return [value async for value in stream]

        assert asyncio.run(main()) == [0, 1, 2]

    def test_a_generator_is_no_result_of_a_map(self) -> None:
        def count() -> Any:
            yield 1

        with pytest.raises(TypeError, match="generator"):
            self.function(count).map([1])
        with pytest.raises(flow.SerializationError, match="generator"):
            list(self.function(lambda n: (i for i in range(n))).map([1]))


async def _awaiting(future: Any) -> Any:
    return await future
