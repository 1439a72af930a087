"""What of a function travels, and when it has to travel again."""

from __future__ import annotations

import functools
import json
import os.path
from typing import Any

import pytest

import flowfn as flow
from flowfn.body import Body, Version, importable
from flowfn_runtime import bodies
from flowfn_runtime.errors import SerializationError


def script(source: str) -> dict[str, Any]:
    """What a notebook or a script defines."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(source, namespace)
    return namespace


def load(version: Version) -> Any:
    return bodies.load(bytes(version.payload.data), [bytearray(b) for b in version.payload.buffers])


def module_function(x: int) -> int:
    return x + 1


class Holder:
    @staticmethod
    def static(x: int) -> int:
        return x * 2

    def method(self) -> int:
        return 5


@flow.function
def decorated(x: int) -> int:
    return x * 10


# by name


@pytest.mark.parametrize("function", [module_function, json.dumps, os.path.join, Holder.static, abs])
def test_what_can_be_imported_goes_by_name(function: Any) -> None:
    body = Body(function)
    version = body.current()
    assert len(version.payload.data) < 100 and load(version) is function
    assert body.current().digest == version.digest or load(body.current()) is function


def test_names_that_mislead_are_not_used() -> None:
    def inner() -> None: ...

    impostor = script("def module_function(x): return -x")["module_function"]
    impostor.__module__, impostor.__qualname__ = module_function.__module__, "module_function"
    for function in (
        inner,
        lambda: 1,
        impostor,
        script("def f(): pass")["f"],
        functools.partial(module_function, 1),
        5,
    ):
        assert importable(function) is None
    assert load(Body(impostor).current())(3) == -3


def test_a_decorated_function_goes_as_what_it_wraps() -> None:
    assert importable(decorated) == (__name__, "decorated")
    assert load(Body(bodies.unwrap(decorated)).current())(2) == 20


# by value


def test_nothing_changed_is_nothing_to_send() -> None:
    here = script("LIMIT = 3\nNAMES = ['a']\ndef helper(x): return x + LIMIT\ndef f(x): return helper(x), NAMES\n")
    body = Body(here["f"])
    first = body.current()
    assert body.current() is first and body.current().digest == first.digest
    assert load(first)(1) == (4, ["a"])


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ("LIMIT = 30", 31),
        ("def helper(x): return -x", -1),
        ("OPTIONS['scale'] = 100", 400),
        ("OPTIONS = {'scale': 5}", 20),
        ("class Config: offset = 9", 13),
        ("Config.offset = 7", 11),
        ("Config.shift = staticmethod(lambda x: x + 50)", 54),
        ("thing.value = 6", 10),
        ("deep[0]['x'].append(8)", 12),
        ("f.__defaults__ = (1000,)", 1004),
    ],
)
def test_what_changed_travels_again(change: str, result: int) -> None:
    here = script(
        "LIMIT = 3\n"
        "OPTIONS = {'scale': 1}\n"
        "deep = ({'x': []},)\n"
        "def helper(x): return x + LIMIT\n"
        "class Config:\n"
        "    offset = 0\n"
        "    @staticmethod\n"
        "    def shift(x): return x\n"
        "class Thing:\n"
        "    value = 0\n"
        "thing = Thing()\n"
        "def f(x, extra=0):\n"
        "    y = helper(x) * OPTIONS['scale'] + extra\n"
        "    return getattr(Config, 'shift', abs)(y) + getattr(Config, 'offset', 0) + thing.value + sum(deep[0]['x'])\n"
    )
    body = Body(here["f"])
    first = body.current()
    assert load(first)(1) == 4
    exec(change, here)
    changed = body.current()
    assert changed.digest != first.digest
    assert load(changed)(1) == result


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ("Config.rate = 5", 5),
        ("Config.new = 7", 8),
        ("Base.rate = 3\ndel Config.rate", 3),
        ("Config.method = lambda self: 9", 9),
        ("f.__kwdefaults__ = {'extra': 30}", 31),
        ("def extra_function(): return 50", 51),
        ("f.__code__ = (lambda *, extra=0: 77).__code__", 77),
    ],
)
def test_what_can_only_be_rebound_is_looked_at_as_well(change: str, result: int) -> None:
    """Nothing here is pickled anew to see whether it changed."""
    here = script(
        "class Base:\n"
        "    rate = 0\n"
        "class Config(Base):\n"
        "    rate = 1\n"
        "    new = 0\n"
        "    def method(self): return 0\n"
        "def f(*, extra=0):\n"
        "    try:\n"
        "        more = extra_function()\n"
        "    except NameError:\n"
        "        more = 0\n"
        "    return Config().method() or Config.rate + Config.new + extra + more\n"
    )
    body = Body(here["f"])
    first = body.current()
    assert body.current() is first  # it is not loaded here: that would overwrite the members of its classes
    exec(change, here)
    changed = body.current()
    assert changed is not first and load(changed)() == result


def test_closures_that_change() -> None:
    def outer() -> tuple[Any, Any]:
        count = 0

        def f() -> int:
            return count

        def bump() -> None:
            nonlocal count
            count += 1

        return f, bump

    f, bump = outer()
    body = Body(f)
    first = body.current()
    assert load(first)() == 0
    bump()
    second = body.current()
    assert second.digest != first.digest and load(second)() == 1
    assert body.current() is second


def test_helpers_of_helpers_and_nested_functions() -> None:
    here = script(
        "A = 1\ndef inner(): return A\ndef middle(): return [inner() for _ in range(2)]\ndef f(): return middle()\n"
    )
    body = Body(here["f"])
    first = body.current()
    here["A"] = 2
    assert load(body.current())() == [2, 2] and body.current().digest != first.digest


def test_a_name_that_appears_later() -> None:
    here = script("def f(): return later()\n")
    body = Body(here["f"])
    body.current()
    exec("def later(): return 'there'", here)
    assert load(body.current())() == "there"


def test_recursion_and_circles() -> None:
    here = script("def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\n")
    body = Body(here["even"])
    assert load(body.current())(10) is True and body.current() is body.current()


def test_big_captured_data_is_warned_of_and_taken_as_it_was() -> None:
    here = script("DATA = [0] * 3_000_000\ndef f(): return sum(DATA)\n")
    body = Body(here["f"])
    with pytest.warns(RuntimeWarning, match=r"flow\.put"):
        first = body.current()
    here["DATA"][0] = 1
    assert body.current() is first
    here["DATA"] = [1]
    assert load(body.current())() == 1


def test_a_captured_put_object_travels_by_itself() -> None:
    reference = flow.put(list(range(100_000)))

    def f() -> Any:
        return reference

    version = Body(f).current()
    assert version.objects == [reference] and version.payload.size_bytes < 5_000


def test_what_can_not_be_pickled_is_named() -> None:
    import threading

    lock = threading.Lock()

    def f() -> bool:
        return lock.locked()

    with pytest.raises(SerializationError, match=r"f\(\) closure variable 'lock'"):
        Body(f).current()
