"""Cases: what may be called."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import Any

import pytest

import flowfn as flow

from .base import Contract, needs


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
