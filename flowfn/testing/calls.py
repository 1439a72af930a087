"""Cases: where calls run, what they are given and give back."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import re
import uuid
from typing import Any

import pytest

from .base import Contract, from_main, make_where_am_i

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
